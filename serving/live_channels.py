"""The channels and the rules over a catalogue that grows: the bundle's own, less what changed, with what came since.

Each class stands in for one of `candidate_gen` and answers as it would had the bundle been made with the uploads in it.
N rows of a call, K results.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from candidate_gen.allowed import KINDS_KEPT, Allowed, Eligibility, Shared
from candidate_gen.bits import switch
from candidate_gen.delta import NO_VIDEO
from candidate_gen.live import LiveIndex
from candidate_gen.part import Filter
from candidate_gen.sources import AnnSource, Retrieved, SourceQuery, UploadOrders
from candidate_gen.timeline import Lifetimes
from candidate_gen.together import SearchTogether
from candidate_gen.uploads import FRESH, RowSet, first_allowed
from features.eligibility import Attributes, Viewer
from features.entities import ByRow
from serving.arrivals import Arrivals
from serving.catalogue import BUNDLE, REMOVED, Catalogue, Column

_NONE = np.zeros(0, np.int64)
_ATTEMPTS = 3
"""Searches of one request at most, see `LiveAnn`."""


@dataclass(frozen=True, slots=True)
class Now:
    """The uploads as a viewer may be shown them at an instant."""

    catalogue: Catalogue
    viewer: Viewer
    now_ms: int
    max_age_ms: int | None

    def shows(self, slot_N: np.ndarray) -> np.ndarray:
        """(N,) bool of slots: eligible, the right time, and within the viewer's limits."""
        slots, limits = self.catalogue.slots, self.catalogue.limits
        life_N = Lifetimes(slots.upload_ts_ms[slot_N], *limits.windows_of(slot_N))
        return slots.eligible[slot_N] & (life_N.reasons(self.now_ms, self.max_age_ms) == 0) & self.fits(slot_N)

    def fits(self, slot_N: np.ndarray) -> np.ndarray:
        """(N,) bool of slots: within the viewer's limits, at whatever time."""
        return ~np.logical_or.reduce(list(self.catalogue.limits.unfit(self.viewer, slot_N).values()))


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
    removed: dict[str, int]

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

    def __init__(
        self,
        known: Eligibility,
        upload_ts_ms: ByRow,
        attributes: Attributes,
        catalogue: Catalogue,
        arrivals: Arrivals,
    ) -> None:
        self._known, self._upload_ts_ms, self._attributes = known, upload_ts_ms, attributes
        self._catalogue, self._arrivals = catalogue, arrivals

    @property
    def n_eligible(self) -> int:
        """Whatever their time and limits."""
        return self._known.n_eligible + self._arrivals.shown.size - self._arrivals.hidden.size

    def at(self, now_ms: int, viewer: Viewer) -> LiveShared:
        """What such viewers may be shown at an instant."""
        shared, max_age_ms = self._known.at(now_ms, viewer), self._known.max_age_ms
        now = Now(self._catalogue, viewer, now_ms, max_age_ms)
        if not self._catalogue.changes:
            return LiveShared(shared, now, shared.count, shared.removed)
        shown, hidden = self._arrivals.shown, self._arrivals.hidden
        rows = shown.outside(now_ms, max_age_ms)
        slot = self._catalogue.slots_of(rows)
        slot = rows if slot is None else slot
        slots, limits = self._catalogue.slots, self._catalogue.limits
        life = Lifetimes(slots.upload_ts_ms[slot], *limits.windows_of(slot))
        more = shown.removed(viewer, now_ms, limits, slot, life, max_age_ms)
        rows = hidden.outside(now_ms, max_age_ms)
        life = Lifetimes(self._upload_ts_ms[rows], *self._attributes.windows_of(rows))
        less = hidden.removed(viewer, now_ms, self._attributes, rows, life, max_age_ms)
        return LiveShared(
            shared=shared,
            now=now,
            count=shared.count + (shown.size - sum(more.values())) - (hidden.size - sum(less.values())),
            removed={name: count + more[name] - less[name] for name, count in shared.removed.items()},
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
        known = self._known.newest(now_ms, k, _OfTheBundle(allowed, self._catalogue))
        newest_first = self._arrivals.shown.uploaded.before(now_ms + 1)[-FRESH:][::-1]
        fresh = newest_first[first_allowed(newest_first, allowed, k)]
        if not len(fresh):
            return known
        rows = np.concatenate([known, fresh])
        return rows[np.lexsort((rows, -self.upload_ts_ms[rows]))][:k]


class LiveAnn:
    """As `candidate_gen.sources.AnnSource`, over the live index.

    That knows no viewers: it is asked again without the uploads it found that this one may not be shown, and then, if
    need be, without all such uploads. They are few among the nearest, so that the first or second answer mostly holds.
    """

    name = AnnSource.name

    def __init__(
        self, known: AnnSource, index: LiveIndex, catalogue: Catalogue, uploads: LiveUploads, arrivals: Arrivals
    ) -> None:
        self._known, self._catalogue = known, catalogue
        self._index, self._search = index, SearchTogether(index)
        self._uploads, self._arrivals = uploads, arrivals
        self._filters: OrderedDict[int, tuple[np.ndarray, np.ndarray, Filter]] = OrderedDict()
        """By a shared bitmap's id: it, the same with every changed row's bit set, the live index's filter of that."""
        self._lock = threading.Lock()

    def retrieve(self, query: SourceQuery, k: int) -> Retrieved:
        """Filtered inside the search; scores are cosines."""
        allowed = query.allowed
        if not self._catalogue.changes or not isinstance(allowed, LiveAllowed):
            return self._known.retrieve(query, k)
        now = allowed.now
        out = [allowed.excluded_uploads, self._uploads.of(query.followed_authors)]
        out.append(self._arrivals.shown.outside(now.now_ms, now.max_age_ms))
        for attempt in range(_ATTEMPTS):
            rows_K, scores_K = self._found(query, k, allowed, np.concatenate(out))
            fits_K = self._fit(now, rows_K)
            if fits_K.all():
                break
            out.append(rows_K[~fits_K] if attempt == 0 else self._unfit(now))
        return Retrieved(rows_K[fits_K], scores_K[fits_K])

    def _found(
        self, query: SourceQuery, k: int, allowed: LiveAllowed, out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (K,) and scores, without the rows `out` and those that `allowed` says of the bundle."""
        is_new = out >= self._catalogue.n_known
        ids_K, scores_K = self._search(
            query.user_vector_D,
            k,
            self._filter_of(allowed.bits),
            excluded_rows=np.concatenate([allowed.excluded_rows, out[~is_new]]),
            excluded_ids=self._catalogue.ids_of(out[is_new]),
        )
        found = ids_K != NO_VIDEO
        return self._catalogue.rows_of(ids_K[found]), scores_K[found]

    def _fit(self, now: Now, rows_N: np.ndarray) -> np.ndarray:
        """(N,) bool: rows of the bundle, which its bitmap has passed, and uploads within the viewer's limits."""
        slot_N = self._catalogue.slots_of(rows_N)
        fits_N = np.ones(len(rows_N), bool)
        if slot_N is not None:
            uploaded = np.flatnonzero(slot_N > REMOVED)
            fits_N[uploaded] = now.fits(slot_N[uploaded])
        return fits_N

    def _unfit(self, now: Now) -> np.ndarray:
        """Every upload beyond the viewer's limits."""
        rows = self._catalogue.uploaded_rows()
        return rows[~self._fit(now, rows)]

    def let_through(self, rows_N: np.ndarray) -> None:
        """Rows of the bundle that an upload has just changed: the live index knows whether they are there, no bitmap
        does. To be called between the catalogue's change and the live index's."""
        with self._lock:
            for _, bits, _ in self._filters.values():
                switch(bits, rows_N, on=True)

    def _filter_of(self, bits: np.ndarray) -> Filter:
        """Made once a bitmap: it takes a pass over the catalogue."""
        with self._lock:
            if id(bits) in self._filters:
                self._filters.move_to_end(id(bits))
                return self._filters[id(bits)][2]
        mine = bits.copy()
        made = self._index.allow(mine)
        with self._lock:
            switch(mine, self._catalogue.changed_rows, on=True)
            made = self._filters.setdefault(id(bits), (bits, mine, made))[2]
            if len(self._filters) > KINDS_KEPT:
                self._filters.popitem(last=False)
        return made
