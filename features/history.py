"""Point-in-time histories: the last L videos of a user before an instant, with what the user did.

M events in the log, B queries, L history length. A window never contains an event at or after its instant, so that
deleting the future changes no feature; undated events come before every dated one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from features.arrays import Allocate, in_memory, shards
from features.entities import mapped
from features.schema import SIGNALS

UNDATED_TS_MS = -(2**62)
"""Time of an event that is known to precede the log; its gap to any request is unknown (bucket 0)."""

GAP_BUCKETS = 24
"""Gap buckets: 0 unknown or padding, then log2 of seconds, capped at 2^22 s (48 days)."""

SHARD_EVENTS = 1 << 19
"""Events that are sorted together when a log is built: what they need lies in the last cache or near it."""


@dataclass(frozen=True, slots=True)
class HistoryWindow:
    """B windows, oldest first; positions at and beyond `length` are padding (video row 0)."""

    video_row_BL: np.ndarray
    """(B, L) int64 rows of `Entities`."""
    signals_BL: np.ndarray
    """(B, L) uint8, bit s set where signal s of SIGNALS was given."""
    watch_fraction_BL: np.ndarray
    """(B, L) float32 watch time over duration, clipped to 0 .. 2; 0 where not logged."""
    ts_ms_BL: np.ndarray
    """(B, L) int64."""
    length_B: np.ndarray
    """(B,) int64."""

    def gap_bucket(self, now_ms_B: np.ndarray) -> np.ndarray:
        """Time from each event to the request (B, L) int64, as log2 buckets of seconds."""
        return gap_bucket(np.asarray(now_ms_B)[:, None], self.ts_ms_BL, self.mask_BL)

    def last(self, length: int) -> HistoryWindow:
        """The same windows cut to their last `length` events."""
        if length == self.video_row_BL.shape[1]:
            return self
        kept_B = np.minimum(self.length_B, length)
        at_BL = (self.length_B - kept_B)[:, None] + np.arange(length)[None, :]
        mask_BL = np.arange(length)[None, :] < kept_B[:, None]
        at_BL = np.where(mask_BL, at_BL, 0)
        cut = {"length_B": kept_B}
        for field in fields(self):
            if field.name not in cut:
                empty = UNDATED_TS_MS if field.name == "ts_ms_BL" else 0
                values_BP = getattr(self, field.name)
                taken_BL = np.take_along_axis(values_BP, at_BL, axis=1) if values_BP.shape[1] else at_BL
                cut[field.name] = np.where(mask_BL, taken_BL, empty).astype(values_BP.dtype)
        return HistoryWindow(**cut)

    @property
    def mask_BL(self) -> np.ndarray:
        """(B, L) bool, True where there is an event."""
        return np.arange(self.video_row_BL.shape[1])[None, :] < self.length_B[:, None]


def _by_user_and_time(
    at_N: np.ndarray, user_N: np.ndarray, ts_N: np.ndarray, n_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """`at_N` by user, then time, then as it came, and where another user or instant begins. Logs come in order of time,
    or nearly: then the sort by time is a look, and the one by users of 16 bits is a radix sort."""
    if (ts_N[1:] < ts_N[:-1]).any():
        by_time = np.argsort(ts_N, kind="stable")
        at_N, user_N, ts_N = at_N[by_time], user_N[by_time], ts_N[by_time]
    by_user = np.argsort(user_N.astype(np.uint16) if n_users <= 2**16 else user_N, kind="stable")
    at_N, user_N, ts_N = at_N[by_user], user_N[by_user], ts_N[by_user]
    fresh_N = np.ones(len(at_N), bool)
    fresh_N[1:] = (ts_N[1:] != ts_N[:-1]) | (user_N[1:] != user_N[:-1])
    return at_N, fresh_N


def gap_bucket(later_ms: np.ndarray, earlier_ms: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Log2 buckets of the seconds between two times; 0 where `mask` is False or the earlier time is undated."""
    known = mask & (earlier_ms != UNDATED_TS_MS)
    gap_s = np.where(known, later_ms - np.where(known, earlier_ms, 0), 0) / 1000.0
    _, exponent = np.frexp(np.maximum(gap_s, 1.0))  # 2^(exponent-1) <= gap < 2^exponent: 1 + floor(log2(gap))
    return np.where(known, np.minimum(exponent, GAP_BUCKETS - 1), 0).astype(np.int64)


def signal_bits(signals_NS: np.ndarray) -> np.ndarray:
    """Signals (N, S) in SIGNALS' order, 0, 1 or NaN for not logged -> bit masks (N,) uint8."""
    return np.packbits(signals_NS > 0, axis=1, bitorder="little")[:, 0]


def unpack_signals(bits: np.ndarray) -> np.ndarray:
    """Bit masks (...,) uint8 -> float32 (..., S)."""
    return np.take(_UNPACKED, bits, axis=0)


_UNPACKED = ((np.arange(256)[:, None] >> np.arange(len(SIGNALS))) & 1).astype(np.float32)
"""Every bit mask unpacked: looking it up is several times faster than shifting each event's."""


