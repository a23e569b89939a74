"""A built index as one part of the live index: rows know their 64-bit video ids, and removed rows lose their bit.

Q queries, K results, D width, V rows (row 0 unused), M ids or rows of a call.
"""

from __future__ import annotations

import numpy as np

from candidate_gen.bits import are_set, switch
from candidate_gen.delta import NO_VIDEO, Found, permitted
from candidate_gen.index import Excluded, RowFilter, VideoIndex

STEP = 1 << 20
"""Ids are checked in pieces of so many."""


class Filter:
    """A caller's choice among the base's rows, for as many searches as wanted: what is removed leaves it too."""

    def __init__(self, asked_bits: np.ndarray, base: Part) -> None:
        self.asked_bits = asked_bits
        """By row of the base; also for its videos that were upserted since."""
        self.allowed = base.index.allow(asked_bits & base.alive.bits)

    def retire(self, rows_M: np.ndarray) -> None:
        """Rows of the base that are no longer what they were."""
        self.allowed, _ = _without(self.allowed, rows_M)


class Part:
    """An index, the ids of its rows, and which of them are still what they were."""

    def __init__(self, index: VideoIndex, ids_V: np.ndarray, base_rows_V: np.ndarray | None = None) -> None:
        """All indexed rows alive. `base_rows_V`: row of the same video in the base, 0 for a new one; None where this
        part is the base. Raises ValueError unless ids ascend from row 1."""
        pieces = (ids_V[start : start + STEP + 1] for start in range(1, len(ids_V), STEP))
        ascending = all((piece[1:] > piece[:-1]).all() for piece in pieces)  # a difference could overflow
        if ids_V.shape != (index.n_rows,) or ids_V.dtype != np.int64 or not ascending or NO_VIDEO in ids_V[1:2]:
            raise ValueError(
                f"ids by row are {ids_V.dtype} {ids_V.shape}: expected int64 ({index.n_rows},), ascending from row 1, "
                f"above {NO_VIDEO}"
            )
        self.index, self.ids_V, self.base_rows_V = index, ids_V, base_rows_V
        self._knows_base = base_rows_V is not None and bool(base_rows_V.any())
        everything = index.everything
        self.alive = RowFilter(everything.bits.copy(), everything.count, everything=True)
        """Replaced by `retire`, which clears its bits in place, a byte at a time, under readers' eyes."""

    def __len__(self) -> int:
        """Videos alive."""
        return self.alive.count

    def remove(self, ids_M: np.ndarray) -> None:
        """Retire the rows of these ids; ids that are not here are passed over."""
        self.retire(self.rows_of(ids_M))

    def rows_of(self, ids_M: np.ndarray) -> np.ndarray:
        """Rows of ids, 0 for an id that is not here."""
        at = np.searchsorted(self.ids_V[1:], ids_M) + 1
        at[at == len(self.ids_V)] = 0
        return np.where((at > 0) & (self.ids_V[at] == ids_M), at, 0)

    def marks(self) -> np.ndarray:
        """(V,) bool: alive."""
        return np.unpackbits(self.alive.bits, count=len(self.ids_V), bitorder="little").astype(bool)

    def retire(self, rows_M: np.ndarray) -> np.ndarray:
        """Clear the bits of rows (0 is passed over); returns those that had one."""
        self.alive, had_M = _without(self.alive, rows_M)
        return had_M

    def search(self, query_QD: np.ndarray, k: int, *, only: Filter | None, excluded_rows: Excluded) -> Found:
        """Best k alive rows that pass; `excluded_rows` are rows of this part, for all queries or of each."""
        allowed = self.alive
        if only is not None and self.base_rows_V is None:
            allowed = only.allowed
        elif only is not None and self.base_rows_V is not None and self._knows_base:
            passing = np.packbits(permitted(self.base_rows_V, only.asked_bits), bitorder="little")
            allowed = self.index.allow(passing & allowed.bits)
        rows_QK, scores_QK = self.index.search(query_QD, k, allowed=allowed, excluded_rows=excluded_rows)
        return np.where(rows_QK > 0, self.ids_V[np.maximum(rows_QK, 0)], NO_VIDEO), scores_QK


def _without(allowed: RowFilter, rows_M: np.ndarray) -> tuple[RowFilter, np.ndarray]:
    """The same bits less those of rows, and the rows that had one."""
    rows_M = np.unique(rows_M[rows_M > 0])
    rows_M = rows_M[are_set(allowed.bits, rows_M)]
    if not len(rows_M):
        return allowed, rows_M
    switch(allowed.bits, rows_M, on=False)
    return RowFilter(allowed.bits, allowed.count - len(rows_M), everything=False), rows_M
