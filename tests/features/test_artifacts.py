"""What a bundle promises: every byte checked before use, LIVE always complete, rollback in one call."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from features import artifacts
from features.artifacts import ArtifactError, LiveMovedError, Registry

FILES = {"ranker.bin": b"weights" * 40, "index/ids.npy": bytes(range(256)), "config.json": b"{}"}


def publish(registry: Registry, tag: str, version: str | None = None) -> str:
    staged = registry.stage()
    for name, content in FILES.items():
        path = staged / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content + tag.encode())
    return registry.publish(staged, version=version, meta={"tag": tag})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def seal(folder: Path, manifest: dict) -> None:
    """Rewrite a manifest with a matching digest, as somebody with write access could."""
    raw = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sha256").write_text(hashlib.sha256(raw).hexdigest() + "\n")


def test_what_is_published_is_what_opens(registry: Registry) -> None:
    version = publish(registry, "one")
    registry.set_live(version)
    bundle = registry.open()
    assert bundle.version == version == registry.live() == registry.list()[0]
    assert bundle.meta == {"tag": "one"}
    assert list(bundle.files) == sorted(FILES)
    assert bundle.path("index/ids.npy").read_bytes() == FILES["index/ids.npy"] + b"one"
    for name in ("manifest.json", "../LIVE", "nothing"):
        with pytest.raises(ArtifactError, match="has no file"):
            bundle.path(name)


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "manifest.sha256"])
def test_one_flipped_bit_in_any_file_is_refused_by_name_and_hash(registry: Registry, name: str) -> None:
    version = publish(registry, "x")
    path = registry.root / "bundles" / version / name
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 12)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        with pytest.raises(ArtifactError) as refusal:
            registry.open(version)
        assert version in str(refusal.value)
        if name in FILES:
            assert name in str(refusal.value)
            assert hashlib.sha256(bad).hexdigest() in str(refusal.value)
            assert hashlib.sha256(good).hexdigest() in str(refusal.value)
    path.write_bytes(good)
    assert registry.open(version).version == version


def test_truncated_missing_extra_and_linked_files_are_refused(registry: Registry) -> None:
    version = publish(registry, "x")
    folder = registry.root / "bundles" / version
    path = folder / "ranker.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ArtifactError, match=rf"ranker.bin has {len(good) - 1} bytes, expected {len(good)}"):
        registry.open(version)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"missing ranker\.bin"):
        registry.open(version)
    outside = registry.root / "same-bytes"
    outside.write_bytes(good)
    path.symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"ranker\.bin is a link"):
        registry.open(version)
    path.unlink()
    path.write_bytes(good)
    (folder / "evil.pkl").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"evil\.pkl not in the manifest"):
        registry.open(version)
    (folder / "evil.pkl").unlink()
    assert registry.open(version).version == version


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "./ranker.bin", "..", "a\\b", ""])
def test_a_manifest_cannot_name_a_path_outside_its_bundle(registry: Registry, name: str) -> None:
    version = publish(registry, "x")
    folder = registry.root / "bundles" / version
    (registry.root / "bundles" / "outside").write_bytes(b"x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    seal(folder, manifest)
    with pytest.raises(ArtifactError, match="not a plain path inside"):
        registry.open(version)


MALFORMED = [{"format": 99}, {"version": "other"}, {"files": []}, {"meta": None}, {"files": {"a": {}}}]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_manifest_is_an_artifact_error(registry: Registry, change: dict) -> None:
    version = publish(registry, "x")
    folder = registry.root / "bundles" / version
    seal(folder, {**json.loads((folder / "manifest.json").read_text()), **change})
    with pytest.raises(ArtifactError, match=version):
        registry.open(version)


def test_rollback_walks_back_through_what_was_live_and_skips_the_damaged(registry: Registry) -> None:
    with pytest.raises(ArtifactError, match="no live bundle"):
        registry.open()
    for version in ("v1", "v2", "v3", "v4"):
        publish(registry, version, version)
        registry.set_live(version)
    (registry.root / "bundles" / "v3" / "config.json").write_bytes(b"damaged!")
    assert registry.rollback() == "v2"
    assert registry.live() == "v2"
    assert registry.rollback() == "v1"
    with pytest.raises(ArtifactError, match="no other version was live before"):
        registry.rollback()
    assert registry.live() == "v1"
    assert [(e["action"], e["version"]) for e in registry.history()][-2:] == [("rollback", "v2"), ("rollback", "v1")]
    registry.set_live("v4")
    assert registry.rollback() == "v1"


def test_live_never_points_at_a_bundle_that_does_not_verify(registry: Registry) -> None:
    publish(registry, "a", "v1")
    registry.set_live("v1")
    publish(registry, "b", "v2")
    (registry.root / "bundles" / "v2" / "ranker.bin").write_bytes(b"")
    for version in ("v2", "v9", "../v1", ""):
        with pytest.raises(ArtifactError):
            registry.set_live(version or "/")
    assert registry.live() == "v1"
    assert len(registry.history()) == 1


def test_publish_refuses_a_taken_version_an_empty_stage_a_foreign_folder(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "a", "v1")
    with pytest.raises(ArtifactError, match="already published"):
        publish(registry, "b", "v1")
    assert registry.open("v1").meta == {"tag": "a"}
    with pytest.raises(ArtifactError, match="holds no file"):
        registry.publish(registry.stage(), meta={})
    with pytest.raises(ArtifactError, match="not a staging folder"):
        registry.publish(tmp_path, meta={})
    staged = registry.stage()
    (staged / "link").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="link"):
        registry.publish(staged, meta={})


def test_the_next_publish_collects_old_leftovers_and_leaves_fresh_ones(registry: Registry) -> None:
    old, fresh = registry.stage(), registry.stage()
    (old / "half").write_bytes(b"x")
    hours_ago = time.time() - 2 * 3600
    os.utime(old / "half", (hours_ago, hours_ago))
    os.utime(old, (hours_ago, hours_ago))
    publish(registry, "a")
    assert not old.exists()
    assert fresh.exists()


KILLED_PUBLISHER = """
import os, sys
from features.artifacts import Registry
root, deadly = sys.argv[1], int(sys.argv[2])
step = 0
def deadly_step(real):
    def call(*args, **kwargs):
        global step
        step += 1
        if step == deadly:
            os._exit(9)
        return real(*args, **kwargs)
    return call
