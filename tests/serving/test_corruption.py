"""Any damage to any file of a bundle is refused by name before a parser sees it, and the old version serves on."""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from features.artifacts import ArtifactError, Registry
from serving.client import FeedClient
from serving.swap import load_bundle

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from servers import running

SEALS = {"manifest.json", "manifest.sha256"}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def registry(world, tmp_path) -> Registry:
    return Registry(shutil.copytree(world.registry, tmp_path / "registry"))


def damages(good: bytes, rng: np.random.Generator, flips: int, cuts: int) -> Iterator[bytes]:
    """Single-bit flips and truncations."""
    for _ in range(flips if good else 0):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        yield bytes(bad)
    for _ in range(cuts if good else 0):
        yield good[: int(rng.integers(len(good)))]


def refusal(registry: Registry, version: str) -> str:
    """What loading says; an error of a parser, or none, fails the test."""
    with pytest.raises(ArtifactError) as caught:
        load_bundle(registry, version)
    return str(caught.value)


def damage_every_file(registry: Registry, flips: int, cuts: int, seed: int) -> int:
    """Damage each file in every way, one at a time; returns how often."""
    folder, rng, trials = registry.root / "bundles" / "v2", np.random.default_rng(seed), 0
    other = registry.root / "bundles" / "v1"
    for name in _files(folder):
        path = folder / name
        good = path.read_bytes()
        swapped = [theirs] if (theirs := (other / name).read_bytes()) != good else []
        for bad in (*damages(good, rng, flips, cuts), *swapped, good + b"\0"):
            path.write_bytes(bad)
            said = refusal(registry, "v2")
            trials += 1
            assert "v2" in said
            if name not in SEALS:
                assert name in said
                if len(bad) == len(good):
                    assert hashlib.sha256(bad).hexdigest() in said
                    assert hashlib.sha256(good).hexdigest() in said
                else:
                    assert f"has {len(bad)} bytes, expected {len(good)}" in said
        path.unlink()
        assert name in refusal(registry, "v2")
        path.write_bytes(good)
        extra = path.with_name("extra.pkl")
        extra.write_bytes(b"x")
        assert "extra.pkl not in the manifest" in refusal(registry, "v2")
        extra.unlink()
        trials += 2
    assert load_bundle(registry, "v2").version == "v2"
    return trials


def test_every_file_of_a_bundle_refuses_damage(registry):
    assert damage_every_file(registry, flips=2, cuts=2, seed=0) > 200


def test_damaged_versions_change_nothing_for_those_who_ask(world, registry, tmp_path):
    users, stop, answers = world.dataset.users.ids.tolist(), threading.Event(), []

    def ask(address: str) -> None:
        with FeedClient(address, timeout_s=20) as client:
            while not stop.is_set():
                answers.append(client.get_feed(users[len(answers) % len(users)], now_ms=world.now_ms))

    bundles = registry.root / "bundles"
    for version in ("v3", "v4"):
        shutil.copytree(bundles / "v2", bundles / version)  # another name than the manifest's own
    names = [name for name in _files(bundles / "v2") if name not in SEALS]
    with running(registry.root, tmp_path / "s.sqlite") as server, ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask, f"127.0.0.1:{server.port}") for _ in range(2)]
        for number, name in enumerate(names[::4]):
            path = bundles / "v2" / name
            good = path.read_bytes()
            path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) if good else b"x")
            for version in ("v2", ("v3", "v4")[number % 2]):
                (registry.root / "LIVE").write_text(f"{version}\n")
                assert not server.live.poll()
            path.write_bytes(good)
        refusals = server.live.refusals
        registry.set_live("v2")
        assert server.live.poll(), "whole again, it serves"
        stop.set()
        for one in asking:
            one.result(timeout=30)
    assert refusals == 2 * len(names[::4])
    assert {(len(answer.items), answer.level.name) for answer in answers} == {(10, "FULL")}


@pytest.mark.slow
def test_two_hundred_flips_and_a_hundred_truncations_of_every_file_under_load(world, registry, tmp_path):
    """The server is asked 100 times a second meanwhile; a version that is refused is named again and again."""
    users, stop, answers = world.dataset.users.ids.tolist(), threading.Event(), []

    def ask(address: str) -> None:
        with FeedClient(address, timeout_s=20) as client:
            begin_s = time.monotonic()
            while not stop.is_set():
                answers.append(client.get_feed(users[len(answers) % len(users)], now_ms=world.now_ms))
                time.sleep(max(0.0, begin_s + len(answers) / 100 - time.monotonic()))

    with running(registry.root, tmp_path / "s.sqlite") as server, ThreadPoolExecutor(1) as client:
        began_s = time.monotonic()
        asking = client.submit(ask, f"127.0.0.1:{server.port}")
        trials = damage_every_file(registry, flips=200, cuts=100, seed=1)
        stop.set()
        asking.result(timeout=30)
        seconds = time.monotonic() - began_s
    assert {len(answer.items) for answer in answers} == {10}
    figures = {"damages": trials, "refused": trials, "answers_meanwhile": len(answers), "failed_answers": 0}
    keep("corruption", {**figures, "answers_per_s": round(len(answers) / seconds, 1)})
