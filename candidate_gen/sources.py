"""Where candidates come from: nearest videos, followed authors, what is popular, what is new.

V video rows (row 0 unknown, never returned), K results. Every source obeys the same rules: only allowed rows, none
twice, at most k, best first, and the same answer to the same query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from candidate_gen.index import VideoIndex

_STEP = 4096
"""Rows looked at together while walking down a long order."""


@dataclass(frozen=True, slots=True)
class SourceQuery:
    """What every source may know of the request."""

    user_vector_D: np.ndarray
    followed_authors: np.ndarray
    """int64, ascending."""
    allowed: np.ndarray
    """(V,) bool: eligible, not too old, not blocked, not the user's own, not seen."""
    now_ms: int
    surface: str | None


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Rows (K,) int64, best first, and the source's own scores (K,) float32, comparable within the source only."""

    rows: np.ndarray
    scores: np.ndarray


class Source(Protocol):
    """One way to find candidates."""

    name: str

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """At most k allowed rows."""
        ...


@dataclass(frozen=True, slots=True)
class Uploads:
    """Every author's videos, newest first."""

    authors: np.ndarray
    """(A,) int64, ascending."""
    start: np.ndarray
    """(A+1,) offsets into `rows`."""
    rows: np.ndarray

    @classmethod
    def build(cls, author_id: np.ndarray, upload_ts_ms: np.ndarray) -> Uploads:
        """From the author and the upload time of every video row; row 0 and videos without an author are left out."""
        rows = np.flatnonzero(author_id != 0)
        rows = rows[rows > 0]
        rows = rows[np.lexsort((rows, -upload_ts_ms[rows], author_id[rows]))]
        authors, first = np.unique(author_id[rows], return_index=True)
        return cls(authors, np.append(first, len(rows)), rows)

    def of(self, authors: np.ndarray) -> np.ndarray:
        """Rows by these authors, author after author."""
        if len(self.authors) == 0:
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.authors, authors), len(self.authors) - 1)
        at = at[self.authors[at] == authors]
        parts = [self.rows[self.start[i] : self.start[i + 1]] for i in at]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class AnnSource:
    """Unconnected: the nearest videos to the user's vector, none by an author the user follows."""

    name = "ann"

    def __init__(self, index: VideoIndex, uploads: Uploads) -> None:
        self._index, self._uploads = index, uploads

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Filtered inside the search; scores are cosines."""
        followed_rows = self._uploads.of(query.followed_authors)
        rows_1K, scores_1K = self._index.search(
            query.user_vector_D[None, :], k, allowed=query.allowed, excluded_rows=followed_rows
        )
        found = rows_1K[0] >= 0
        return Retrieved(rows_1K[0][found], scores_1K[0][found])


class FollowedSource:
    """Connected: uploads of followed authors, newest first."""

    name = "followed"

    def __init__(self, uploads: Uploads, upload_ts_ms: np.ndarray) -> None:
        self._uploads, self._upload_ts_ms = uploads, upload_ts_ms

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Scores fall with age; a video without an upload time comes last."""
        rows = self._uploads.of(query.followed_authors)
        rows = rows[query.allowed[rows] & (self._upload_ts_ms[rows] <= query.now_ms)]
        rows = rows[np.lexsort((rows, -self._upload_ts_ms[rows]))][:k]
        return Retrieved(rows, freshness(self._upload_ts_ms[rows], query.now_ms))


class PopularSource:
    """The same order for everybody on a surface, computed beforehand."""

    name = "popular"

    def __init__(self, rows: np.ndarray, by_surface: dict[str, np.ndarray] | None = None) -> None:
        self._rows, self._by_surface = rows, by_surface or {}

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Scores are 1 / (place in the order, counted from 1)."""
        order = self._rows if query.surface is None else self._by_surface.get(query.surface, self._rows)
        places = first_allowed(order, query.allowed, k)
        return Retrieved(order[places], (1.0 / (places + 1)).astype(np.float32))


class FreshSource:
    """The newest uploads, whoever made them: how a video gets its first viewers."""

    name = "fresh"

    def __init__(self, upload_ts_ms: np.ndarray) -> None:
        known = np.flatnonzero(upload_ts_ms >= 0)
        known = known[known > 0]
        self._order = known[np.lexsort((known, -upload_ts_ms[known]))]
        self._age_order_ms = -upload_ts_ms[self._order]
        self._upload_ts_ms = upload_ts_ms

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Uploads at or before now, newest first; scores fall with age."""
        begin = np.searchsorted(self._age_order_ms, -query.now_ms, side="left")
        order = self._order[begin:]
        rows = order[first_allowed(order, query.allowed, k)]
        return Retrieved(rows, freshness(self._upload_ts_ms[rows], query.now_ms))


def first_allowed(order: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Places in `order` of its first k allowed rows."""
    found: list[np.ndarray] = []
    missing = k
    for start in range(0, len(order), _STEP):
        if missing <= 0:
            break
        places = start + np.flatnonzero(allowed[order[start : start + _STEP]])[:missing]
        found.append(places)
        missing -= len(places)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def freshness(upload_ts_ms: np.ndarray, now_ms: int) -> np.ndarray:
    """1 / (1 + age in days), 0 where the upload time is unknown (float32)."""
    age_days = np.maximum(now_ms - upload_ts_ms, 0) / 86_400_000
    return np.where(upload_ts_ms >= 0, 1.0 / (1.0 + age_days), 0.0).astype(np.float32)
