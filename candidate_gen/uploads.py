"""Who uploaded what, and when: every author's videos, and all videos by upload time.

V video rows (row 0 unknown), A authors. Only eligible videos are listed: no request may be shown another. The arrays
are made once and memory-mapped, so that opening a catalogue of hundreds of millions sorts nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

_STEP = 4096
"""Rows looked at together while walking down a long order."""
FRESH = 1 << 18
"""Newest uploads that are looked at: for a viewer who may be shown next to nothing, the walk would not end."""
_SAVED = ("authors", "start", "rows", "by_time")


class RowSet(Protocol):
    """Rows that may be returned."""

    def has(self, rows_N: np.ndarray, /) -> np.ndarray:
        """(N,) bool."""
        ...


@dataclass(frozen=True, slots=True)
class Uploads:
    """Rows of eligible videos in two orders."""

    authors: np.ndarray
    """(A,) int64, ascending."""
    start: np.ndarray
    """(A+1,) offsets into `rows`."""
    rows: np.ndarray
    """int64, author after author, each author's newest first."""
    by_time: np.ndarray
    """int64 rows of known upload time, oldest first; of the same instant, the highest row first."""
    upload_ts_ms: np.ndarray
    """(V,) int64, negative where not known."""

    @classmethod
    def build(cls, author_id: np.ndarray, upload_ts_ms: np.ndarray, eligible: np.ndarray) -> Uploads:
        """From three arrays by video row; videos without an author (0) stand in `by_time` alone."""
        candidates = np.flatnonzero(eligible)
        candidates = candidates[candidates > 0]
        rows = candidates[author_id[candidates] != 0]
        rows = rows[np.lexsort((rows, -upload_ts_ms[rows], author_id[rows]))]
        authors, first = np.unique(author_id[rows], return_index=True)
        known = candidates[upload_ts_ms[candidates] >= 0]
        by_time = known[np.lexsort((-known, upload_ts_ms[known]))]
        return cls(authors, np.append(first, len(rows)), rows, by_time, upload_ts_ms)

    def of(self, authors: np.ndarray) -> np.ndarray:
        """Rows by these authors, author after author."""
        if len(self.authors) == 0:
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self.authors, authors), len(self.authors) - 1)
        at = at[self.authors[at] == authors]
        parts = [self.rows[self.start[i] : self.start[i + 1]] for i in at]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def before(self, ts_ms: int) -> int:
        """How many of `by_time` were uploaded before an instant."""
        return bisect_left(self.by_time, ts_ms, key=self.upload_ts_ms.__getitem__)

    def newest(self, now_ms: int, k: int, allowed: RowSet) -> np.ndarray:
        """The k newest allowed rows, of the FRESH newest uploaded at or before an instant, newest first."""
        uploaded = self.before(now_ms + 1)
        newest_first = self.by_time[max(uploaded - FRESH, 0) : uploaded][::-1]
        return newest_first[first_allowed(newest_first, allowed, k)]

    def save(self, folder: Path) -> None:
        """Write `uploads_NAME.npy` for each order into an existing folder; the times are the videos' own array."""
        for name in _SAVED:
            np.save(folder / f"uploads_{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, upload_ts_ms: np.ndarray) -> Uploads:
        """Memory-map what `save` wrote."""
        mapped = {name: np.load(folder / f"uploads_{name}.npy", mmap_mode="r", allow_pickle=False) for name in _SAVED}
        return cls(**{name: np.asarray(array) for name, array in mapped.items()}, upload_ts_ms=upload_ts_ms)


def first_allowed(order: np.ndarray, allowed: RowSet, k: int) -> np.ndarray:
    """Places in `order` of its first k allowed rows."""
    found: list[np.ndarray] = []
    missing = k
    for start in range(0, len(order), _STEP):
        if missing <= 0:
            break
        places = start + np.flatnonzero(allowed.has(order[start : start + _STEP]))[:missing]
        found.append(places)
        missing -= len(places)
    return np.concatenate(found) if found else np.zeros(0, np.int64)
