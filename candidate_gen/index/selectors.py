"""FAISS's search parameters, and the selectors that keep filters inside the scan.

V rows of the catalogue; bit r % 8 of byte r // 8 of a bitmap is row r.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import faiss as _faiss
import numpy as np

from candidate_gen.bits import switch

faiss: Any = _faiss


class Masks:
    """For each thread a bitmap of ones in which a search's excluded rows are zeros while it runs: 2,000 rows take
    30 us, FAISS's hash set of them 100."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows, self._own = n_rows, threading.local()

    @contextmanager
    def without(self, rows: np.ndarray) -> Iterator[np.ndarray | None]:
        """The bitmap with these rows cleared (in any order, also twice); None without rows."""
        if not len(rows):
            yield None
            return
        rows = rows[(rows >= 0) & (rows < self._n_rows)]
        if not hasattr(self._own, "bits"):
            self._own.bits = np.full(-(-self._n_rows // 8), 255, np.uint8)
        bits = self._own.bits
        switch(bits, rows, on=False)
        try:
            yield bits
        finally:
            bits[rows >> 3] = 255


def parameters(probes: int, factor: float, selector: Any) -> Any:
    """Of a search of IndexRefine over mapped lists: codes find `factor` times the results asked for."""
    return _unfiltered(probes, factor) if selector is None else _made(probes, factor, selector)


@lru_cache(maxsize=64)
def _unfiltered(probes: int, factor: float) -> Any:
    """Kept: making the three objects costs as much as a small search."""
    return _made(probes, factor, None)


def _made(probes: int, factor: float, selector: Any) -> Any:
    scan = faiss.IVFSearchParameters(nprobe=probes, sel=selector)
    mapped = faiss.SearchParametersPreTransform(index_params=scan)
    return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=mapped)


def selector_of(*bitmaps: np.ndarray | None) -> tuple[Any, tuple]:
    """FAISS's selector of rows whose bit is set in each bitmap there is, None without any; and what must live as long
    as it."""
    parts = [faiss.IDSelectorBitmap(bits) for bits in bitmaps if bits is not None]
    if not parts:
        return None, ()
    if len(parts) == 1:
        return parts[0], tuple(parts)
    both = faiss.IDSelectorAnd(*parts)
    return both, (both, *parts)
