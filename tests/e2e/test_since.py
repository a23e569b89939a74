"""The day after: the live bundle's models are trained on with the new day alone, and published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from features.artifacts import Registry
from pipelines.training.states import open_state
from pipelines.world import SCALES, generate


def run(logs: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    day = ["run", "--recipe", "world-tiny", "--data", str(logs), "--out", str(folder), "--feed-users", "0"]
    command = [sys.executable, "-m", "pipelines.cli", *day, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def report(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_new_day_is_trained_on_alone_published_once_and_not_twice(tmp_path: Path):
    world, logs, folder = tmp_path / "world", tmp_path / "logs", tmp_path / "run"
    generate(SCALES["tiny"], world)
    shutil.copytree(world, logs)
    days = sorted(path.name.removeprefix("date=") for path in (logs / "events").iterdir())
    shutil.rmtree(logs / "events" / f"date={days[-1]}")
    first = run(logs, folder)
    assert first.returncode == 0, first.stderr[-3000:]
    registry = Registry(folder / "registry")
    base = registry.live()
    assert base is not None
    assert open_state(registry.root, base).dates == tuple(days[:2])

    shutil.copytree(world / "events" / f"date={days[-1]}", logs / "events" / f"date={days[-1]}")
    again = run(logs, folder, "--since", days[0])
    assert again.returncode == 2, again.stderr[-3000:]
    assert f"give --since {days[2]}" in again.stderr
    assert registry.live() == base

    second = run(logs, folder, "--since", days[2])
    assert second.returncode == 0, second.stderr[-3000:]
    live = registry.live()
    assert live not in (None, base)
    assert open_state(registry.root, live).dates == tuple(days[:3])
    increment = json.loads((folder / "dataset" / "increment.json").read_text())
    assert (increment["base"], increment["dates"]) == (base, [days[2]])

    third = run(logs, folder, "--since", days[2])
    assert third.returncode == 0, third.stderr[-3000:]
    assert registry.live() == live
    assert {stage["status"] for stage in report(folder)["stages"]} == {"skipped"}
