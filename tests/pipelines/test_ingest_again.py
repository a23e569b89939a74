"""An ingest that goes on from an earlier one: what it leaves alone, and that the result is that of one from nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.adapters.mapping import MappingAdapter
from pipelines.ingest import IngestError, IngestReport, ingest, load_events, load_table
from pipelines.ingest.spread import run_here

DAY_MS, START_MS = 86_400_000, 1_769_817_600_000  # 2026-01-31 00:00 UTC
DAYS = ("2026-01-31", "2026-02-01", "2026-02-02", "2026-02-03")
MAPPING = """
[events]
files = "log/*.parquet"
[events.columns]
user_id = "u"
video_id = "v"
ts_ms = "t"
watch_ms = "w"
like = "liked"
request_id = "r"
[users]
files = "users.csv"
columns.user_id = "u"
"""


@pytest.fixture
def one_process(monkeypatch) -> None:
    """Jobs one after the other: what is tested here is what they are, not where they run."""
    monkeypatch.setattr("pipelines.ingest.run.run_on_ray", run_here)
    monkeypatch.setattr("pipelines.ingest.run.cluster", lambda where: nullcontext())


def log_rows(rng: np.random.Generator, n: int, days: list[int]) -> pa.Table:
    """Events of some days in any order; a few break a rule, a few cannot be read at all."""
    return pa.table(
        {
            "r": [f"r{i}" for i in rng.integers(0, 10**9, n)],
            "u": rng.integers(0, 5, n) + 2**60,
            "v": rng.integers(0, 50, n),
            "t": START_MS + rng.choice(days, n) * DAY_MS + rng.integers(0, DAY_MS, n),
            "w": np.where(rng.random(n) < 0.1, -1, 500),
            "liked": rng.choice(["1", "0", "perhaps"], n, p=[0.4, 0.5, 0.1]),
        }
    )


def source(folder: Path) -> Path:
    (folder / "log").mkdir(parents=True)
    (folder / "m.toml").write_text(MAPPING)
    (folder / "users.csv").write_text("u\n1\n2\n")
    return folder


def settle(folder: Path) -> None:
    """As if the files had been there for a while: those of this second are looked at again in any case."""
    for file in folder.rglob("*"):
        before_s = file.stat().st_mtime - 60
        os.utime(file, (before_s, before_s))


def again(folder: Path, out: str = "out", **options) -> IngestReport:
    return ingest(MappingAdapter(folder / "m.toml"), folder / out, **{"max_bad_share": 1.0, **options})


def hashes(out: Path) -> dict[str, str]:
    return json.loads((out / "ingest.json").read_text())["sha256"]


def files_of(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(f.relative_to(root)): (f.read_bytes(), f.stat().st_mtime_ns) for f in root.rglob("*") if f.is_file()}


def assert_as_from_nothing(folder: Path, found: IngestReport, number: int) -> None:
    """Every file, count and row as an ingest of the same source into an empty folder has them."""
    fresh = again(folder, f"fresh-{number}")
    assert hashes(folder / "out") == hashes(folder / f"fresh-{number}")
    assert (found.tables, found.dates) == (fresh.tables, fresh.dates)
    events = found.tables["events"]
    assert events.rows_in == sum(pq.read_metadata(f).num_rows for f in (folder / "log").glob("*.parquet"))
    assert events.rows_in == events.kept + events.quarantined
    assert load_events(folder / "out").num_rows == events.kept


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("seed", range(4))
def test_files_that_come_change_and_go_in_any_order_end_as_one_ingest_of_what_is_there(
    tmp_path: Path, seed: int
) -> None:
    rng, folder = np.random.default_rng(seed), source(tmp_path)
    names = [f"{name}.parquet" for name in rng.permutation(list("abcdefg"))]
    for step, name in enumerate([*names, *rng.choice(names, 4)]):
        file = folder / "log" / name
        days = rng.choice(len(DAYS), rng.integers(1, 3), replace=False).tolist()
        if step >= len(names) and rng.random() < 0.5:
            file.unlink(missing_ok=True)
        else:
            pq.write_table(log_rows(rng, int(rng.integers(1, 80)), days), file)
        if step == 5:
            (folder / "users.csv").write_text("u\n1\n2\n3\n")
        if not any((folder / "log").iterdir()) or rng.random() < 0.3:  # several changes at once
            continue
        settle(folder / "log")
        found = again(folder)
        assert_as_from_nothing(folder, found, step)
        before = files_of(folder / "out")
        assert again(folder).files_read == 0
        assert files_of(folder / "out") == before, "a second ingest of the same files writes nothing"


@pytest.mark.usefixtures("one_process")
def test_late_data_opens_its_own_day_and_no_other(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(1), source(tmp_path)
    for day, name in enumerate("bcd"):
        pq.write_table(log_rows(rng, 60, [day]), folder / "log" / f"{name}.parquet")
    settle(folder)
    assert again(folder).note == ""
    before = files_of(folder / "out")
    assert again(folder).note == "nothing written: all 4 files are as they were"
    assert files_of(folder / "out") == before
    pq.write_table(log_rows(rng, 10, [1]), folder / "log" / "a.parquet")  # sorts before what came first
    found = again(folder)
    assert (found.files_read, found.days_written) == (1, (DAYS[1],))
    assert found.note == f"1 of 5 files read; days written: {DAYS[1]}"
    after = files_of(folder / "out")
    opened = {f"events/date={DAYS[1]}/part-00000.parquet", "quarantine/events.parquet", "ingest.json"}
    assert {name for name in before if after[name] != before[name]} == opened
    assert_as_from_nothing(folder, found, 0)


@pytest.mark.usefixtures("one_process")
def test_a_file_that_was_only_touched_is_not_read_and_one_of_the_same_size_and_time_is_if_it_was_young(
    tmp_path: Path,
) -> None:
    rng, folder = np.random.default_rng(2), source(tmp_path)
    file = folder / "log" / "a.parquet"
    pq.write_table(log_rows(rng, 60, [0]), file)
    again(folder)
    os.utime(file, (1, 1))
    assert again(folder).files_read == 0
    young, other = file.stat(), log_rows(rng, 60, [0])
    (folder / "users.csv").write_text("u\n7\n8\n")  # as long as before, within the same second
    users = folder / "users.csv"
    again(folder)
    kept = users.stat()
    users.write_text("u\n8\n9\n")
    os.utime(users, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    found = again(folder)
    assert found.files_read == 1
    table = load_table(folder / "out", "users")
    assert table is not None
    assert table["user_id"].to_pylist() == [8, 9]
    pq.write_table(other, file)
    os.utime(file, ns=(young.st_atime_ns, young.st_mtime_ns))
    assert again(folder).days_written == (DAYS[0],)


@pytest.mark.usefixtures("one_process")
def test_a_damaged_partition_is_made_again_from_its_files(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(3), source(tmp_path)
    for name in "ab":
        pq.write_table(log_rows(rng, 60, [0, 1]), folder / "log" / f"{name}.parquet")
    pq.write_table(log_rows(rng, 60, [2]), folder / "log" / "c.parquet")
    settle(folder)
    again(folder)
    good = hashes(folder / "out")
    part = folder / "out" / "events" / f"date={DAYS[1]}" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(IngestError, match="remove it and ingest again"):
        load_events(folder / "out")
    found = again(folder)
    assert (found.files_read, hashes(folder / "out")) == (2, good)
    part.unlink()
    again(folder)
    (folder / "out" / "quarantine" / "events.parquet").unlink()
    (folder / "out" / "users.parquet").unlink()
    again(folder)
    assert hashes(folder / "out") == good
    assert load_events(folder / "out").num_rows == found.tables["events"].kept


@pytest.mark.usefixtures("one_process")
def test_another_mapping_reads_everything_again(tmp_path: Path) -> None:
    folder = source(tmp_path)
    pq.write_table(log_rows(np.random.default_rng(4), 60, [0]), folder / "log" / "a.parquet")
    settle(folder)
    again(folder)
    (folder / "m.toml").write_text(MAPPING.replace('watch_ms = "w"\n', ""))
    found = again(folder)
    assert (found.files_read, found.days_written) == (2, (DAYS[0],))
    assert load_events(folder / "out")["watch_ms"].null_count == found.tables["events"].kept


@pytest.mark.usefixtures("one_process")
def test_a_bad_late_file_is_refused_however_long_the_log_and_its_rows_can_be_looked_at(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(5), source(tmp_path)
    good = log_rows(rng, 2000, [0, 1])
    good = good.set_column(4, "w", pa.array([500] * 2000)).set_column(5, "liked", pa.array(["1"] * 2000))
    pq.write_table(good, folder / "log" / "a.parquet")
    again(folder, max_bad_share=0.05)
    before = files_of(folder / "out")
    late = good.slice(0, 50).set_column(4, "w", pa.array([-1] * 20 + [500] * 30))
    pq.write_table(late, folder / "log" / "late.parquet")
    with pytest.raises(IngestError) as refusal:
        again(folder, max_bad_share=0.05)
    refused = folder / "out.refused" / "events.parquet"
    assert "events: 20 of 50 rows (40.0%) break the schema (at most 5.0% may)" in str(refusal.value)
    assert "late.parquet line 1 (watch_ms is negative)" in str(refusal.value)
    assert str(refused) in str(refusal.value)
    assert pq.read_table(refused)["line"].to_pylist() == list(range(1, 21))
    assert files_of(folder / "out") == before
    assert again(folder, max_bad_share=0.4).tables["events"].quarantined == 20
    assert not refused.parent.exists()


@pytest.mark.usefixtures("one_process")
def test_where_folders_cannot_be_exchanged_a_crash_between_two_renames_is_mended(tmp_path: Path, monkeypatch) -> None:
    rng, folder = np.random.default_rng(7), source(tmp_path)
    pq.write_table(log_rows(rng, 60, [0]), folder / "log" / "a.parquet")
    monkeypatch.setattr("pipelines.storage._exchanged", lambda first, second: False)
    again(folder)
    pq.write_table(log_rows(rng, 60, [1]), folder / "log" / "b.parquet")
    found = again(folder)
    assert_as_from_nothing(folder, found, 0)
    left = folder / ".out.ingest-dead"
    left.mkdir()
    (folder / "out").rename(left / "data.old")
    assert again(folder).files_read == 0
    assert load_events(folder / "out").num_rows == found.tables["events"].kept


KILLED = """
import os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from pipelines.adapters.mapping import MappingAdapter
from pipelines.ingest import ingest, run, spread
run.run_on_ray, run.cluster = spread.run_here, lambda where: nullcontext()
seen = 0
def tell(progress):
    global seen
    seen += 1
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
ingest(MappingAdapter(folder / "m.toml"), folder / "out", max_bad_share=1.0, on_progress=tell)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_process")
def test_killed_at_any_step_the_old_folder_stands_and_the_next_ingest_ends_as_one_from_nothing(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(6), source(tmp_path)
    for name in "abc":
        pq.write_table(log_rows(rng, 60, [0, 1]), folder / "log" / f"{name}.parquet")
    again(folder)
    before = files_of(folder / "out")
    for name in "bd":
        pq.write_table(log_rows(rng, 60, [1, 2]), folder / "log" / f"{name}.parquet")
    for step in range(1, 6):  # two files, then three days: at the last all is done, and nothing replaced yet
        run = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(step)], capture_output=True, check=False)
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        assert files_of(folder / "out") == before
    assert_as_from_nothing(folder, again(folder), 0)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
