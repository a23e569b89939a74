"""Which row an id has, for millions of ids at a time. N questions."""

from __future__ import annotations

import numpy as np


class RowIndex:
    """Rows of ids among distinct ones that ascend, 0 for an id that is not there.

    A table of one look instead of the many of a binary search, which miss the cache. Most ids have a place of it to
    themselves; those that lost theirs to another are searched for.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = np.append(ids, np.int64(0))  # something to look at where a place is nobody's
        self._bits = max(int(len(ids) * TABLE_FACTOR).bit_length(), 1)
        self._place_of = np.full(1 << self._bits, len(ids), np.int32 if len(ids) < 2**31 else np.int64)
        self._place_of[self._hash(ids)] = np.arange(len(ids))

    def rows(self, ids_N: np.ndarray) -> np.ndarray:
        """(N,) int64."""
        place_N = self._place_of[self._hash(ids_N)].astype(np.int64)
        size = len(self._ids) - 1
        lost = np.flatnonzero((self._ids[place_N] != ids_N) & (place_N != size))  # a place that is nobody's says no
        found = np.searchsorted(self._ids[:size], ids_N[lost])
        place_N[lost] = np.where(self._ids[found] == ids_N[lost], found, -1) if size else -1
        place_N[place_N == size] = -1
        return place_N + 1

    def _hash(self, ids_N: np.ndarray) -> np.ndarray:
        mixed_N = np.asarray(ids_N, np.int64).view(np.uint64) * _ODD
        return (mixed_N >> np.uint64(64 - self._bits)).view(np.int64)


TABLE_FACTOR = 4
"""Places of a `RowIndex` an id: an eighth of the ids share theirs."""
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it spread over the table (Knuth)."""
