"""A built index as one part of the live index: rows know their 64-bit video ids, and removed rows lose their bit.

Q queries, K results, D width, V rows (row 0 unused), M ids or rows of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from candidate_gen.delta import NO_VIDEO, Found, permitted
from candidate_gen.index import VideoIndex

STEP = 1 << 20
"""Ids are checked in pieces of so many."""


@dataclass(frozen=True, slots=True)
class Part:
    """An index, the ids of its rows, and which of them are still what they were."""

    index: VideoIndex
    ids_V: np.ndarray
    alive_bits: np.ndarray
    """Bit r & 7 of byte r >> 3; cleared in place, one byte at a time, under readers' eyes."""
    base_rows_V: np.ndarray | None
    """Row of the same video in the base, 0 for a new one; None where this part is the base."""

    @classmethod
    def of(cls, index: VideoIndex, ids_V: np.ndarray, base_rows_V: np.ndarray | None) -> Part:
        """All rows alive. Raises ValueError unless ids ascend from row 1."""
        pieces = (ids_V[start : start + STEP + 1] for start in range(1, len(ids_V), STEP))
        ascending = all((piece[1:] > piece[:-1]).all() for piece in pieces)  # a difference could overflow
        if ids_V.dtype != np.int64 or not ascending or (ids_V[1:2] == NO_VIDEO).any():
            raise ValueError(
                f"ids by row are {ids_V.dtype} {ids_V.shape}: expected int64, ascending from row 1, above {NO_VIDEO}"
            )
        return cls(index, ids_V, np.full(-(-len(ids_V) // 8), 255, np.uint8), base_rows_V)

    def rows_of(self, ids_M: np.ndarray) -> np.ndarray:
        """Rows of ids, 0 for an id that is not here."""
        at = np.searchsorted(self.ids_V[1:], ids_M) + 1
        at[at == len(self.ids_V)] = 0
        return np.where((at > 0) & (self.ids_V[at] == ids_M), at, 0)

    def alive(self) -> np.ndarray:
        """(V,) bool; row 0 is not."""
        alive_V = np.unpackbits(self.alive_bits, count=len(self.ids_V), bitorder="little").astype(bool)
        alive_V[0] = False
        return alive_V

    def retire(self, rows_M: np.ndarray) -> np.ndarray:
        """Clear the bits of rows (0 is passed over); returns those that had one."""
        rows_M = np.unique(rows_M[rows_M > 0])
        mask = (1 << (rows_M & 7)).astype(np.uint8)
        rows_M, mask = (array[(self.alive_bits[rows_M >> 3] & mask) > 0] for array in (rows_M, mask))
        np.bitwise_and.at(self.alive_bits, rows_M >> 3, ~mask)
        return rows_M

    def search(
        self, query_QD: np.ndarray, k: int, *, allowed_bits: np.ndarray | None, excluded_rows: np.ndarray
    ) -> Found:
        """Best k alive rows; `allowed_bits` is by row of the base, `excluded_rows` by row of this part."""
        bits = self.alive_bits
        if allowed_bits is not None:
            by_base = self.base_rows_V
            bits = bits & (
                allowed_bits if by_base is None else np.packbits(permitted(by_base, allowed_bits), bitorder="little")
            )
        rows_QK, scores_QK = self.index.search(query_QD, k, allowed=bits, excluded_rows=excluded_rows)
        ids_QK = np.where(rows_QK > 0, self.ids_V[np.maximum(rows_QK, 0)], NO_VIDEO)
        return ids_QK, scores_QK
