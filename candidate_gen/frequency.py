"""How often a positive video is drawn as another row's negative: the frequencies that logQ divides by.

M (video, instant) pairs, T positive impressions. A video lives for days, so its share of the whole log would
count it as rarer than it is while it is fresh; both estimates therefore know the instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Frequencies(Protocol):
    """Share of a video among the positives around an instant."""

    def share(self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray) -> np.ndarray:
        """(M,) float64, 0 where the video has no positive there."""
        ...


@dataclass(frozen=True, slots=True)
class DayShare:
    """The video's share of the day's positives, counted: exact, where the whole day lies before the trainer."""

    key: np.ndarray
    """Sorted (day + 1) * videos + row."""
    counted: np.ndarray
    n_rows: int

    @classmethod
    def of(cls, row_T: np.ndarray, day_T: np.ndarray, ts_ms_T: np.ndarray, n_rows: int) -> DayShare:
        """Count these positives of videos 0 .. n_rows-1; day -1 is all the time before the log."""
        key, count = np.unique((day_T + 1) * n_rows + row_T, return_counts=True)
        return cls(key, count / np.bincount(day_T + 1)[key // n_rows], n_rows)

    def share(self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray) -> np.ndarray:
        """As `Frequencies`."""
        wanted_M = (day_M + 1) * self.n_rows + row_M
        at_M = np.minimum(np.searchsorted(self.key, wanted_M), len(self.key) - 1)
        return np.where(self.key[at_M] == wanted_M, self.counted[at_M], 0.0)


RATE = 0.1
"""Weight of a new gap in the moving average of gaps."""


@dataclass(frozen=True, slots=True)
class StreamingShare:
    """One over the video's mean gap between positives, a moving average that is kept as the log streams by (Yi et al.,
    RecSys 2019, their algorithm 2, with one positive a step). It needs no more than two numbers a video and nothing
    of the future, but some ten positives of a video before it can be trusted.

    Rows number videos densely, so that the two numbers lie in plain arrays and need no hashing."""

    key: np.ndarray
    """(T,) row * span_ms + time since first_ms, ascending: targets by video, then time."""
    gap: np.ndarray
    """(T,) the average after this target."""
    first_ms: int
    span_ms: int

    @classmethod
    def of(cls, row_T: np.ndarray, day_T: np.ndarray, ts_ms_T: np.ndarray, n_rows: int) -> StreamingShare:
        """Stream these positives in order of time. A video's first gap is unknown: it counts as long as if all n_rows
        videos came equally often."""
        by_time = np.argsort(ts_ms_T, kind="stable")
        place = np.argsort(row_T[by_time], kind="stable")  # in the stream; by video, then time
        row, ts_ms = row_T[by_time][place], ts_ms_T[by_time][place]
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        gap = np.full(len(row), float(n_rows))
        for n in range(1, int(nth.max()) + 1):
            at = np.flatnonzero(nth == n)
            gap[at] = (1 - RATE) * gap[at - 1] + RATE * (place[at] - place[at - 1])
        first_ms, span_ms = int(ts_ms.min()), int(np.ptp(ts_ms)) + 1
        return cls(row * span_ms + (ts_ms - first_ms), gap, first_ms, span_ms)

    def share(self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray) -> np.ndarray:
        """As `Frequencies`: by the video's last positive up to the instant."""
        wanted_M = row_M * self.span_ms + np.clip(ts_ms_M - self.first_ms, -1, self.span_ms - 1)
        at_M = np.searchsorted(self.key, wanted_M, side="right") - 1
        had_M = (at_M >= 0) & (self.key[at_M] // self.span_ms == row_M)
        return np.where(had_M, 1.0 / self.gap[at_M], 0.0)
