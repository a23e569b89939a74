"""Opaque 64-bit ids for the rows of the world, and the way back.

Most ids lie above 2**62 and one in eight between 2**31 and 2**42, so that any cast to int32 or float64 shows.
"""

from __future__ import annotations

import numpy as np

_ODD = np.uint64(0x9E3779B97F4A7C15)


def opaque_ids(n: int, seed: int, start: int = 0) -> np.ndarray:
    """The ids of rows start to start + n: distinct positive int64, the same for the same seed."""
    row_N = np.arange(start, start + n, dtype=np.uint64)
    wide_N = _mix(row_N, 62, seed) | np.uint64(1 << 62)
    narrow_N = _mix(row_N, 41, seed) + np.uint64(1 << 31)
    return np.where(row_N % np.uint64(8) == 7, narrow_N, wide_N).astype(np.int64)


def _mix(value_N: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """A bijection of [0, 2**bits): odd multiplications, additions and right xor-shifts, each invertible."""
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits // 2)
    mixed_N = value_N & mask
    for turn in range(3):
        step = np.uint64((seed * 0xD1342543DE82EF95 + turn * 0x2545F4914F6CDD1D) & 0xFFFFFFFFFFFFFFFF)
        mixed_N = ((mixed_N + step) * _ODD) & mask
        mixed_N = mixed_N ^ (mixed_N >> shift)
    return mixed_N


class IdIndex:
    """From ids to row numbers."""

    def __init__(self, ids_N: np.ndarray, what: str) -> None:
        self._order = np.argsort(ids_N)
        self._sorted = ids_N[self._order]
        self._what = what

    def rows(self, ids_B: np.ndarray) -> np.ndarray:
        ids_B = np.asarray(ids_B, dtype=np.int64)
        place_B = np.minimum(np.searchsorted(self._sorted, ids_B), len(self._sorted) - 1)
        unknown_B = self._sorted[place_B] != ids_B
        if unknown_B.any():
            raise KeyError(
                f"{int(unknown_B.sum())} {self._what} are not of this world, the first is {ids_B[unknown_B][0]}: "
                "build World from the config in the dataset's world.json"
            )
        return self._order[place_B]
