"""Frequencies: a day's share is its count; the stream's estimate finds the truth, follows changes, sees no future."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from candidate_gen.frequency import RATE, DayShare, StreamingShare

DAY_MS = 86_400_000
VIDEOS = 20


@pytest.fixture(scope="module")
def drifting() -> Any:
    """20,000 positives of 20 videos over two days, shuffled; on the second day the shares are reversed."""
    rng = np.random.default_rng(2)
    share = rng.dirichlet(np.full(VIDEOS, 3.0))
    ts_ms = np.sort(rng.integers(0, 2 * DAY_MS, 20_000))
    first = ts_ms < DAY_MS
    row = 1 + np.where(first, rng.choice(VIDEOS, 20_000, p=share), rng.choice(VIDEOS, 20_000, p=share[::-1]))
    shuffled = rng.permutation(20_000)
    return SimpleNamespace(row=row[shuffled], ts_ms=ts_ms[shuffled], share=share)


def test_a_days_share_is_the_share_of_that_days_positives(drifting) -> None:
    d = drifting
    day = DayShare.of(d.row, d.ts_ms // DAY_MS, d.ts_ms, VIDEOS + 1)
    for wanted in (0, 1):
        of_day = d.row[d.ts_ms // DAY_MS == wanted]
        expected = [(of_day == row).mean() for row in range(VIDEOS + 1)]
        rows = np.arange(VIDEOS + 1)
        found = day.share(rows, np.full(len(rows), wanted), np.full(len(rows), wanted * DAY_MS))
        assert np.allclose(found, expected)


def test_the_streams_average_gap_is_the_recursion_of_its_paper() -> None:
    # Video 3 at places 0, 2 and 5 of the stream, video 7 elsewhere: gaps unknown (20, the videos), 2, 3.
    row, ts_ms = np.array([3, 7, 3, 7, 7, 3]), np.arange(6) * 1000
    stream = StreamingShare.of(row, ts_ms * 0, ts_ms, VIDEOS)
    after_two = (1 - RATE) * 20 + RATE * 2
    after_three = (1 - RATE) * after_two + RATE * 3
    asked_ms = np.array([0, 1999, 2000, 5000, 9000, 5000])
    rows = np.array([3, 3, 3, 3, 3, 4])
    found = stream.share(rows, np.zeros(6, np.int64), asked_ms)
    assert np.allclose(found, [1 / 20, 1 / 20, 1 / after_two, 1 / after_three, 1 / after_three, 0.0])
    assert stream.share(np.array([3]), np.zeros(1, np.int64), np.array([-5]))[0] == 0.0


def test_the_streams_share_comes_near_the_truth_and_follows_when_it_changes(drifting) -> None:
    d, rows = drifting, np.arange(1, VIDEOS + 1)
    stream = StreamingShare.of(d.row, d.ts_ms * 0, d.ts_ms, VIDEOS + 1)
    for day, truth in ((0, d.share), (1, d.share[::-1])):
        instants = np.linspace((day + 0.5) * DAY_MS, (day + 1) * DAY_MS - 1, 50).astype(np.int64)
        found = np.mean([stream.share(rows, rows * 0, np.full(VIDEOS, ms)) for ms in instants], axis=0)
        assert np.median(np.abs(found / truth - 1)) < 0.25
        assert np.corrcoef(np.log(found), np.log(truth))[0, 1] > 0.95


def test_deleting_the_future_changes_no_streamed_share(drifting) -> None:
    d, now_ms = drifting, DAY_MS + DAY_MS // 3
    rows = np.arange(1, VIDEOS + 1)
    asked = (rows, rows * 0, np.full(VIDEOS, now_ms))
    whole = StreamingShare.of(d.row, d.ts_ms * 0, d.ts_ms, VIDEOS + 1)
    past = d.ts_ms <= now_ms
    past = StreamingShare.of(d.row[past], d.ts_ms[past] * 0, d.ts_ms[past], VIDEOS + 1)
    assert np.array_equal(whole.share(*asked), past.share(*asked))