def watch_fraction(watch_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """Share of the video that was watched, clipped to 0 .. 2; 0 where either is missing (NaN or no duration)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.asarray(watch_ms, dtype=np.float64) / np.asarray(duration_ms, dtype=np.float64)
    return np.clip(np.where(np.isfinite(fraction), fraction, 0.0), 0.0, 2.0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class HistoryLog:
    """All events by user, then time. User row u owns positions user_start[u] .. user_start[u+1]-1."""

    user_start: np.ndarray
    """(n_users + 2,) int64; row 0 (the unknown user) is empty."""
    video_row: np.ndarray
    signals: np.ndarray
    watch_fraction: np.ndarray
    ts_ms: np.ndarray

    @classmethod
    def build(
        cls,
        *,
        n_users: int,
        user_row: np.ndarray,
        video_row: np.ndarray,
        ts_ms: np.ndarray,
        signals: np.ndarray,
        watch_fraction: np.ndarray,
        allocate: Allocate = in_memory,
        workers: int = 1,
    ) -> tuple[HistoryLog, np.ndarray]:
        """Sort M events by (user, time, input order); events of the unknown user (row 0) are left out. Also, for each
        event (M,) int64 what `ends_at` says at its instant: in the order of the log it is where its run of equal times
        begins, so that nothing is searched for. 0 for the unknown user.

        Users are taken in shards, side by side; each has its own range of the log, whatever the number of workers.
        """
        counts = np.bincount(user_row, minlength=n_users + 1)
        counts[0] = 0
        user_start = allocate("history_user_start", (n_users + 2,), np.int64)
        user_start[0], user_start[1:] = 0, np.cumsum(counts)
        size = int(user_start[-1])
        log = cls(
            user_start=user_start,
            video_row=allocate("history_video_row", (size,), np.int64),
            signals=allocate("history_signals", (size,), np.uint8),
            watch_fraction=allocate("history_watch_fraction", (size,), np.float32),
            ts_ms=allocate("history_ts_ms", (size,), np.int64),
        )
        ends_M = np.zeros(len(user_row), np.int64)
        ranges = shards(user_start[1:], SHARD_EVENTS)
        shard_of = np.repeat(np.arange(len(ranges), dtype=np.uint16), [last - first for first, last in ranges])
        shard_M = shard_of[user_row]
        by_shard = np.argsort(shard_M, kind="stable")  # a radix sort, as the numbers have 16 bits
        shard_end = np.cumsum(np.bincount(shard_M, minlength=len(ranges)))

        def fill(number: int) -> None:
            (first, last), begin = ranges[number], shard_end[number - 1] if number else 0
            at_N = by_shard[begin : shard_end[number]]
            at_N = at_N if first else at_N[user_row[at_N] > 0]
            at_N, fresh_N = _by_user_and_time(at_N, user_row[at_N] - first, ts_ms[at_N], last - first)
            base = int(user_start[first])
            ends_M[at_N] = base + np.maximum.accumulate(np.where(fresh_N, np.arange(len(at_N)), 0))
            for field, values_M in (
                (log.video_row, video_row),
                (log.signals, signals),
                (log.watch_fraction, watch_fraction),
                (log.ts_ms, ts_ms),
            ):
                field[base : base + len(at_N)] = values_M[at_N]

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(ranges))))
        return log, ends_M

    def ends_at(self, user_row_B: np.ndarray, ts_ms_B: np.ndarray) -> np.ndarray:
        """Position one past the user's last event strictly before the instant (B,) int64.

        One merge sort of queries and events: O((M + B) log(M + B)) for all queries together.
        """
        n_events, n_queries = len(self.ts_ms), len(user_row_B)
        owner = np.repeat(np.arange(len(self.user_start) - 1), np.diff(self.user_start))
        is_event = np.concatenate([np.ones(n_events, np.int8), np.zeros(n_queries, np.int8)])
        order = np.lexsort(
            (is_event, np.concatenate([self.ts_ms, ts_ms_B]), np.concatenate([owner, np.asarray(user_row_B)]))
        )
        events_before = np.cumsum(is_event[order])
        ends = np.empty(n_events + n_queries, dtype=np.int64)
        ends[order] = events_before
        return np.where(np.asarray(user_row_B) > 0, ends[n_events:], 0)

    def windows(self, user_row_B: np.ndarray, ends_B: np.ndarray, length: int) -> HistoryWindow:
        """The last `length` events before each end."""
        starts_B = np.maximum(self.user_start[user_row_B], ends_B - length)
        starts_B = np.minimum(starts_B, ends_B)
        at_BL = starts_B[:, None] + np.arange(length)[None, :]
        mask_BL = at_BL < ends_B[:, None]
        at_BL = np.where(mask_BL, at_BL, 0)
        if len(self.ts_ms) == 0:
            return empty_window(len(ends_B), length)
        return HistoryWindow(
            video_row_BL=np.where(mask_BL, self.video_row[at_BL], 0),
            signals_BL=np.where(mask_BL, self.signals[at_BL], 0).astype(np.uint8),
            watch_fraction_BL=np.where(mask_BL, self.watch_fraction[at_BL], 0).astype(np.float32),
            ts_ms_BL=np.where(mask_BL, self.ts_ms[at_BL], UNDATED_TS_MS),
            length_B=(ends_B - starts_B).astype(np.int64),
        )

    def save(self, folder: Path) -> None:
        """Write `history_FIELD.npy` for each field into an existing folder."""
        for field in fields(self):
            np.save(folder / f"history_{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> HistoryLog:
        """Memory-map what `save` wrote."""
        return cls(**{f.name: mapped(folder / f"history_{f.name}.npy") for f in fields(cls)})


def empty_window(n: int, length: int) -> HistoryWindow:
    """Windows of users without history."""
    return HistoryWindow(
        video_row_BL=np.zeros((n, length), np.int64),
        signals_BL=np.zeros((n, length), np.uint8),
        watch_fraction_BL=np.zeros((n, length), np.float32),
        ts_ms_BL=np.full((n, length), UNDATED_TS_MS, np.int64),
        length_B=np.zeros(n, np.int64),
    )
