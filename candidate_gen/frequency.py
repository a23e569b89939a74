"""How often a positive video is drawn as another row's negative: the frequencies that logQ divides by.

M (video, instant) pairs, T targets (positive impressions). A video lives for days, so its share of the whole log would
count it as rarer than it is while it is fresh; both estimates therefore know the instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from features.dataset import Dataset


class Frequencies(Protocol):
    """Share of a video among the positives around an instant."""

    def share(self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray) -> np.ndarray:
        """(M,) float64, 0 where the video has no positive there."""
        ...


@dataclass(frozen=True, slots=True)
class DayShare:
    """The video's share of the day's positives, counted: exact, where the whole day lies before the trainer."""

    key: np.ndarray
    """Sorted day * videos + row."""
    counted: np.ndarray
    n_videos: int

    @classmethod
    def of(cls, dataset: Dataset, target: np.ndarray) -> DayShare:
        """Count these positives (rows of `Dataset.examples`)."""
        n_videos, day = len(dataset.videos) + 1, dataset.examples.day[target]
        key, count = np.unique(day * n_videos + dataset.examples.video_row[target], return_counts=True)
        return cls(key, count / np.bincount(day)[key // n_videos], n_videos)

    def share(self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray) -> np.ndarray:
        """As `Frequencies`."""
        wanted_M = day_M * self.n_videos + row_M
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
    def of(cls, dataset: Dataset, target: np.ndarray) -> StreamingShare:
        """Stream these positives in order of time. A video's first gap is unknown: it counts as one like any other's,
        as many positives as there are videos."""
        e, n_videos = dataset.examples, len(dataset.videos)
        by_time = target[np.argsort(e.ts_ms[target], kind="stable")]
        place = np.argsort(e.video_row[by_time], kind="stable")  # in the stream; by video, then time
        row, ts_ms = e.video_row[by_time][place], e.ts_ms[by_time][place]
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        gap = np.full(len(row), float(n_videos))
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
