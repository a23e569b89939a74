"""The channels and the rules over a catalogue that grows: the bundle's own, less what changed, with what came since.

Each class stands in for one of `candidate_gen` and answers as it would had the bundle been made with the uploads in it.
N rows of a call, K results.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from candidate_gen.allowed import Allowed, Eligibility, Shared
from candidate_gen.delta import NO_VIDEO
from candidate_gen.live import LiveIndex
from candidate_gen.part import Filter
from candidate_gen.sources import AnnSource, Retrieved, SourceQuery, UploadOrders
from candidate_gen.together import SearchTogether
from candidate_gen.uploads import RowSet, first_allowed
from serving.arrivals import Arrivals
from serving.catalogue import BUNDLE, Catalogue, Column

_NONE = np.zeros(0, np.int64)
_EVER = -(2**62)
"""Older than any upload."""


@dataclass(frozen=True, slots=True)
class Now:
    """The uploads as a request at an instant may be shown them."""

    catalogue: Catalogue
    now_ms: int
    oldest_ms: int

    def shows(self, slot_N: np.ndarray) -> np.ndarray:
        """(N,) bool of slots: eligible, uploaded by now, not too old."""
        slots = self.catalogue.slots
        upload_ts_ms_N = slots.upload_ts_ms[slot_N]
        young_N = (upload_ts_ms_N < 0) | (upload_ts_ms_N >= self.oldest_ms)
        return slots.eligible[slot_N] & (upload_ts_ms_N <= self.now_ms) & young_N


@dataclass(frozen=True, slots=True)
class LiveAllowed(Allowed):
    """`bits` and `excluded_rows` speak for rows of the bundle that did not change since; the catalogue for the rest."""

    now: Now
    excluded_uploads: np.ndarray
    """Uploaded rows that this request leaves out: int64, ascending, distinct."""

    def has(self, rows_N: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        slot_N = self.now.catalogue.slots_of(rows_N)
        if slot_N is None:
            return Allowed.has(self, rows_N)
        known_N = slot_N == BUNDLE
        allowed_N = np.zeros(len(rows_N), bool)
        allowed_N[known_N] = Allowed.has(self, rows_N[known_N])
        rest = rows_N[~known_N]
        allowed_N[~known_N] = self.now.shows(slot_N[~known_N]) & ~np.isin(rest, self.excluded_uploads)
        return allowed_N


@dataclass(frozen=True, slots=True)
class _OfTheBundle:
    """Allowed rows without those uploaded since."""

    allowed: RowSet
    catalogue: Catalogue

    def has(self, rows_N: np.ndarray) -> np.ndarray:
        slot_N = self.catalogue.slots_of(rows_N)
        allowed_N = self.allowed.has(rows_N)
        return allowed_N if slot_N is None else allowed_N & (slot_N == BUNDLE)


@dataclass(frozen=True, slots=True)
class LiveShared:
    """As `candidate_gen.allowed.Shared`, which it holds."""

    shared: Shared
    now: Now
    count: int
    not_yet_uploaded: int
    too_old: int

    def without(self, *lists: np.ndarray) -> tuple[Allowed, list[int]]:
        """Leave further rows out; also how many each list took, where a row of two lists counts for the first."""
        rows = np.concatenate([_NONE, *lists])
        list_of = np.repeat(np.arange(len(lists)), [len(part) for part in lists])
        slot = self.now.catalogue.slots_of(rows)
        if slot is None:
            known, taken = self.shared.without(*lists)
            held = _NONE
        else:
            is_known = slot == BUNDLE
            known, taken = self.shared.without(*(rows[is_known & (list_of == i)] for i in range(len(lists))))
            uploaded = np.flatnonzero(~is_known)
            distinct, first = np.unique(rows[uploaded], return_index=True)
            shown = self.now.shows(slot[uploaded][first])
            held = distinct[shown]
            more = np.bincount(list_of[uploaded][first[shown]], minlength=len(lists))
            taken = [a + b for a, b in zip(taken, more.tolist(), strict=True)]
        excluded_rows = known.excluded_rows  # also those that the bundle dates outside of now: uploads say otherwise
        slot = self.now.catalogue.slots_of(excluded_rows)
        excluded_rows = excluded_rows if slot is None else excluded_rows[slot == BUNDLE]
        return LiveAllowed(known.bits, excluded_rows, self.count - sum(taken), self.now, held), taken


class LiveEligibility:
    """As `candidate_gen.allowed.Eligibility`, which it asks about the bundle."""

    def __init__(self, known: Eligibility, catalogue: Catalogue, arrivals: Arrivals) -> None:
        self._known, self._catalogue, self._arrivals = known, catalogue, arrivals

    @property
    def n_eligible(self) -> int:
        """Whenever they are or were uploaded."""
        return self._known.n_eligible + len(self._arrivals.shown) - len(self._arrivals.hidden)

    def at(self, now_ms: int) -> LiveShared:
        """What everybody may be shown at an instant."""
        shared = self._known.at(now_ms)
        oldest_ms = _EVER if self._known.max_age_ms is None else now_ms - self._known.max_age_ms
        shown, hidden = self._arrivals.shown, self._arrivals.hidden
        (old, future), (hidden_old, hidden_future) = (o.outside(oldest_ms, now_ms) for o in (shown, hidden))
        visible = len(shown) - old - future
        hidden_visible = len(hidden) - hidden_old - hidden_future
        return LiveShared(
            shared=shared,
            now=Now(self._catalogue, now_ms, oldest_ms),
            count=shared.count + visible - hidden_visible,
            not_yet_uploaded=shared.not_yet_uploaded + future - hidden_future,
            too_old=shared.too_old + old - hidden_old,
        )


class LiveUploads:
    """As `candidate_gen.uploads.Uploads`: the bundle's, and those since."""

    def __init__(self, known: UploadOrders, catalogue: Catalogue, arrivals: Arrivals) -> None:
        self._known, self._catalogue, self._arrivals = known, catalogue, arrivals
        self.upload_ts_ms = Column(catalogue, known.upload_ts_ms, "upload_ts_ms")

    def of(self, authors: np.ndarray) -> np.ndarray:
        """Rows by these authors, in no order."""
        rows = self._known.of(authors)
        slot = self._catalogue.slots_of(rows)
        return np.concatenate([rows if slot is None else rows[slot == BUNDLE], self._arrivals.of(authors)])

    def newest(self, now_ms: int, k: int, allowed: RowSet) -> np.ndarray:
        """The k newest allowed rows uploaded at or before an instant, newest first, then by row."""
        shown = self._arrivals.shown
        known = self._known.newest(now_ms, k, _OfTheBundle(allowed, self._catalogue))
        newest_first = shown.rows_M[: shown.before(now_ms + 1)][::-1]
        fresh = newest_first[first_allowed(newest_first, allowed, k)]
        if not len(fresh):
            return known
        rows = np.concatenate([known, fresh])
        return rows[np.lexsort((rows, -self.upload_ts_ms[rows]))][:k]


