"""Which rows a search may return: a filter that many searches share, less the rows that each leaves out.

Q queries, M rows of a scan, V rows of the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from candidate_gen.bits import are_set

Excluded = np.ndarray | Sequence[np.ndarray]
"""One array for every query, or a sequence of one array a query; int64, in any order, also twice, also out of range."""
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Rows that a search may return, made once by `VideoIndex.allow` and shared by any number of searches."""

    bits: np.ndarray
    """(V / 8,) uint8; bit r % 8 of byte r // 8 is row r: the layout IDSelectorBitmap reads."""
    count: int
    everything: bool
    """No indexed row is left out: nothing needs to be tested."""
    rows: np.ndarray | None = None
    """The rows themselves where they are few, so that a scan of just these need not look for them."""


def lists_of(
    excluded: Excluded | None,
    n_queries: int,
    what: str = "excluded_rows",
    checked: Callable[[np.ndarray], np.ndarray] = lambda rows: np.asarray(rows, np.int64),
) -> tuple[np.ndarray, ...]:
    """One array that holds for all queries, or Q of them; raises ValueError for another number."""
    if excluded is None or (isinstance(excluded, np.ndarray) and excluded.ndim == 1):
        return (_NONE if excluded is None else checked(excluded),)
    lists = tuple(map(checked, excluded))
    if len(lists) not in (1, n_queries) or any(one.ndim != 1 for one in lists):
        raise ValueError(
            f"{what} holds {len(lists)} entries for {n_queries} queries: give one array of one dimension for all "
            "queries, or a list of such arrays, one a query"
        )
    return lists if any(map(len, lists)) else (_NONE,)


def distinct(rows: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Those of the rows whose bit is set, ascending, each once."""
    if not len(rows):
        return rows
    rows = np.sort(rows)
    rows = rows[np.append(True, rows[1:] != rows[:-1])]
    return rows[has(bits, rows)]


def has(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) bool: the bit of each row; rows beyond the bitmap have none."""
    inside = (rows >= 0) & (rows < 8 * len(bits))
    return inside & are_set(bits, np.where(inside, rows, 0))


def places(lists: Sequence[np.ndarray], rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(query, place in the ascending `rows_M`) of every excluded row that is among them, for lists of Q queries."""
    query = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
    rows = np.concatenate(lists)
    at = np.minimum(np.searchsorted(rows_M, rows), len(rows_M) - 1)
    met = rows_M[at] == rows
    return query[met], at[met]
