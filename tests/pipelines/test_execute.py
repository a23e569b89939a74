"""A stage runs when what it is made of has changed or its files are damaged, else it is skipped; never by name alone.

The stages here are small (letters are doubled, then counted and joined), everything around them is what a day runs on.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.cluster import ClusterConfig, cluster, joined_cpus, usable_cpus
from pipelines.console import Stages
from pipelines.day import Day, DayStage, Turn
from pipelines.execute import InputsChangedError, execute
from pipelines.hashes import Files, Hashes
from pipelines.plan import MissingInputError, Selection, plan
from pipelines.recipes import recipe
from pipelines.run import RunReport
from pipelines.workspace import Workspace


class Letters:
    """A day of three stages over files that the test writes: logs -> doubled -> joined, and logs -> counted."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.write(a="one", b="two")
        self.day = Day(ws=Workspace.create(folder / "run", recipe("world-tiny")))
        self.ran: list[str] = []
        self.config = {"times": 2, "sep": {"joined": "-"}}
        self.in_between: Callable[[str], None] = lambda name: None
        patch.setattr("pipelines.plan.STAGES", self.stages())

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.logs / name).write_text(text)

    def out(self, name: str) -> Path:
        return self.day.ws.root / name

    def stages(self) -> tuple[DayStage, ...]:
        def stage(name: str, reads: Callable[[Day], tuple[Files, ...]], keys: tuple[str, ...], make) -> DayStage:
            def work(turn: Turn) -> dict:
                self.ran.append(name)
                self.out(name).mkdir(exist_ok=True)
                self.in_between(name)
                make()
                turn.line.rows = 1
                return {}

            def config(day: Day) -> dict:
                return {key: self.config[key] for key in keys}

            return DayStage(name=name, reads=reads, config=config, writes=lambda ws: (self.out(name),), work=work)

        def logs(day: Day) -> tuple[Files, ...]:
            return (Files.together("logs", self.logs.iterdir()),)

        def doubled(day: Day) -> tuple[Files, ...]:
            return (Files.below("doubled", self.out("double"), made_by="double"),)

        def double() -> None:
            for path in self.logs.iterdir():
                (self.out("double") / path.name).write_text(path.read_text().lower() * self.config["times"])

        def count() -> None:
            (self.out("count") / "n").write_text(str(sum(len(path.read_text()) for path in self.logs.iterdir())))

        def join() -> None:
            texts = [path.read_text() for path in sorted(self.out("double").iterdir())]
            (self.out("join") / "all").write_text(self.config["sep"]["joined"].join(texts))

        return (
            stage("double", logs, ("times",), double),
            stage("count", logs, (), count),
            stage("join", doubled, ("sep",), join),
        )

    def run(self, **selection) -> dict[str, tuple[str, str]]:
        """{stage: (status, why)} of one run, and `ran` anew."""
        self.ran.clear()
        shown = Stages()
        execute(self.day, shown, Selection(**selection))
        return {stage.name: (stage.status, stage.why) for stage in shown.done}


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Letters:
    return Letters(tmp_path, monkeypatch)


def test_a_second_run_skips_everything_and_says_why(letters: Letters):
    letters.run()
    assert letters.ran == ["double", "count", "join"]
    assert letters.out("join").joinpath("all").read_text() == "oneone-twotwo"
    found = letters.run()
    assert letters.ran == []
    assert {status for status, _ in found.values()} == {"skipped"}
    assert all("unchanged, and undamaged" in why for _, why in found.values())


def test_new_times_and_moved_folders_are_no_change(letters: Letters, tmp_path: Path):
    letters.run()
    for path in letters.logs.iterdir():
        os.utime(path, (1, 1))
    letters.logs = letters.logs.rename(tmp_path / "elsewhere")
    moved = letters.day.ws.root.rename(tmp_path / "moved")
    letters.day = replace(letters.day, ws=Workspace.open(moved))
    letters.run()
    assert letters.ran == []


def test_a_changed_log_runs_what_hangs_on_it_and_equal_results_end_the_chain(letters: Letters):
    letters.run()
    letters.write(a="ONE")  # doubled as before, in lower case
    found = letters.run()
    assert letters.ran == ["double", "count"]
    assert found["double"] == ("ran", "changed: logs")
    assert found["join"][0] == "skipped"
    letters.write(c="six")
    letters.run()
    assert letters.ran == ["double", "count", "join"]


def test_a_changed_setting_runs_its_stage_and_those_behind_it_alone(letters: Letters):
    letters.run()
    letters.config["sep"] = {"joined": "+"}
    assert letters.run()["join"] == ("ran", "configuration changed (sep.joined: - -> +)")
    assert letters.ran == ["join"]
    letters.config["times"] = 3
    letters.run()
    assert letters.ran == ["double", "join"]
    assert letters.out("join").joinpath("all").read_text() == "oneoneone+twotwotwo"


