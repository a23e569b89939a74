"""The command line teaches, and its exit codes can be trusted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import exits
from pipelines.cli import app
from pipelines.exits import exit_code
from pipelines.recipes import recipe
from pipelines.workspace import Workspace, WorkspaceBusyError

COMMANDS = [
    "demo",
    "run",
    "ingest",
    "train",
    "index",
    "evaluate",
    "publish",
    "registry",
    "serve",
    "feed",
    "replay",
    "upload",
    "remove",
]
COMMANDS += ["sequential", "report", "recipes", "doctor"]


def reelrank(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", [*exits.REFUSED, *exits.INPUT, *exits.FAILED])
def test_errors_with_an_exit_code_exist_by_their_names(name: str):
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    assert issubclass(found, Exception)
    assert f"{found.__module__}.{found.__qualname__}" == name


def test_help_lists_every_command():
    shown = reelrank("--help")
    assert shown.returncode == 0
    assert [c for c in COMMANDS if f" {c} " not in shown.stdout] == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ingest", "--recipe", "no-such", "--data", "."], 2, "no recipe 'no-such'"),
        (["ingest", "--recipe", "custom", "--data", "/nonexistent", "--run", "{tmp}/r"], 2, "no adapter reads this"),
        (["train", "--run", "{tmp}"], 2, "is not a run folder"),
        (["registry", "rollback", "--registry", "{tmp}"], 1, "ArtifactError"),
        (["registry", "list", "--registry", "gopher://x"], 2, "registry gopher://x"),
        (["feed", "--user", "1", "--address", "127.0.0.1:1"], 1, "UNAVAILABLE"),
        (["upload", "/nonexistent.parquet"], 2, "is not there"),
        (["remove", "1", "--address", "127.0.0.1:1"], 1, "UNAVAILABLE"),
        (["remove", str(2**63)], 2, "9223372036854775808"),
        (["demo", "--scale", "huge"], 2, "give one of tiny, smoke"),
        (["index", "build", "--run", "{tmp}"], 2, "is not a run folder"),
        (["index", "build", "--run", "{tmp}", "--device", "cuda:99"], 2, "--device cuda:99: torch"),
        (["serve", "--registry", "{tmp}", "--scorer", "fast"], 2, "--scorer 'fast': choose from plain, auto, fp32"),
        (["serve", "--registry", "{tmp}", "--device", "gpu"], 2, "--device gpu: give auto, cpu, cuda or cuda:N"),
        (["index", "plan", "--videos", "many", "--ram", "1GiB"], 2, "--videos 'many'"),
        (["index", "plan", "--videos", "1e6", "--ram", "24Gx"], 2, "--ram '24Gx': give a number above 0, with a unit"),
        (["index", "plan", "--videos", "1e6", "--ram", "1GiB", "--p50", "5min"], 2, "--p50 '5min'"),
        (["index", "plan", "--videos", "1e6", "--ram", "1GiB", "--dim", "63"], 2, "--dim 63: give a multiple of 4"),
        (["index", "plan", "--videos", "1e6", "--ram", "1GiB", "--recall", "90"], 2, "--recall 90"),
    ],
)
def test_mistakes_get_one_clear_line_and_their_exit_code(arguments: list[str], code: int, says: str, tmp_path: Path):
    shown = reelrank(*[a.format(tmp=tmp_path) for a in arguments])
    assert shown.returncode == code, shown.stderr
    assert says in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs" / "events" / "date=2026-01-01").mkdir(parents=True)
    (tmp_path / "logs" / "events" / "date=2026-01-01" / "part.parquet").write_bytes(b"never opened here")
    return tmp_path / "logs"


def test_a_dry_run_prints_every_stage_and_makes_no_folder(logs: Path, tmp_path: Path):
    day = ["run", "--recipe", "world-tiny", "--data", str(logs), "--out", str(tmp_path / "r")]
    shown = CliRunner().invoke(app, [*day, "--dry-run"])
    assert shown.exit_code == 0, shown.exception
    rows = [line.split() for line in shown.stdout.splitlines() if " run " in line]
    names = ["ingest", "examples", "train-towers", "train-ranker", "index", "evaluate", "publish"]
    assert [row[0] for row in rows] == names
    assert rows[0] == ["ingest", "logs", "17", "B", "run", "not", "made", "yet"]
    assert not (tmp_path / "r").exists()


def test_a_run_that_cannot_begin_says_what_there_is_and_reports_it(logs: Path, tmp_path: Path):
    day = ["run", "--recipe", "world-tiny", "--data", str(logs), "--out", str(tmp_path / "r")]
    report = tmp_path / "report.json"
    for words, says in (
        (["--from", "embed"], "choose from ingest, examples, train-towers, train-ranker, index, evaluate, publish"),
        (["--only", "index"], "index reads examples, which is not there yet"),
        (["--only", "index", "--from", "index"], "--from and --only exclude each other"),
    ):
        error = CliRunner().invoke(app, [*day, *words, "--report-json", str(report)]).exception
        assert isinstance(error, Exception)
        assert exit_code(error) == 2
        assert says in str(error)
        told = json.loads(report.read_text())
        assert (told["status"], told["exit_code"], told["stages"]) == ("failed", 2, [])
        assert says in told["error"]["message"]


def test_a_folder_that_is_being_written_is_left_alone(logs: Path, tmp_path: Path):
    ws = Workspace.create(tmp_path / "r", recipe("world-smoke"))
    ws.report.write_text("the other one's")
    before = {path.name: path.read_bytes() for path in ws.root.iterdir()}
    day = ["run", "--recipe", "world-tiny", "--data", str(logs), "--out", str(ws.root)]
    report = tmp_path / "report.json"
    with ws.locked():
        error = CliRunner().invoke(app, [*day, "--report-json", str(report)]).exception
        assert isinstance(error, WorkspaceBusyError)
        assert f"is being written by process {os.getpid()}" in str(error)
    assert (exit_code(error), json.loads(report.read_text())["exit_code"]) == (1, 1)
    assert before == {path.name: path.read_bytes() for path in ws.root.iterdir() if path.name != ".lock"}


def test_index_plan_reads_human_sizes_and_its_exit_code_says_whether_anything_fits():
    shown = reelrank("index", "plan", "--videos", "1M", "--ram", "2GiB", "--p50", "3000us", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    asked = found["request"]
    assert (asked["videos"], asked["ram_bytes"], asked["p50_ms"]) == (1_000_000, 2 * 2**30, 3.0)
    assert found["pick"]["misses"] == []
    refused = reelrank("index", "plan", "--videos", "1e9", "--ram", "24GiB")
    assert refused.returncode == 3, refused.stderr
    assert "No: no design that is built keeps every limit" in refused.stdout
