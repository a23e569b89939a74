"""Uploads since the bundle was made in the orders that channels and rules ask for: by time, and by author.

Beside them the bundle's own rows that no longer count, by the time the bundle gave them, so that what a rule leaves is
counted without walking over anything. One writer; every order is replaced, never changed, so readers take no lock.
N rows of a call, M rows of an order; a write copies the order, 16 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class TimeOrder:
    """Rows of known upload time, oldest first, and how many there are without one."""

    ts_ms_M: np.ndarray = field(default_factory=lambda: _NONE)
    rows_M: np.ndarray = field(default_factory=lambda: _NONE)
    undated: int = 0

    def with_(self, rows_N: np.ndarray, ts_ms_N: np.ndarray) -> TimeOrder:
        """With further rows; a negative time is not known."""
        dated = np.flatnonzero(ts_ms_N >= 0)
        dated = dated[np.argsort(ts_ms_N[dated], kind="stable")]
        at = np.searchsorted(self.ts_ms_M, ts_ms_N[dated], side="right")
        return TimeOrder(
            np.insert(self.ts_ms_M, at, ts_ms_N[dated]),
            np.insert(self.rows_M, at, rows_N[dated]),
            self.undated + len(rows_N) - len(dated),
        )

    def without(self, rows_N: np.ndarray, ts_ms_N: np.ndarray) -> TimeOrder:
        """Without rows that are in it, given the times they are there with."""
        dated = ts_ms_N >= 0
        first, last = (
            np.searchsorted(self.ts_ms_M, np.unique(ts_ms_N[dated]), side=side) for side in ("left", "right")
        )
        places = np.concatenate([_NONE, *(np.arange(*ends) for ends in zip(first, last, strict=True))])
        places = places[np.isin(self.rows_M[places], rows_N[dated])]
        return TimeOrder(
            np.delete(self.ts_ms_M, places),
            np.delete(self.rows_M, places),
            self.undated - int(np.count_nonzero(~dated)),
        )

    def before(self, ts_ms: int) -> int:
        """How many were uploaded before an instant."""
        return int(np.searchsorted(self.ts_ms_M, ts_ms))

    def outside(self, oldest_ms: int, newest_ms: int) -> tuple[int, int]:
        """How many are older than the first instant, and how many younger than the second."""
        last = self.before(newest_ms + 1)
        return min(self.before(oldest_ms), last), len(self.rows_M) - last

    def __len__(self) -> int:
        return len(self.rows_M) + self.undated


class Arrivals:
    """The orders, kept up to date by the writer."""

    def __init__(self) -> None:
        self.shown = TimeOrder()
        """Uploaded and eligible."""
        self.hidden = TimeOrder()
        """Eligible in the bundle, and uploaded or removed since: the bundle's orders still count them."""
        self._rows_of: dict[int, np.ndarray] = {}
        self._authors = _NONE

    def add(self, rows_N: np.ndarray, ts_ms_N: np.ndarray, author_id_N: np.ndarray) -> None:
        """Rows that are shown from now on."""
        self.shown = self.shown.with_(rows_N, ts_ms_N)
        for author, rows in _by_author(rows_N, author_id_N):
            self._rows_of[author] = np.concatenate([self._rows_of.get(author, _NONE), rows])
        authors = np.unique(author_id_N[author_id_N != 0])
        fresh = authors[~_among(self._authors, authors)]
        self._authors = np.insert(self._authors, np.searchsorted(self._authors, fresh), fresh)

    def drop(self, rows_N: np.ndarray, ts_ms_N: np.ndarray, author_id_N: np.ndarray) -> None:
        """Rows that were shown, with the times and authors they had."""
        self.shown = self.shown.without(rows_N, ts_ms_N)
        for author, rows in _by_author(rows_N, author_id_N):
            had = self._rows_of[author]
            self._rows_of[author] = had[~np.isin(had, rows)]

    def hide(self, rows_N: np.ndarray, ts_ms_N: np.ndarray) -> None:
        """Eligible rows of the bundle that no longer are what the bundle says."""
        self.hidden = self.hidden.with_(rows_N, ts_ms_N)

    def of(self, authors: np.ndarray) -> np.ndarray:
        """Shown rows by these authors."""
        found = authors[_among(self._authors, authors)]
        return np.concatenate([_NONE, *(self._rows_of[author] for author in found.tolist())])


def _among(sorted_M: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """(N,) bool: which values are in the sorted array."""
    if not len(sorted_M):
        return np.zeros(len(values_N), bool)
    at_N = np.minimum(np.searchsorted(sorted_M, values_N), len(sorted_M) - 1)
    return sorted_M[at_N] == values_N


def _by_author(rows_N: np.ndarray, author_id_N: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(author, rows) of the rows that have one."""
    if not len(rows_N):
        return []
    order = np.argsort(author_id_N, kind="stable")
    authors, first = np.unique(author_id_N[order], return_index=True)
    parts = np.split(rows_N[order], first[1:])
    return [(author, rows) for author, rows in zip(authors.tolist(), parts, strict=True) if author != 0]
