"""Searches of many threads, combined: each caller gets what a search of its own gives."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candidate_gen.index import VideoIndex
from candidate_gen.together import SearchTogether

sys.path.insert(0, str(Path(__file__).parent))
from live_truth import BASE, IDS_V, opened, unit
from live_truth import DIM as LIVE_DIM
from test_video_index import CONFIGS, VECTORS, N, chunks

THREADS, SEARCHES = 16, 600


def unlike_alone(
    index: Any, vectors: np.ndarray, n_rows: int, row_of: Callable[[np.ndarray], np.ndarray]
) -> list[tuple[int, str]]:
    """Random queries, filters, sizes and exclusions from many threads, each held against a search of its own: the
    searches that differ, and in what."""
    rng = np.random.default_rng()
    masks = [rng.random(n_rows) < share for share in (1.0, 0.5, 0.02)]
    filters = [index.allow(mask) for mask in masks]
    together = SearchTogether(index)

    def ask(number: int) -> list[tuple[int, str]]:
        own = np.random.default_rng(number)
        which, k = own.integers(3), int(own.choice([3, 40]))
        excluded = own.integers(1, n_rows, own.integers(0, 60))
        query_D = vectors[own.integers(1, len(vectors))]
        found, score = together(query_D, k, filters[which], excluded_rows=excluded)
        alone = index.search(query_D[None], k, allowed=filters[which], excluded_rows=excluded)[1][0]
        found = found[np.isfinite(score)]
        rows = row_of(found)
        holds = {
            "scores": (score >= alone - 1e-5).all(),
            "none twice": len(found) == len(set(found)),
            "none excluded": not np.isin(rows[rows > 0], excluded).any(),
            "all allowed": masks[which][rows[rows > 0]].all(),
        }
        return [(number, name) for name, held in holds.items() if not held]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(ask, number) for number in range(SEARCHES)]
            return [wrong for future in futures for wrong in future.result(60)]
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_combined_searches_of_an_index_are_as_alone(name: str, tmp_path: Path) -> None:
    index = VideoIndex.build(chunks(), N + 1, CONFIGS[name], tmp_path)
    assert unlike_alone(index, VECTORS, N + 1, lambda rows: rows) == []


def test_combined_searches_of_a_live_index_are_as_alone(tmp_path: Path) -> None:
    live = opened(tmp_path)
    fresh = unit(np.random.default_rng().normal(size=(500, LIVE_DIM)))
    live.upsert(np.arange(2**40, 2**40 + 500), fresh)
    live.remove(np.arange(2**40, 2**40 + 500, 7))

    def base_row(ids: np.ndarray) -> np.ndarray:
        return np.where(np.isin(ids, IDS_V), np.searchsorted(IDS_V[1:], ids) + 1, 0)

    assert unlike_alone(live, fresh, BASE + 1, base_row) == []


def test_a_scan_is_combined_and_inverted_lists_are_not(tmp_path: Path) -> None:
    flat = VideoIndex.build(chunks(), N + 1, CONFIGS["flat"], tmp_path / "flat")
    lists = VideoIndex.build(chunks(), N + 1, CONFIGS["ivf"], tmp_path / "ivf")
    few = np.arange(N + 1) % 200 == 1
    assert flat.shares_work(flat.everything, 10)
    assert not lists.shares_work(lists.everything, 10)
    assert lists.shares_work(lists.allow(few), 10)


def test_searches_that_meet_are_one_search(tmp_path: Path) -> None:
    asked: list[int] = []
    entered, go_on = threading.Semaphore(0), threading.Event()

    class Watched(VideoIndex):
        def search(self, query_QD: np.ndarray, k: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
            asked.append(len(query_QD))
            entered.release()
            assert go_on.wait(60)
            return super().search(query_QD, k, **options)

    VideoIndex.build(chunks(), N + 1, CONFIGS["flat"], tmp_path)
    index = Watched(tmp_path)
    index.slots = 1
    together = SearchTogether(index)
    filters = [index.everything, index.allow(np.arange(N + 1) % 2 == 1)]

    def ask(number: int) -> np.ndarray:
        return together(VECTORS[number], 5, filters[number % 2], excluded_rows=np.array([number]))[0]

    with ThreadPoolExecutor(64) as pool:
        first = pool.submit(ask, 1)
        assert entered.acquire(timeout=60)  # the slot is taken
        later = [pool.submit(ask, number) for number in range(101, 121)]
        while len(together._combined._waiting) < len(later):
            time.sleep(0.001)
        go_on.set()
        found = [future.result(60) for future in (first, *later)]
    assert asked == [1, 10, 10]
    for number, rows in zip([1, *range(101, 121)], found, strict=True):
        options = {"allowed": filters[number % 2], "excluded_rows": np.array([number])}
        assert np.array_equal(rows, VideoIndex(tmp_path).search(VECTORS[number : number + 1], 5, **options)[0][0])
