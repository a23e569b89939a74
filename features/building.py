"""The passes over all impressions that make a dataset: undated rows, histories and counters, follows.

U undated and E dated impressions, M = U + E in this order. Threads share the work: numpy lets go of the interpreter in
everything here that takes long.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from features.arrays import Allocate, in_memory
from features.counters import BEFORE, DailyCounters, count_days
from features.entities import Entities
from features.examples import Examples, Seen, integers, signals_of
from features.follows import Follows
from features.history import UNDATED_TS_MS, HistoryLog, signal_bits
from features.lookup import RowIndex

BLOCK = 1 << 18
"""Impressions that are asked about follows at a time."""


def undated_examples(undated: pa.Table | None, user_ids: np.ndarray, video_ids: np.ndarray) -> Examples:
    """By user and position, `history_end` not yet known; of unknown users too."""
    if undated is None:
        return Examples.allocate(in_memory, "undated", 0)
    rows = undated.sort_by([("user_id", "ascending"), ("position", "ascending")])
    size = len(rows)
    nothing, zeros = np.full(size, np.nan, np.float32), np.zeros(size, np.int64)
    return Examples(
        user_row=RowIndex(user_ids).rows(integers(rows, "user_id")),
        video_row=RowIndex(video_ids).rows(integers(rows, "video_id")),
        ts_ms=zeros + UNDATED_TS_MS,
        day=zeros + BEFORE,
        history_end=zeros.copy(),
        surface=zeros,
        slot=zeros,
        signals=signals_of(rows),
        watch_ms=nothing,
        duration_ms=nothing,
        followed=zeros.astype(bool),
    )


def histories_and_counters(
    past: Examples,
    examples: Examples,
    seen: Seen,
    *,
    users: Entities,
    videos: Entities,
    n_days: int,
    author_feature: str,
    tag_feature: str,
    allocate: Allocate,
    workers: int,
) -> tuple[HistoryLog, DailyCounters]:
    """The log of all events and the daily counters; fills `history_end` of both kinds of impressions."""
    user_row, video_row = _joined(past.user_row, examples.user_row), _joined(past.video_row, examples.video_row)
    with ThreadPoolExecutor(1) as beside:
        counting = beside.submit(
            count_days,
            users=users,
            videos=videos,
            author_feature=author_feature,
            tag_feature=tag_feature,
            n_days=n_days,
            day_N=_joined(past.day, examples.day),
            user_row_N=user_row,
            video_row_N=video_row,
            signals_NS=_joined(past.signals, examples.signals),
            allocate=allocate,
        )
        if workers == 1:
            counting.result()
        history, ends_M = HistoryLog.build(
            n_users=len(users),
            user_row=user_row,
            video_row=video_row,
            ts_ms=_joined(past.ts_ms, examples.ts_ms),
            signals=_joined(signal_bits(past.signals), seen.bits),
            watch_fraction=_joined(np.zeros(len(past), np.float32), seen.watch_fraction),
            allocate=allocate,
            workers=workers,
        )
        counters = counting.result()
    # All undated events of a user are at one "time", and each sees those before it.
    past.history_end[:] = history.user_start[past.user_row] + _places(past.user_row)
    examples.history_end[:] = ends_M[len(past) :]
    return history, counters


def fill_followed(examples: Examples, follows: Follows, author_id: np.ndarray, workers: int) -> None:
    """Whether each impression's user followed the author before it. `author_id` (videos + 1,) by video row."""
    ask = follows.asker(author_id)

    def fill(begin: int) -> None:
        at = slice(begin, begin + BLOCK)
        examples.followed[at] = ask(examples.user_row[at], examples.video_row[at], examples.ts_ms[at])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, range(0, len(examples), BLOCK)))


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Without a copy where nothing precedes the log."""
    return np.concatenate([first, second]) if len(first) else second


def _places(owner_N: np.ndarray) -> np.ndarray:
    """Running number of each row among its owner's; rows of one owner stand together."""
    first_N = np.flatnonzero(np.concatenate([[True], owner_N[1:] != owner_N[:-1]])[: len(owner_N)])
    return np.arange(len(owner_N)) - np.repeat(first_N, np.diff(np.append(first_N, len(owner_N))))
