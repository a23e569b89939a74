"""kill -9 of `reelrank run` in any stage: the same command goes on, and the bundle is that of an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.world import SCALES, generate

DEADLINE_S = 900.0
"""For one stage to begin, and for a run from start to end."""
KILLED_IN = {"ingest": 1.0, "train-towers": 6.0, "train-ranker": 9.0, "evaluate": 3.0, "publish": 1.5}
"""Stages, and how many seconds after its beginning at most."""


def command(logs: Path, folder: Path) -> list[str]:
    day = ["run", "--recipe", "world-tiny", "--data", str(logs), "--out", str(folder), "--feed-users", "0"]
    often = ["towers_train.checkpoint_every_steps=3", "ranker_train.checkpoint_every_steps=10"]
    return [sys.executable, "-m", "pipelines.cli", *day, *(word for field in often for word in ("--set", field))]


def report(folder: Path) -> dict:
    """run.json, which is replaced in one piece."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {"stages": [], "status": None, "exit_code": None}


def kill_in(stage: str, logs: Path, folder: Path, log: Path, delay_s: float) -> None:
    """Start the run, and kill its process so long after the stage began."""
    (folder / "run.json").unlink(missing_ok=True)
    with log.open("a") as out, subprocess.Popen(command(logs, folder), stdout=out, stderr=out) as driver:
        ends = time.monotonic() + DEADLINE_S
        while not any(s["name"] == stage and s["status"] == "running" for s in report(folder)["stages"]):
            assert driver.poll() is None, f"the run ended before {stage} began:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < ends, f"{stage} did not begin:\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
        time.sleep(delay_s)
        driver.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_killed_in_one_stage_after_another_ends_with_the_bundle_of_one_that_was_not(tmp_path: Path):
    logs, log, rng = tmp_path / "logs", tmp_path / "log", random.Random(7)
    generate(SCALES["tiny"], logs)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with log.open("a") as out:
        subprocess.run(command(logs, undisturbed), stdout=out, stderr=out, check=True, timeout=DEADLINE_S)
    for stage, longest_s in KILLED_IN.items():
        kill_in(stage, logs, killed, log, delay_s=rng.uniform(0.0, longest_s))
        left = report(killed)
        assert (left["status"], left["exit_code"]) == ("running", None), (
            "a killed run must not look like one that ended"
        )
    with log.open("a") as out:
        subprocess.run(command(logs, killed), stdout=out, stderr=out, check=True, timeout=DEADLINE_S)
    first, second = report(undisturbed), report(killed)
    assert second["status"] == "ok"
    assert second["content_sha256"] == first["content_sha256"]
    assert [stage["name"] for stage in second["stages"] if stage["status"] == "skipped"][:3] == [
        "ingest",
        "examples",
        "train-towers",
    ]
