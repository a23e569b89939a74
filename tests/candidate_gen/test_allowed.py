"""Allowed rows: at any instant, and with any lists left out, exactly what a bitmap made for the request would hold."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from candidate_gen.allowed import HOUR_MS, Allowed, Eligibility
from candidate_gen.uploads import Uploads

V, NOW_MS = 1_001, 1_700_000_000_000


def world(seed: int) -> tuple[np.ndarray, np.ndarray, Uploads]:
    """(eligible, upload times, uploads): hours around now, one in ten unknown, many of the same minute."""
    rng = np.random.default_rng(seed)
    upload_ms = NOW_MS + rng.integers(-100, 10, V) * HOUR_MS + rng.integers(0, 3, V) * 60_000
    upload_ms[rng.random(V) < 0.1] = -1
    eligible = rng.random(V) < 0.8
    eligible[0] = False
    return eligible, upload_ms, Uploads.build(rng.integers(0, 20, V), upload_ms, eligible)


@pytest.mark.parametrize("max_age_h", [None, 0.0, 30.0, 1e6])
def test_allowed_rows_and_counts_are_those_of_a_bitmap_made_for_the_request(max_age_h: float | None) -> None:
    eligible, upload_ms, uploads = world(1)
    eligibility, rng = Eligibility(eligible, uploads, max_age_h), np.random.default_rng(2)
    for _ in range(300):
        now_ms = NOW_MS + int(rng.integers(-120 * HOUR_MS, 12 * HOUR_MS))
        lists = [np.unique(rng.integers(1, V, size)) for size in rng.choice([0, 3, 400], 3)]
        future = eligible & (upload_ms > now_ms)
        old = eligible & ~future & (upload_ms >= 0)
        old &= False if max_age_h is None else upload_ms < now_ms - max_age_h * HOUR_MS
        expected, taken = eligible & ~future & ~old, []
        for rows in lists:
            taken.append(int(expected[rows].sum()))
            expected[rows] = False
        shared = eligibility.at(now_ms)
        allowed, counts = shared.without(*lists)
        assert np.array_equal(allowed.has(np.arange(V)), expected)
        assert (shared.not_yet_uploaded, shared.too_old) == (future.sum(), old.sum())
        assert counts == taken
        assert allowed.count == expected.sum()
        unpacked = np.unpackbits(allowed.bits, bitorder="little", count=V).astype(bool)
        unpacked[allowed.excluded_rows] = False
        assert np.array_equal(unpacked, expected)  # what an index that scans the bitmap would return


def test_requests_of_the_same_minutes_share_one_bitmap_that_nobody_changes() -> None:
    eligible, _, uploads = world(3)
    eligibility = Eligibility(eligible, uploads, 30.0)
    first = eligibility.at(NOW_MS)
    before = first.bits.copy()
    for minutes in range(0, 3_000, 7):
        eligibility.at(NOW_MS - minutes * 60_000)
    assert np.array_equal(first.bits, before)
    assert eligibility.at(NOW_MS).bits is eligibility.at(NOW_MS + 1).bits


def test_threads_that_ask_about_many_instants_get_what_one_thread_gets() -> None:
    eligible, _, uploads = world(4)
    alone, together = (Eligibility(eligible, uploads, 20.0) for _ in range(2))
    instants = NOW_MS - np.random.default_rng(5).integers(0, 100 * HOUR_MS, 200)
    expected = {int(now): alone.at(int(now)).without()[0].has(np.arange(V)) for now in instants}
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for now in np.random.default_rng(seed).permutation(instants).tolist():
            if not np.array_equal(together.at(now).without()[0].has(np.arange(V)), expected[now]):
                wrong.append(now)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bool_a_row_becomes_the_same_rows() -> None:
    for size in (1, 8, 9, 64, 1_001):
        mask = np.random.default_rng(size).random(size) < 0.5
        allowed = Allowed.of(mask)
        assert np.array_equal(allowed.has(np.arange(size)), mask)
        assert allowed.count == mask.sum()