registry = Registry(root)
for name in ("fsync", "rename", "replace"):
    setattr(os, name, deadly_step(getattr(os, name)))
staged = registry.stage()
(staged / "ranker.bin").write_bytes(b"new" * 100)
(staged / "config.json").write_bytes(b"{}")
registry.set_live(registry.publish(staged, version="new", meta={"tag": "new"}))
"""


def test_a_publisher_killed_at_any_step_leaves_a_complete_live_version(tmp_path: Path) -> None:
    outcomes = []
    for deadly in range(1, 40):
        registry = Registry(tmp_path / str(deadly))
        publish(registry, "old", "old")
        registry.set_live("old")
        killed = subprocess.run([sys.executable, "-c", KILLED_PUBLISHER, str(registry.root), str(deadly)], check=False)
        live = registry.open()
        assert live.version in ("old", "new")
        assert live.meta == {"tag": live.version}
        for version in registry.list():
            assert registry.open(version).version == version
        if live.version == "new":
            assert registry.rollback() == "old"
        outcomes.append((killed.returncode, live.version))
        if killed.returncode == 0:
            break
    assert outcomes[0] == (9, "old")
    assert outcomes[-1] == (0, "new")
    assert len(outcomes) >= 10


RACING_PUBLISHER = """
import sys
from features.artifacts import Registry
registry = Registry(sys.argv[1])
for n in range(8):
    staged = registry.stage()
    for name in ("a", "b"):
        (staged / name).write_text(f"{sys.argv[2]} {n}")
    registry.set_live(registry.publish(staged, version=f"{sys.argv[2]}-{n}", meta={"who": sys.argv[2], "n": n}))
"""


def test_racing_publishers_never_mix_their_files(registry: Registry) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", RACING_PUBLISHER, str(registry.root), who]) for who in "xy"]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    assert len(registry.list()) == len(registry.history()) == 16
    for version in registry.list():
        bundle = registry.open(version)
        expected = f"{bundle.meta['who']} {bundle.meta['n']}"
        assert {bundle.path(name).read_text() for name in ("a", "b")} == {expected}
    assert registry.live() == registry.history()[-1]["version"]


def test_a_history_line_cut_by_a_crash_costs_nothing(registry: Registry) -> None:
    for version in ("v1", "v2"):
        publish(registry, version, version)
        registry.set_live(version)
    log = registry.root / "history.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    publish(registry, "v3", "v3")
    registry.set_live("v3")
    assert [entry["version"] for entry in registry.history()] == ["v1", "v3"]
    assert registry.rollback() == "v1"


def test_live_moves_only_from_the_version_a_candidate_was_judged_against(registry: Registry) -> None:
    for version in ("v1", "v2", "v3"):
        publish(registry, version, version)
    registry.set_live("v1", if_live=None)
    registry.set_live("v2", if_live="v1")
    with pytest.raises(LiveMovedError, match="moved from v1 to v2 while v3 was judged against v1: publish again"):
        registry.set_live("v3", if_live="v1")
    with pytest.raises(LiveMovedError):
        registry.set_live("v3", if_live=None)
    assert registry.live() == "v2"
    assert len(registry.history()) == 2


def test_pruning_leaves_live_what_rollback_goes_to_and_what_is_being_published(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        publish(registry, version, version)
        registry.set_live(version)
    publish(registry, "v5", "v5")  # not live yet: its publisher is between two steps
    half = registry.stage()
    registry.rollback()
    assert registry.prune(0, dry_run=True) == ["v1", "v4"]
    assert len(registry.list()) == 5
    assert registry.prune(0) == ["v1", "v4"]
    assert registry.list() == ["v2", "v3", "v5"]
    assert half.is_dir()
    monkeypatch.setattr(artifacts, "STAGING_MAX_AGE_S", -1)  # an hour later
    assert registry.prune(0) == ["v5"]
    assert registry.rollback() == "v2"
    with pytest.raises(ValueError, match="keep -1"):
        registry.prune(-1)
