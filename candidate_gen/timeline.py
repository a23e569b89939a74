"""Which eligible videos may be shown at an instant, whoever is watching: uploaded, not too old, and available.

V video rows, E edge rows. Requests of the same ten minutes share a bitmap; the rows that come or go in the course of
them are its edge, and are set in it: a request looks at these few and leaves out those whose time it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candidate_gen.bits import switch
from candidate_gen.uploads import Uploads
from features.eligibility import NO_BEGIN_MS, NO_END_MS, Attributes

HOUR_MS = 3_600_000
SHARED_MS = 600_000
REASONS = ("not_yet_uploaded", "too_old", "unavailable")
"""In the order in which a video with several is counted; reason i is code 1 + i."""
_KEPT = 4
"""Stretches kept: the present ten minutes, and those of requests about the past."""
_SAVED = ("from_rows", "from_ms", "until_rows", "until_ms")


@dataclass(frozen=True, slots=True)
class Windows:
    """The instants at which eligible videos become available, and those at which they cease to be, in order."""

    from_rows: np.ndarray
    from_ms: np.ndarray
    until_rows: np.ndarray
    until_ms: np.ndarray

    @classmethod
    def build(cls, attributes: Attributes, eligible_V: np.ndarray) -> Windows:
        """Sorts what has a window."""
        ends = []
        for at_ms, never in ((attributes.window_from_ms, NO_BEGIN_MS), (attributes.window_until_ms, NO_END_MS)):
            wanted = (at_ms != never) & eligible_V[attributes.window_rows]
            order = np.argsort(at_ms[wanted], kind="stable")
            ends += [attributes.window_rows[wanted][order], at_ms[wanted][order]]
        return cls(*ends)

    def changing(self, after_ms: int, last_ms: int) -> np.ndarray:
        """Rows that come or go at an instant in (after, last]; some twice."""
        found = []
        for rows, at_ms in ((self.from_rows, self.from_ms), (self.until_rows, self.until_ms)):
            begin, end = np.searchsorted(at_ms, [after_ms, last_ms], side="right")
            found.append(rows[begin:end])
        return np.concatenate(found)

    def outside(self, now_ms: int) -> np.ndarray:
        """Rows that are not available at an instant, each once."""
        to_come = self.from_rows[np.searchsorted(self.from_ms, now_ms, side="right") :]
        gone = self.until_rows[: np.searchsorted(self.until_ms, now_ms, side="right")]
        return np.concatenate([to_come, gone])

    def save(self, folder: Path) -> None:
        """Write `windows_NAME.npy` for each array into an existing folder."""
        for name in _SAVED:
            np.save(folder / f"windows_{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Windows:
        """Memory-map what `save` wrote."""
        mapped = (np.load(folder / f"windows_{name}.npy", mmap_mode="r", allow_pickle=False) for name in _SAVED)
        return cls(*map(np.asarray, mapped))


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """When N rows may be shown."""

    upload_ms: np.ndarray
    """Negative where not known: never too old."""
    from_ms: np.ndarray
    until_ms: np.ndarray

    def reasons(self, now_ms: int, max_age_ms: int | None) -> np.ndarray:
        """(N,) int64: 0 where the instant is right, else the code of the first of REASONS."""
        code_N = np.where((self.from_ms > now_ms) | (self.until_ms <= now_ms), 3, 0)
        if max_age_ms is not None:
            code_N[(self.upload_ms >= 0) & (self.upload_ms < now_ms - max_age_ms)] = 2
        code_N[self.upload_ms > now_ms] = 1
        return code_N


@dataclass(frozen=True, slots=True)
class Stretch:
    """Ten minutes from `begin_ms` on."""

    begin_ms: int
    bits: np.ndarray
    """(ceil(V / 8),) uint8, shared and never written to: rows that may be shown all the time, and the edge."""
    edge_rows: np.ndarray
    """(E,) int64, ascending."""
    edge: Lifetimes
    at_begin: np.ndarray
    """(4,) int64 eligible rows by code at `begin_ms`; code 0 is not counted."""
    always: np.ndarray
    """(4,) the same without the edge: it holds for all of the ten minutes."""


class Timeline:
    """Stretches of time, each made from the nearest one that is kept. Its owner holds a lock."""

    def __init__(
        self,
        eligible_V: np.ndarray,
        uploads: Uploads,
        attributes: Attributes,
        windows: Windows,
        max_age_h: float | None,
    ) -> None:
        self.max_age_ms = None if max_age_h is None else round(max_age_h * HOUR_MS)
        self._uploads, self._attributes, self._windows = uploads, attributes, windows
        self._eligible_V, self.n_eligible = eligible_V, int(np.sum(eligible_V))
        self._kept: list[Stretch] = []

    def at(self, now_ms: int) -> Stretch:
        """The stretch that holds an instant."""
        begin_ms = now_ms - now_ms % SHARED_MS
        kept = next((stretch for stretch in self._kept if stretch.begin_ms == begin_ms), None)
        stretch = self._make(begin_ms) if kept is None else kept
        self._kept = [*(other for other in self._kept if other is not stretch), stretch][-_KEPT:]
        return stretch

    def _make(self, begin_ms: int) -> Stretch:
        if self._kept:
            near = min(self._kept, key=lambda stretch: abs(stretch.begin_ms - begin_ms))
            bits, counts = self._moved(near, begin_ms)
        else:
            bits, counts = self._first(begin_ms)
        edge_rows = self._changing(begin_ms, begin_ms + SHARED_MS - 1)
        switch(bits, edge_rows, on=True)
        return Stretch(
            begin_ms=begin_ms,
            bits=bits,
            edge_rows=edge_rows,
            edge=self._lifetimes(edge_rows),
            at_begin=counts,
            always=counts - self._counts(edge_rows, begin_ms),
        )

    def _first(self, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """Bitmap of what may be shown at an instant, and the rows with each reason not to be (4,): over everything."""
        before, by_time = self._uploads.before, self._uploads.by_time
        future = by_time[before(now_ms + 1) :]
        old = by_time[: 0 if self.max_age_ms is None else before(now_ms - self.max_age_ms)]
        shown_V = np.array(self._eligible_V)
        shown_V[future] = False
        shown_V[old] = False
        unavailable = self._windows.outside(now_ms)
        unavailable = unavailable[shown_V[unavailable]]
        shown_V[unavailable] = False
        return np.packbits(shown_V, bitorder="little"), np.array([0, len(future), len(old), len(unavailable)])

    def _moved(self, near: Stretch, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
        """The same from a stretch: only rows that changed between, and its edge, are looked at."""
        changed = self._changing(*sorted((near.begin_ms, now_ms)))
        counts = near.at_begin - self._counts(changed, near.begin_ms) + self._counts(changed, now_ms)
        bits, touched = near.bits.copy(), np.union1d(changed, near.edge_rows)
        shown = self._lifetimes(touched).reasons(now_ms, self.max_age_ms) == 0
        switch(bits, touched[~shown], on=False)
        switch(bits, touched[shown], on=True)
        return bits, counts

    def _changing(self, after_ms: int, last_ms: int) -> np.ndarray:
        """Rows whose reason may differ between the two instants, ascending."""
        before, by_time = self._uploads.before, self._uploads.by_time
        parts = [by_time[before(after_ms + 1) : before(last_ms + 1)], self._windows.changing(after_ms, last_ms)]
        if self.max_age_ms is not None:  # at exactly this age a video is still young: no + 1 here
            parts.append(by_time[before(after_ms - self.max_age_ms) : before(last_ms - self.max_age_ms)])
        return np.unique(np.concatenate(parts))

    def _lifetimes(self, rows_N: np.ndarray) -> Lifetimes:
        return Lifetimes(self._uploads.upload_ts_ms[rows_N], *self._attributes.windows_of(rows_N))

    def _counts(self, rows_N: np.ndarray, now_ms: int) -> np.ndarray:
        """(4,) rows by code; code 0 is left at 0."""
        counts = np.bincount(self._lifetimes(rows_N).reasons(now_ms, self.max_age_ms), minlength=4)
        counts[0] = 0
        return counts
