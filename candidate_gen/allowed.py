"""Which videos a request may be shown, without touching anything of the catalogue's size for each request.

What viewers of one kind have in common (eligible, the right time, their region, languages, age and safety) is one
bitmap that their requests share; what is one request's own (seen, excluded, blocked) is a short list of rows.
V video rows, bit r & 7 of byte r >> 3 is row r.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from candidate_gen.bits import are_set
from candidate_gen.timeline import REASONS, Stretch, Timeline
from candidate_gen.viewers import LIMITS, Kind, ViewerBitmaps, first_broken
from features.eligibility import Viewer

KINDS_KEPT = 16
"""Kinds of viewers, in one stretch of ten minutes each, whose bitmaps are kept; the ANN source keeps as many filters.
At 100 million videos each is 12.5 MB here and as much there, 400 MB in all, and up to 200 MB more where every one is of
another stretch. A kind that is not kept is made again by the request that needs it: a pass over V / 8 bytes for each
of its limits, and one for the index's filter."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows whose bit is set, less those listed."""

    bits: np.ndarray
    """(ceil(V / 8),) uint8, shared: never written to."""
    excluded_rows: np.ndarray
    """int64, ascending, distinct, all of them set in `bits`."""
    count: int
    """How many rows are allowed."""

    @classmethod
    def of(cls, allowed_V: np.ndarray) -> Allowed:
        """From a bool a row."""
        return cls(np.packbits(allowed_V, bitorder="little"), np.zeros(0, np.int64), int(np.sum(allowed_V)))

    def has(self, rows_N: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        allowed = are_set(self.bits, rows_N)
        if len(self.excluded_rows):
            at = np.minimum(np.searchsorted(self.excluded_rows, rows_N), len(self.excluded_rows) - 1)
            allowed &= self.excluded_rows[at] != rows_N
        return allowed


@dataclass(frozen=True, slots=True)
class Shared:
    """What viewers of one kind may be shown at an instant: a bitmap, less rows whose time it is not."""

    bits: np.ndarray
    outside_rows: np.ndarray
    count: int
    """Rows allowed at the instant: the bits that are set, less `outside_rows`."""
    removed: dict[str, int]
    """Eligible rows that each rule took; a row under two rules counts for the first."""

    def without(self, *lists: np.ndarray) -> tuple[Allowed, list[int]]:
        """Leave further rows out; also how many each list took, where a row of two lists counts for the first."""
        rows = np.concatenate([self.outside_rows, *lists])
        list_of = np.repeat(np.arange(len(lists) + 1), [len(self.outside_rows), *(len(part) for part in lists)])
        distinct, first = np.unique(rows, return_index=True)
        held = are_set(self.bits, distinct)
        taken = np.bincount(list_of[first[held]], minlength=len(lists) + 1)[1:].tolist()
        return Allowed(self.bits, distinct[held], self.count - sum(taken)), taken


@dataclass(frozen=True, slots=True)
class _Held:
    """A kind of viewers in a stretch of time."""

    stretch: Stretch
    bits: np.ndarray
    count: int
    """Bits that are set."""
    unfit: np.ndarray
    """(4,) rows that each of LIMITS takes all the time: the edge is not among them."""
    edge_limit: np.ndarray
    """(E,) int64, `first_broken` of the edge rows."""


class Eligibility:
    """The shared bitmap of any viewer at any instant; safe to ask from many threads."""

    def __init__(self, timeline: Timeline, viewers: ViewerBitmaps) -> None:
        self._timeline, self._viewers = timeline, viewers
        self.max_age_ms, self.n_eligible = timeline.max_age_ms, timeline.n_eligible
        self._kept: OrderedDict[tuple[int, Kind], _Held] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, now_ms: int, viewer: Viewer) -> Shared:
        """Eligible videos that the viewer may be shown at the instant: uploaded at or before it, not too old at it
        (of unknown time: never), available, and within every limit."""
        held = self._held(now_ms, viewer)
        stretch = held.stretch
        reason_E = stretch.edge.reasons(now_ms, self.max_age_ms)
        outside = reason_E > 0
        limits_of_others = np.bincount(held.edge_limit[~outside], minlength=1 + len(LIMITS))[1:]
        reasons = stretch.always + np.bincount(reason_E, minlength=1 + len(REASONS))
        counts = [*reasons[1:].tolist(), *(held.unfit + limits_of_others).tolist()]
        return Shared(
            bits=held.bits,
            outside_rows=stretch.edge_rows[outside],
            count=held.count - int((outside & (held.edge_limit == 0)).sum()),
            removed=dict(zip((*REASONS, *LIMITS), counts, strict=True)),
        )

    def _held(self, now_ms: int, viewer: Viewer) -> _Held:
        kind = self._viewers.kind_of(viewer)
        with self._lock:
            stretch = self._timeline.at(now_ms)
            key = (stretch.begin_ms, kind)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._make(stretch, kind, viewer)  # outside the lock: requests of other viewers need not wait
        with self._lock:
            held = self._kept.setdefault(key, made)  # of two made at once one is kept: filters go by identity
            if len(self._kept) > KINDS_KEPT:
                self._kept.popitem(last=False)
        return held

    def _make(self, stretch: Stretch, kind: Kind, viewer: Viewer) -> _Held:
        bits, count, taken = self._viewers.narrow(stretch.bits, kind)
        edge_limit = first_broken(self._viewers.attributes, viewer, stretch.edge_rows)
        of_edge = np.bincount(edge_limit, minlength=1 + len(LIMITS))[1:]
        return _Held(stretch, bits, count, taken - of_edge, edge_limit)
