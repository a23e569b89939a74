"""Which videos a request may be shown, without touching anything of the catalogue's size for each request.

What is the same for everybody (eligible, already uploaded, not too old) is one bitmap that requests share; what is one
request's own (seen, excluded, blocked) is a short list of rows. V video rows, bit r & 7 of byte r >> 3 is row r.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from candidate_gen.uploads import Uploads

HOUR_MS = 3_600_000
SHARED_MS = 600_000
"""Requests of the same ten minutes share a bitmap; the few videos that come or go meanwhile are listed."""
_KEPT = 4
"""Bitmaps kept: the present ten minutes', and those of requests about the past."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows whose bit is set, less those listed."""

    bits: np.ndarray
    """(ceil(V / 8),) uint8, shared: never written to."""
    excluded_rows: np.ndarray
    """int64, ascending, distinct, all of them set in `bits`."""
    count: int
    """How many rows are allowed."""

    @classmethod
    def of(cls, allowed_V: np.ndarray) -> Allowed:
        """From a bool a row."""
        return cls(np.packbits(allowed_V, bitorder="little"), np.zeros(0, np.int64), int(np.sum(allowed_V)))

    def has(self, rows_N: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        allowed = are_set(self.bits, rows_N)
        if len(self.excluded_rows):
            at = np.minimum(np.searchsorted(self.excluded_rows, rows_N), len(self.excluded_rows) - 1)
            allowed &= self.excluded_rows[at] != rows_N
        return allowed


@dataclass(frozen=True, slots=True)
class Shared:
    """What everybody may be shown at an instant: a bitmap, less rows that it holds too early or too long."""

    bits: np.ndarray
    outside_rows: np.ndarray
    count: int
    """Rows allowed at the instant: the bits that are set, less `outside_rows`."""
    not_yet_uploaded: int
    too_old: int

    def without(self, *lists: np.ndarray) -> tuple[Allowed, list[int]]:
        """Leave further rows out; also how many each list took, where a row of two lists counts for the first."""
        rows = np.concatenate([self.outside_rows, *lists])
        list_of = np.repeat(np.arange(len(lists) + 1), [len(self.outside_rows), *(len(part) for part in lists)])
        distinct, first = np.unique(rows, return_index=True)
        held = are_set(self.bits, distinct)
        taken = np.bincount(list_of[first[held]], minlength=len(lists) + 1)[1:].tolist()
        return Allowed(self.bits, distinct[held], self.count - sum(taken)), taken


class Eligibility:
    """The shared bitmap at any instant; safe to ask from many threads."""

    def __init__(self, eligible_V: np.ndarray, uploads: Uploads, max_age_h: float | None) -> None:
        self._uploads = uploads
        self.max_age_ms = None if max_age_h is None else round(max_age_h * HOUR_MS)
        self.n_eligible = int(np.sum(eligible_V))
        """Whenever they are or were uploaded."""
        whole = (0, len(uploads.by_time))
        self._kept = [(whole, np.packbits(eligible_V, bitorder="little"))]
        self._lock = threading.Lock()

    def at(self, now_ms: int) -> Shared:
        """Eligible videos uploaded at or before the instant and not too old at it; of unknown time, never too old."""
        begin_ms = now_ms - now_ms % SHARED_MS
        first, last = self._range(now_ms, now_ms)
        held_first, held_last = self._range(begin_ms, begin_ms + SHARED_MS - 1)
        by_time = self._uploads.by_time
        future = len(by_time) - last
        return Shared(
            bits=self._bits(held_first, held_last),
            outside_rows=np.concatenate([by_time[held_first:first], by_time[last:held_last]]),
            count=self.n_eligible - first - future,
            not_yet_uploaded=future,
            too_old=first,
        )

    def _range(self, oldest_at_ms: int, newest_at_ms: int) -> tuple[int, int]:
        """Places in `by_time` of what is young enough at the first instant and uploaded by the second."""
        last = self._uploads.before(newest_at_ms + 1)
        if self.max_age_ms is None:
            return 0, last
        return min(self._uploads.before(oldest_at_ms - self.max_age_ms), last), last

    def _bits(self, first: int, last: int) -> np.ndarray:
        """The bitmap with exactly first .. last-1 of `by_time` set, made from the nearest one that is kept."""
        with self._lock:
            for i, (held, bits) in enumerate(self._kept):
                if held == (first, last):
                    self._kept.append(self._kept.pop(i))
                    return bits
            (near_first, near_last), near = min(
                self._kept, key=lambda kept: abs(kept[0][0] - first) + abs(kept[0][1] - last)
            )
            bits, by_time = near.copy(), self._uploads.by_time
            for begin, end, on in (
                (near_first, min(first, near_last), False),
                (max(last, near_first), near_last, False),
                (first, min(near_first, last), True),
                (max(near_last, first), last, True),
            ):
                _switch(bits, by_time[begin:end], on)
            self._kept = [*self._kept, ((first, last), bits)][-_KEPT:]
            return bits


def are_set(bits: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each row's bit is set."""
    return (bits[rows_N >> 3] >> (rows_N & 7).astype(np.uint8)) & 1 == 1


def _switch(bits: np.ndarray, rows: np.ndarray, on: bool) -> None:
    """Set or clear distinct rows' bits in place."""
    masks = np.left_shift(1, rows & 7).astype(np.uint8)
    if on:
        np.bitwise_or.at(bits, rows >> 3, masks)
    else:
        np.bitwise_and.at(bits, rows >> 3, ~masks)