class LiveAnn:
    """As `candidate_gen.sources.AnnSource`, over the live index."""

    name = AnnSource.name

    def __init__(
        self, known: AnnSource, index: LiveIndex, catalogue: Catalogue, uploads: LiveUploads, arrivals: Arrivals
    ) -> None:
        self._known, self._catalogue = known, catalogue
        self._index, self._search = index, SearchTogether(index)
        self._uploads, self._arrivals = uploads, arrivals
        self._filters: tuple[tuple[np.ndarray, np.ndarray, Filter], ...] = ()
        """(a shared bitmap, the same with every changed row's bit set, the live index's filter of that)."""
        self._lock = threading.Lock()

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Filtered inside the search; scores are cosines."""
        allowed = query.allowed
        if not self._catalogue.changes or not isinstance(allowed, LiveAllowed):
            return self._known.retrieve(query, k)
        shown, now = self._arrivals.shown, allowed.now
        old, future = shown.outside(now.oldest_ms, now.now_ms)
        rows = np.concatenate(
            [
                allowed.excluded_uploads,
                self._uploads.of(query.followed_authors),
                shown.rows_M[:old],
                shown.rows_M[len(shown.rows_M) - future :],
            ]
        )
        is_new = rows >= self._catalogue.n_known
        ids_K, scores_K = self._search(
            query.user_vector_D,
            k,
            self._filter_of(allowed.bits),
            excluded_rows=np.concatenate([allowed.excluded_rows, rows[~is_new]]),
            excluded_ids=self._catalogue.ids_of(rows[is_new]),
        )
        found = ids_K != NO_VIDEO
        return Retrieved(self._catalogue.rows_of(ids_K[found]), scores_K[found])

    def let_through(self, rows_N: np.ndarray) -> None:
        """Rows of the bundle that an upload has just changed: the live index knows whether they are there, no bitmap
        does. To be called between the catalogue's change and the live index's."""
        with self._lock:
            for _, bits, _ in self._filters:
                _set(bits, rows_N)

    def _filter_of(self, bits: np.ndarray) -> Filter:
        """Made once a bitmap: it takes a pass over the catalogue."""
        for held, _, made in self._filters:
            if held is bits:
                return made
        with self._lock:
            mine = bits.copy()
            _set(mine, self._catalogue.changed_rows)
            made = self._index.allow(mine)
            self._filters = ((bits, mine, made), *self._filters[:3])
        return made


def _set(bits: np.ndarray, rows_N: np.ndarray) -> None:
    np.bitwise_or.at(bits, rows_N >> 3, np.left_shift(1, rows_N & 7).astype(np.uint8))