def test_a_damaged_output_is_made_again_even_when_size_and_time_are_the_same(letters: Letters):
    letters.run()
    path = letters.out("double") / "a"
    stat = path.stat()
    path.write_text("onXone")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert letters.run()["double"] == ("ran", "double/a is not what was written")
    assert letters.ran == ["double"]
    (letters.out("count") / "n").unlink()
    assert letters.run()["count"] == ("ran", "count/n is gone")


def test_a_stage_that_died_half_way_does_not_count_whatever_it_wrote(letters: Letters):
    def dies(name: str) -> None:
        if name == "join":
            (letters.out("join") / "all").write_text("oneone-twotwo")  # even the right thing
            raise MemoryError

    letters.in_between = dies
    with pytest.raises(MemoryError):
        letters.run()
    letters.in_between = lambda name: None
    found = letters.run()
    assert letters.ran == ["join"]
    assert "and not finished" in found["join"][1]


def test_from_and_only_run_what_they_name(letters: Letters):
    letters.run()
    assert letters.run(start="count")["count"] == ("ran", "--from count")
    assert letters.ran == ["count", "join"]
    letters.run(only=("double",))
    assert letters.ran == ["double"]


def test_a_stage_alone_says_which_of_its_inputs_is_not_there(letters: Letters):
    with pytest.raises(MissingInputError, match=r"join reads doubled, which is not there yet .*`--only double` first"):
        letters.run(only=("join",))
    assert letters.ran == []


def test_selections_that_mean_nothing_are_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"--from 'embed'.*ingest, examples, train-towers, .*publish"):
        Selection(start="embed")
    with pytest.raises(ValueError, match="exclude each other"):
        Selection(start="index", only=("index",))


def test_logs_that_change_under_the_reader_are_not_taken_as_read(letters: Letters):
    letters.in_between = lambda name: letters.write(a="more")
    with pytest.raises(InputsChangedError, match=r"logs .* changed while double read them"):
        letters.run()
    letters.in_between = lambda name: None
    letters.run()
    assert letters.ran == ["double", "count", "join"]
    assert letters.out("join").joinpath("all").read_text() == "moremore-twotwo"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_plan_says_what_a_run_then_does_and_touches_nothing(letters: Letters, tmp_path: Path):
    letters.run()
    letters.write(c="six")
    letters.out("count").joinpath("n").write_text("?")
    before = tree(tmp_path)
    decisions = {d.stage.name: d for d in plan(letters.day, Hashes(letters.day.ws.records / "logs.json"), Selection())}
    assert tree(tmp_path) == before
    assert {name: (d.run, d.why) for name, d in decisions.items()} == {
        "double": (True, "changed: logs"),
        "count": (True, "changed: logs"),
        "join": (True, "after double"),
    }
    assert decisions["double"].input_bytes == len("one" + "two" + "six")
    letters.run()
    assert letters.ran == [name for name, d in decisions.items() if d.run]


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (lambda: fail(ValueError("no such column")), 2, "ValueError: no such column"),
        (lambda: fail(ZeroDivisionError("a bug")), 1, "ZeroDivisionError: a bug"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 1, "stopped by SIGTERM"),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 1, "stopped by Ctrl-C"),
    ],
)
def test_the_report_of_a_run_that_failed_names_stage_error_and_exit_code(
    letters: Letters, tmp_path: Path, fails: Callable[[], None], code: int, says: str
):
    def fails_in_the_last(name: str) -> None:
        running = json.loads((tmp_path / "report.json").read_text())
        assert (running["status"], running["exit_code"]) == ("running", None)
        assert running["stages"][-1]["why"] == "not made yet"
        if name == "join":
            fails()

    letters.in_between = fails_in_the_last
    shown = Stages()
    report = RunReport(shown, tmp_path / "no-folder" / "run.json", tmp_path / "report.json")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    try:
        with pytest.raises((Exception, SystemExit)), report.guarded():
            execute(letters.day, shown, after_each=report.save)
    finally:
        signal.signal(signal.SIGINT, before)
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["status"], written["exit_code"]) == ("failed", code)
    assert (written["error"]["stage"], written["error"]["message"]) == ("join", says)
    assert [stage["status"] for stage in written["stages"]] == ["ran", "ran", "failed"]


@pytest.mark.slow
def test_at_an_address_every_stage_finds_itself_in_the_cluster_that_runs_there(letters: Letters):
    from ray.cluster_utils import Cluster  # not before the cluster has set Ray's environment

    seen: dict[str, int] = {}
    letters.in_between = lambda name: seen.update({name: joined_cpus()})
    letters.run()
    assert set(seen.values()) == {usable_cpus()}
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 17})
    try:
        with cluster(ClusterConfig()):
            assert joined_cpus() == max(2, usable_cpus()), "without an address Ray is started, whatever runs here"
        letters.day = replace(letters.day, where=ClusterConfig(address=there.address))
        letters.run(start="double")
    finally:
        there.shutdown()
    assert seen == {"double": 17, "count": 17, "join": 17}
    assert joined_cpus() == usable_cpus(), "it is left again"
