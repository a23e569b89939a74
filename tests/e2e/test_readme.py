"""What the README tells a reader to type works: its commands and its Python run here, on a tiny demo."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.recipes import RECIPES
from pipelines.show import served
from pipelines.workspace import Workspace

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DATA = ROOT.parent / "shared" / "data" / "kuairand-pure"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words for words in lines if words and words[0] == program]


def readme_command(name: str) -> list[str]:
    return next(words[1:] for words in commands("reelrank") if words[1] == name)


def reelrank(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )


def on(demo: Path, words: list[str]) -> list[str]:
    return [word.replace("runs/demo-smoke", str(demo)) for word in words]


@pytest.fixture(scope="module")
def address(demo: Path) -> Iterator[str]:
    with served(Workspace.open(demo)) as where:
        yield where


def test_the_two_commands_are_what_make_runs():
    assert [words[1] for words in commands("make")] == ["demo", "test"]
    plan = {target: subprocess.run(["make", "-n", target], capture_output=True, text=True, cwd=ROOT, check=True).stdout
            for target in ("demo", "test")}  # fmt: skip
    assert "reelrank demo --scale smoke" in plan["demo"]
    for tool in ("ruff check", "lint-imports", "pyright", "pytest"):
        assert tool in plan["test"]


def test_every_command_of_the_readme_is_tested_here():
    here = Path(__file__).read_text()
    assert [words[1] for words in commands("reelrank") if f'"{words[1]}"' not in here] == []


def test_the_run_command_names_a_recipe_and_reads_the_real_logs(tmp_path: Path):
    words = readme_command("run")
    assert words[words.index("--recipe") + 1] in RECIPES
    if not DATA.exists():
        pytest.skip(f"KuaiRand-Pure is not at {DATA}")
    shown = reelrank(["ingest", *words[1:], "--run", str(tmp_path / "r")])
    assert shown.returncode == 0, shown.stderr
    assert "171,671 events kept" in shown.stderr


def test_feed_prints_why_each_video_is_there(address: str):
    words = readme_command("feed")
    shown = reelrank([*words, "--address", address])
    assert shown.returncode == 0, shown.stderr
    assert "cold start" in shown.stdout
    assert len(re.findall(r"^ +\d+ +\d{6,}", shown.stdout, re.M)) == 10


def test_the_python_of_the_readme_runs(address: str, capsys: pytest.CaptureFixture[str]):
    (block,) = blocks("python")
    exec(block.replace("127.0.0.1:50051", address), {})  # noqa: S102 - the block under test
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_videos_are_sent_to_the_server_and_removed_from_it(demo: Path, address: str):
    path = demo / "canonical" / "videos.parquet"
    n, some = pq.ParquetFile(path).metadata.num_rows, pq.read_table(path, columns=["video_id"])["video_id"][0].as_py()
    sent = reelrank(["upload", str(path), "--address", address])
    assert (sent.returncode, sent.stdout) == (0, f"0 new videos, {n:,} known ones replaced, 0 left out\n"), sent.stderr
    gone = reelrank(["remove", "--address", address, "--", str(some)])
    assert (gone.returncode, gone.stdout.split(",")[0]) == (0, "1 videos removed"), gone.stderr


def test_replay_answers_or_refuses_with_its_exit_code(demo: Path):
    shown = reelrank(on(demo, readme_command("replay")))
    assert shown.returncode in (0, 3), shown.stderr
    assert ("refused" in shown.stdout) == (shown.returncode == 3)


def test_stages_run_alone_and_rollback_restores_the_bundle_before(demo: Path):
    live = (demo / "registry" / "LIVE").read_text()
    evaluated = reelrank(on(demo, readme_command("evaluate")))
    assert evaluated.returncode == 0, evaluated.stderr
    assert "two towers, exact" in evaluated.stdout
    assert reelrank(["publish", "--run", str(demo)]).returncode == 0
    assert (demo / "registry" / "LIVE").read_text() != live
    assert reelrank(on(demo, readme_command("registry"))).returncode == 0
    assert (demo / "registry" / "LIVE").read_text() == live


def test_the_planned_index_fits():
    shown = reelrank(readme_command("index"))
    assert shown.returncode == 0, shown.stderr
    assert "designs keep every limit" in shown.stdout


def test_the_sequential_benchmark_reads_the_file_movielens_ships(tmp_path: Path):
    words = readme_command("sequential")
    ratings = tmp_path / words[words.index("--data") + 1]
    ratings.write_text("".join(f"{u}::{1 + (u + i) % 30}::5::{i}\n" for u in range(1, 41) for i in range(8)))
    words[words.index("--data") + 1] = str(ratings)
    words[words.index("--seeds") + 1] = "1"
    shown = reelrank([*words, "--set", "train.epochs=1", "--run", str(tmp_path / "run")])
    assert shown.returncode == 0, shown.stderr
    assert "ml-1m: test items, whole catalogue ranked" in shown.stdout


def test_serve_and_doctor_are_the_commands_that_exist():
    assert reelrank([readme_command("serve")[0], "--help"]).returncode == 0
    assert {"serve", "--registry", "--port"} <= set(readme_command("serve"))
    shown = reelrank(readme_command("doctor"))
    assert shown.returncode == 0, shown.stdout
    assert "torchrec" in shown.stdout
    assert "doctor" in readme_command("doctor")
