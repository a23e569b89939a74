"""Long runs in one process of its own: nothing fails while bundles swap, and nothing grows."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from features.artifacts import Registry
from serving.client import FeedClient
from serving.messages import Event, Video

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from load import Load, Outcomes, quantile
from servers import subprocess_server

SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "10"))
MIB = 1 << 20


class Watched(threading.Thread):
    """Memory, open files and threads of a process, read at a pace."""

    def __init__(self, pid: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self._process, self._every_s, self._ended = psutil.Process(pid), every_s, threading.Event()
        self.at_s: list[float] = []
        self.readings: list[tuple[float, int, int]] = []

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            p = self._process
            self.at_s.append(time.monotonic())
            self.readings.append((p.memory_info().rss / MIB, p.num_fds(), p.num_threads()))

    def end(self) -> tuple[np.ndarray, np.ndarray]:
        """Times and readings (N, 3)."""
        self._ended.set()
        self.join()
        return np.array(self.at_s), np.array(self.readings)


def whole(outcomes: Outcomes, versions: set[str]) -> None:
    """No call failed, each answer is of one version, and that version's policy."""
    assert set(outcomes.codes) == {"OK"}
    assert set(outcomes.items) == {10}
    assert {version for version, _ in outcomes.versions} == versions
    assert len(outcomes.versions) == len(versions), "a version has one policy: no answer mixes two"


@pytest.mark.slow
def test_fifty_swaps_at_seventy_percent_of_capacity(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    users, found = world.dataset.users.ids.tolist(), {}
    with subprocess_server(registry.root, tmp_path / "s.sqlite") as (process, address):
        load = Load(address, users, world.now_ms, deadline_s=5.0)
        load.closed(callers=4, seconds=3)
        capacity = load.closed(callers=8, seconds=5)

        def swap_to(version: str, client: FeedClient) -> None:
            registry.set_live(version)
            while client.get_feed(users[0], now_ms=world.now_ms).bundle_version != version:
                time.sleep(0.02)

        with FeedClient(address, timeout_s=20) as client:
            for version in ("v2", "v1", "v2", "v1"):
                swap_to(version, client)
            watched = Watched(process.pid, 0.5)
            watched.start()
            asking = threading.Thread(target=lambda: found.update(load=load.open(0.7 * capacity.per_s, 110.0)))
            asking.start()
            for number in range(50):
                swap_to(("v2", "v1")[number % 2], client)
            asking.join()
        _, readings = watched.end()
    outcomes, memory = found["load"], readings[:, 0]
    tenth = max(1, len(memory) // 10)
    growth = float(np.median(memory[-tenth:]) / np.median(memory[:tenth]) - 1)
    figures = {
        "swaps": 50,
        "capacity_per_s": round(capacity.per_s, 1),
        "asked_per_s": round(0.7 * capacity.per_s, 1),
        "answers": len(outcomes.codes),
        "failed": len(outcomes.codes) - outcomes.codes.count("OK"),
        "p50_ms": quantile(outcomes.of("OK"), 0.5),
        "p99_ms": quantile(outcomes.of("OK"), 0.99),
        "memory_mib": [round(float(np.median(part)), 1) for part in (memory[:tenth], memory[-tenth:])],
        "memory_growth": round(growth, 4),
    }
    keep("swaps", figures)
    whole(outcomes, {"v1", "v2"})
    assert growth < 0.05


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_soak_of_pages_events_uploads_and_removals_leaves_memory_files_and_threads_flat(world, tmp_path):
    """SOAK_MINUTES (10): pages at half of what one caller gets, events for each tenth, uploads and removals beside."""
    users, found, stop = world.dataset.users.ids.tolist(), {}, threading.Event()
    with subprocess_server(world.registry, tmp_path / "s.sqlite") as (process, address):
        load = Load(address, users, world.now_ms, deadline_s=5.0)
        pace = load.closed(callers=4, seconds=10).per_s * 0.5

        def write() -> None:
            number, last = 0, world.tables["videos"].slice(0, 20).to_pylist()
            with FeedClient(address, timeout_s=20) as client:
                while not stop.wait(10 / pace):
                    number += 1
                    user = users[number % len(users)]
                    event = Event(
                        request_id=f"soak{number % 50}", slot=0, user_id=user, video_id=number % 50 + 1, ts_ms=0
                    )
                    client.log_events([replace(event, user_id=number % 50)])
                    row = last[number % 20]
                    client.upsert_videos([Video(video_id=row["video_id"], author_id=row["author_id"])])
                    if number % 7 == 0:
                        client.remove_videos([row["video_id"]])

        writing = threading.Thread(target=write)
        writing.start()
        watched = Watched(process.pid, 2.0)
        watched.start()
        try:
            found = load.open(pace, SOAK_MINUTES * 60)
        finally:
            stop.set()
            writing.join()
        at_s, readings = watched.end()
    warm = len(at_s) // 3
    slope_per_10_min = float(np.polyfit(at_s[warm:], readings[warm:, 0], 1)[0]) * 600
    figures = {
        "minutes": SOAK_MINUTES,
        "asked_per_s": round(pace, 1),
        "answers": len(found.codes),
        "failed": len(found.codes) - found.codes.count("OK"),
        "memory_mib": [round(float(readings[i, 0]), 1) for i in (warm, -1)],
        "memory_mib_per_10_min": round(slope_per_10_min, 2),
        "open_files": [int(readings[warm:, 1].min()), int(readings[warm:, 1].max())],
        "threads": [int(readings[warm:, 2].min()), int(readings[warm:, 2].max())],
        "p50_ms": quantile(found.of("OK"), 0.5),
        "p99_ms": quantile(found.of("OK"), 0.99),
    }
    keep("soak", figures)
    assert set(found.codes) == {"OK"}
    assert set(found.items) == {10}
    for column in (1, 2):
        assert readings[-1, column] <= readings[warm, column] + 4
