"""Uploads since the bundle was made in the orders that channels and rules ask for: by author, by time, by limits.

Beside them the bundle's own rows that no longer count as the bundle has them, so that what each rule takes is known
without walking over anything. One writer; every order is replaced, never changed, so readers take no lock. N rows of a
call, M rows of an order, C kinds of limits; a write copies the orders by time, 16 bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from candidate_gen.timeline import REASONS, Lifetimes
from candidate_gen.viewers import LIMITS, first_broken
from features.eligibility import NO_BEGIN_MS, NO_END_MS, Attributes, Viewer

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class TimeOrder:
    """Rows by an instant, the earliest first."""

    ts_ms_M: np.ndarray = field(default_factory=lambda: _NONE)
    rows_M: np.ndarray = field(default_factory=lambda: _NONE)

    def with_(self, rows_N: np.ndarray, ts_ms_N: np.ndarray) -> TimeOrder:
        """With further rows."""
        order = np.argsort(ts_ms_N, kind="stable")
        at = np.searchsorted(self.ts_ms_M, ts_ms_N[order], side="right")
        return TimeOrder(np.insert(self.ts_ms_M, at, ts_ms_N[order]), np.insert(self.rows_M, at, rows_N[order]))

    def without(self, rows_N: np.ndarray, ts_ms_N: np.ndarray) -> TimeOrder:
        """Without rows that are in it, given the instants they are there with."""
        first, last = (np.searchsorted(self.ts_ms_M, np.unique(ts_ms_N), side=side) for side in ("left", "right"))
        places = np.concatenate([_NONE, *(np.arange(*ends) for ends in zip(first, last, strict=True))])
        places = places[np.isin(self.rows_M[places], rows_N)]
        return TimeOrder(np.delete(self.ts_ms_M, places), np.delete(self.rows_M, places))

    def before(self, ts_ms: int) -> np.ndarray:
        """Rows with an earlier instant."""
        return self.rows_M[: np.searchsorted(self.ts_ms_M, ts_ms)]

    def after(self, ts_ms: int) -> np.ndarray:
        """Rows with a later one."""
        return self.rows_M[np.searchsorted(self.ts_ms_M, ts_ms, side="right") :]


@dataclass(frozen=True, slots=True)
class Lot:
    """Eligible rows, by when and to whom they may be shown; `limits` say the latter by key, a number of each row's."""

    size: int = 0
    uploaded: TimeOrder = field(default_factory=TimeOrder)
    """Of known upload time."""
    begins: TimeOrder = field(default_factory=TimeOrder)
    ends: TimeOrder = field(default_factory=TimeOrder)
    kinds: dict[bytes, int] = field(default_factory=dict)
    """Place of each kind of limits."""
    key_C: np.ndarray = field(default_factory=lambda: _NONE)
    """A key with these limits."""
    count_C: np.ndarray = field(default_factory=lambda: _NONE)

    def with_(self, rows_N: np.ndarray, key_N: np.ndarray, upload_ms_N: np.ndarray, limits: Attributes) -> Lot:
        """With further rows."""
        return self._changed(rows_N, key_N, upload_ms_N, limits, +1)

    def without(self, rows_N: np.ndarray, key_N: np.ndarray, upload_ms_N: np.ndarray, limits: Attributes) -> Lot:
        """Without rows that are in it, given the keys and times they are there with."""
        return self._changed(rows_N, key_N, upload_ms_N, limits, -1)

    def outside(self, now_ms: int, max_age_ms: int | None) -> np.ndarray:
        """Rows whose time it is not, each once: not yet uploaded, too old, or not available."""
        old = _NONE if max_age_ms is None else self.uploaded.before(now_ms - max_age_ms)
        parts = [self.uploaded.after(now_ms), old, self.begins.after(now_ms), self.ends.before(now_ms + 1)]
        return np.unique(np.concatenate(parts))

    def removed(
        self,
        viewer: Viewer,
        now_ms: int,
        limits: Attributes,
        key_O: np.ndarray,
        life_O: Lifetimes,
        max_age_ms: int | None,
    ) -> dict[str, int]:
        """How many each of REASONS and LIMITS takes, a row counting for the first; O are the rows `outside`."""
        by_time = np.bincount(life_O.reasons(now_ms, max_age_ms), minlength=1 + len(REASONS))[1:]
        by_limit = np.bincount(first_broken(limits, viewer, self.key_C), self.count_C, 1 + len(LIMITS))[1:]
        twice = np.bincount(first_broken(limits, viewer, key_O), minlength=1 + len(LIMITS))[1:]
        counts = [*by_time.tolist(), *(by_limit.astype(np.int64) - twice).tolist()]
        return dict(zip((*REASONS, *LIMITS), counts, strict=True))

    def _changed(
        self, rows_N: np.ndarray, key_N: np.ndarray, upload_ms_N: np.ndarray, limits: Attributes, sign: int
    ) -> Lot:
        from_ms_N, until_ms_N = limits.windows_of(key_N)
        orders: list[TimeOrder] = []
        for order, at_ms_N, known_N in (
            (self.uploaded, upload_ms_N, upload_ms_N >= 0),
            (self.begins, from_ms_N, from_ms_N != NO_BEGIN_MS),
            (self.ends, until_ms_N, until_ms_N != NO_END_MS),
        ):
            change = order.with_ if sign > 0 else order.without
            orders.append(change(rows_N[known_N], at_ms_N[known_N]) if known_N.any() else order)
        columns = (limits.region_set, limits.language, limits.min_age, limits.safety_level)
        code_N4 = np.stack([column[key_N].astype(np.int64) for column in columns], axis=1)
        distinct, first, counts = np.unique(code_N4, axis=0, return_index=True, return_counts=True)
        kinds = self.kinds | {code.tobytes(): len(self.kinds) + i for i, code in enumerate(self._unmet(distinct))}
        place = np.array([kinds[code.tobytes()] for code in distinct], np.int64)
        key_C, count_C = (np.concatenate([old, np.zeros(len(kinds) - len(old), np.int64)])
                          for old in (self.key_C, self.count_C))  # fmt: skip
        fresh = place >= len(self.key_C)
        key_C[place[fresh]] = key_N[first[fresh]]
        count_C[place] += sign * counts
        uploaded, begins, ends = orders
        return Lot(self.size + sign * len(rows_N), uploaded, begins, ends, kinds, key_C, count_C)

    def _unmet(self, codes: np.ndarray) -> list[np.ndarray]:
        return [code for code in codes if code.tobytes() not in self.kinds]


class Arrivals:
    """The orders, kept up to date by the writer."""

    def __init__(self) -> None:
        self.shown = Lot()
        """Uploaded and eligible, by slot."""
        self.hidden = Lot()
        """Eligible in the bundle, and uploaded or removed since, by row: the bundle's orders still count them."""
        self._rows_of: dict[int, np.ndarray] = {}
        self._authors = _NONE

    def add(self, rows_N: np.ndarray, author_id_N: np.ndarray) -> None:
        """Rows that are shown from now on, by their authors."""
        for author, rows in _by_author(rows_N, author_id_N):
            self._rows_of[author] = np.concatenate([self._rows_of.get(author, _NONE), rows])
        authors = np.unique(author_id_N[author_id_N != 0])
        fresh = authors[~_among(self._authors, authors)]
        self._authors = np.insert(self._authors, np.searchsorted(self._authors, fresh), fresh)

    def drop(self, rows_N: np.ndarray, author_id_N: np.ndarray) -> None:
        """Rows that were shown, by the authors they had."""
        for author, rows in _by_author(rows_N, author_id_N):
            had = self._rows_of[author]
            self._rows_of[author] = had[~np.isin(had, rows)]

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
