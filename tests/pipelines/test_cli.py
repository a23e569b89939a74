"""The command line teaches, and its exit codes can be trusted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["demo", "run", "ingest", "train", "index", "evaluate", "publish", "rollback", "serve", "feed", "replay"]
COMMANDS += ["sequential", "report", "recipes", "doctor"]


def reelrank(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


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
        (["rollback", "--registry", "{tmp}"], 1, "ArtifactError"),
        (["feed", "--user", "1", "--address", "127.0.0.1:1"], 1, "UNAVAILABLE"),
        (["demo", "--scale", "huge"], 2, "give one of tiny, smoke"),
    ],
)
def test_mistakes_get_one_clear_line_and_their_exit_code(arguments: list[str], code: int, says: str, tmp_path: Path):
    shown = reelrank(*[a.format(tmp=tmp_path) for a in arguments])
    assert shown.returncode == code, shown.stderr
    assert says in shown.stderr
    assert "Traceback" not in shown.stderr
