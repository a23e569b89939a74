"""`reelrank train` on a disk that is full, and on one that is read-only: what it says, and its exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import stages
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.cluster import ClusterConfig, cluster
from pipelines.console import Stage
from pipelines.recipes import recipe
from pipelines.workspace import Workspace
from pipelines.world import SCALES, generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def run_on_small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ingested run whose training folder is a disk of one mebibyte."""
    generate(SCALES["tiny"], tmp_path / "raw")
    ws = Workspace.create(tmp_path / "run", recipe("world-tiny"))
    with cluster(ClusterConfig(cpus=2)):
        stages.ingest(ws, CanonicalAdapter(tmp_path / "raw"), Stage("ingest"))
    stages.examples(ws, Stage("examples"))
    ws.training.mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", ws.training]
    mounted = subprocess.run(disk, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield ws.root
    subprocess.run(["umount", "-l", ws.training], check=True)


def train(run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", "train", "--run", run, "--model", "ranker"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_full_and_a_read_only_disk_end_the_command_with_the_reason(run_on_small_disk):
    full = train(run_on_small_disk)
    assert full.returncode == 1, full.stderr
    assert "could not be written to" in full.stderr
    assert str(run_on_small_disk / "training" / "ranker") in full.stderr.replace("\n", "")
    assert "Traceback" not in full.stderr
    assert not (run_on_small_disk / "ranker").exists(), "no model from half a training"

    subprocess.run(["mount", "-o", "remount,ro", run_on_small_disk / "training"], check=True)
    locked = train(run_on_small_disk)
    assert locked.returncode == 1, locked.stderr
    assert "Read-only file system" in locked.stderr
    assert "Traceback" not in locked.stderr

    subprocess.run(["mount", "-o", "remount,rw,size=256m", run_on_small_disk / "training"], check=True)
    again = train(run_on_small_disk)
    assert again.returncode == 0, again.stderr
    assert (run_on_small_disk / "ranker" / "ranker.safetensors").exists()
