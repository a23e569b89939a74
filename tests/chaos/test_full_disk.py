"""A disk that takes no more, while a bundle is published: what was live stays live, and the message names the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.artifacts import ArtifactError, Registry
from features.durable import DiskError
from features.remote import RemoteRegistry
from pipelines.exits import EXIT_FAILED, exit_code

OLD, NEW = 200_000, 1_500_000


def publish(registry: Registry, version: str, size: int) -> None:
    staged = registry.stage()
    (staged / "weights").write_bytes(os.urandom(size))
    registry.publish(staged, version=version, meta={})
    registry.set_live(version)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_only_old(registry: Registry) -> None:
    assert registry.live() == "old"
    assert registry.list() == ["old"]
    assert registry.open().path("weights").stat().st_size == OLD


def test_a_disk_that_fills_up_at_any_file_leaves_live_as_it_was(small_disk: Path):
    registry = Registry(small_disk / "registry")
    publish(registry, "old", OLD)
    filler = small_disk / "filler"
    steps, refusals = [], []
    for left in (0, 4096, 8192, 12_288):  # manifest, digest, history and LIVE do not fit, in turn
        staged = registry.stage()
        (staged / "weights").write_bytes(b"x")
        free = os.statvfs(small_disk).f_bavail * 4096
        filler.write_bytes(b"\0" * max(free - left, 0))
        try:
            registry.publish(staged, version=f"new-{left}", meta={})
            steps.append("published")
            registry.set_live(f"new-{left}")
            steps.append("live")
        except DiskError as error:
            steps.append("refused")
            refusals.append(error)
            assert registry.live() == "old"
            assert registry.open().path("weights").stat().st_size == OLD
        filler.unlink()
    assert steps[0] == "refused"
    for error in refusals:
        assert "the disk is full: free space there" in str(error)
        assert str(small_disk) in str(error)
        assert exit_code(error) == EXIT_FAILED
    publish(registry, "next", 100)
    assert registry.open().version == "next", "with space again, the next publisher is not in the way of what was left"


def test_a_read_only_disk_is_told_with_its_path_and_cure(small_disk: Path):
    registry = Registry(small_disk / "registry")
    publish(registry, "old", OLD)
    staged = registry.stage()
    (staged / "weights").write_bytes(b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (
        registry.stage,
        lambda: registry.publish(staged, version="new", meta={}),
        lambda: registry.set_live("old"),
        lambda: registry.prune(0),
    ):
        with pytest.raises(DiskError, match="the file system is read-only: mount it writable, or publish elsewhere"):
            attempt()
    assert_only_old(registry)


def test_a_pull_onto_a_full_disk_leaves_the_local_live_version(small_disk: Path, tmp_path: Path):
    big, small = Registry(tmp_path / "big"), Registry(small_disk / "registry")
    publish(big, "old", OLD)
    remote = RemoteRegistry(f"file://{tmp_path}/remote")
    remote.push(big)
    remote.pull(small)
    publish(big, "new", NEW)
    remote.push(big)
    with pytest.raises(DiskError, match="the disk is full"):
        remote.pull(small)
    assert_only_old(small)
    assert list((small.root / ".staging").iterdir()) == []


LIMITED = """
import resource, sys
from features.artifacts import Registry
from features.durable import DiskError, disk_told
registry = Registry(sys.argv[1])
staged = registry.stage()
(staged / "weights").write_bytes(b"x" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    registry.publish(staged, version="new", meta={"long": "x" * 2000})
    registry.set_live("new")
except DiskError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [0, 1500])
def test_a_limit_on_the_size_of_files_is_told(tmp_path: Path, limit: int):
    registry = Registry(tmp_path / "registry")
    publish(registry, "old", OLD)
    command = [sys.executable, "-c", LIMITED, str(registry.root), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "manifest.json could not be written (File too large)" in done.stdout
    assert "`ulimit -f` allows: raise the limit" in done.stdout
    assert_only_old(registry)


def test_other_errors_are_not_taken_for_the_disks(tmp_path: Path):
    registry = Registry(tmp_path / "registry")
    with pytest.raises(ArtifactError, match="is not a staging folder"):
        registry.publish(tmp_path / "nothing", meta={})
