"""Where candidates come from: nearest videos, watched together, followed authors, what is popular, what is new.

V video rows (row 0 unknown, never returned), K results. Every source obeys the same rules: only allowed rows, none
twice, at most k, best first, and the same answer to the same query.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from candidate_gen.allowed import KINDS_KEPT, Allowed
from candidate_gen.covisit import CovisitConfig, Covisits, liked
from candidate_gen.index import RowFilter, VideoIndex
from candidate_gen.together import SearchTogether
from candidate_gen.uploads import RowSet, first_allowed
from features.entities import ByRow
from features.history import HistoryWindow


class UploadOrders(Protocol):
    """Who uploaded what, and when: `candidate_gen.uploads.Uploads`, or those with what came since."""

    @property
    def upload_ts_ms(self) -> ByRow: ...

    def of(self, authors: np.ndarray, /) -> np.ndarray: ...

    def newest(self, now_ms: int, k: int, allowed: RowSet) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class SourceQuery:
    """What every source may know of the request."""

    user_vector_D: np.ndarray
    history: HistoryWindow
    """Of the one user."""
    followed_authors: np.ndarray
    """int64, ascending."""
    allowed: Allowed
    """Eligible, the right time, within the viewer's limits, not blocked, not the user's own, not seen."""
    now_ms: int
    surface: str | None
    segment: int
    """The user's value of the feature that popularity is counted by; -1 without such a feature."""


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


class AnnSource:
    """Unconnected: the nearest videos to the user's vector, none by an author the user follows."""

    name = "ann"

    def __init__(self, index: VideoIndex, uploads: UploadOrders) -> None:
        self._search, self._uploads = SearchTogether(index), uploads
        self._filter_of = _FilterOf(index)

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Filtered inside the search; scores are cosines."""
        excluded_rows = np.concatenate([query.allowed.excluded_rows, self._uploads.of(query.followed_authors)])
        allowed = self._filter_of(query.allowed.bits)
        rows_K, scores_K = self._search(query.user_vector_D, k, allowed, excluded_rows=excluded_rows)
        return Retrieved(rows_K[rows_K >= 0], scores_K[rows_K >= 0])


class _FilterOf:
    """The index's filter of a shared bitmap, made once a bitmap: it takes a pass over the catalogue."""

    def __init__(self, index: VideoIndex) -> None:
        self._index = index
        self._kept: OrderedDict[int, tuple[np.ndarray, RowFilter]] = OrderedDict()
        """By the bitmap's id; the bitmap is held too, so that no other can get its id."""
        self._lock = threading.Lock()

    def __call__(self, bits: np.ndarray) -> RowFilter:
        """Safe from many threads; of two made at once one is kept: searches under the same one are asked together."""
        with self._lock:
            if id(bits) in self._kept:
                self._kept.move_to_end(id(bits))
                return self._kept[id(bits)][1]
        made = self._index.allow(bits)
        with self._lock:
            _, kept = self._kept.setdefault(id(bits), (bits, made))
            if len(self._kept) > KINDS_KEPT:
                self._kept.popitem(last=False)
        return kept


class CovisitSource:
    """What was liked together with the user's last likes."""

    name = "covisit"

    def __init__(self, covisits: Covisits, config: CovisitConfig) -> None:
        self._covisits, self._config = covisits, config

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Scores are sums over the user's likes; a user without any gets nothing."""
        rows, scores = self._covisits.similar(*liked(query.history, self._config))
        allowed = query.allowed.has(rows)
        rows, scores = rows[allowed], scores[allowed]
        if 0 < k < len(rows):  # sort few: those that score at least as the k-th does
            high = scores >= np.partition(scores, -k)[-k]
            rows, scores = rows[high], scores[high]
        best = np.lexsort((rows, -scores))[:k]
        return Retrieved(rows[best], scores[best])


class FollowedSource:
    """Connected: uploads of followed authors, newest first."""

    name = "followed"

    def __init__(self, uploads: UploadOrders) -> None:
        self._uploads = uploads

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Scores fall with age; a video without an upload time comes last."""
        rows, upload_ts_ms = self._uploads.of(query.followed_authors), self._uploads.upload_ts_ms
        rows = rows[query.allowed.has(rows) & (upload_ts_ms[rows] <= query.now_ms)]
        rows = rows[np.lexsort((rows, -upload_ts_ms[rows]))][:k]
        return Retrieved(rows, freshness(upload_ts_ms[rows], query.now_ms))


class PopularSource:
    """Orders computed beforehand: of the surface and the user's segment, of the surface, of everybody."""

    name = "popular"

    def __init__(self, orders: Mapping[tuple[str | None, int | None], np.ndarray]) -> None:
        self._orders = orders

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """The narrowest order there is; scores are 1 / (place in it, counted from 1)."""
        narrow_to_wide = ((query.surface, query.segment), (query.surface, None), (None, None))
        order = next(self._orders[key] for key in narrow_to_wide if key in self._orders)
        places = first_allowed(order, query.allowed, k)
        return Retrieved(order[places], (1.0 / (places + 1)).astype(np.float32))


class FreshSource:
    """The newest uploads, whoever made them: how a video gets its first viewers."""

    name = "fresh"

    def __init__(self, uploads: UploadOrders) -> None:
        self._uploads = uploads

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Of the newest uploads at or before now those that are allowed, newest first; scores fall with age."""
        rows = self._uploads.newest(query.now_ms, k, query.allowed)
        return Retrieved(rows, freshness(self._uploads.upload_ts_ms[rows], query.now_ms))


def freshness(upload_ts_ms: np.ndarray, now_ms: int) -> np.ndarray:
    """1 / (1 + age in days), 0 where the upload time is unknown (float32)."""
    age_days = np.maximum(now_ms - upload_ts_ms, 0) / 86_400_000
    return np.where(upload_ts_ms >= 0, 1.0 / (1.0 + age_days), 0.0).astype(np.float32)
