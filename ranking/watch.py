"""Watch time without its duration bias (D2Q, Zhan et al., KDD 2022): a quantile among videos of like duration.

Long videos are watched for more milliseconds at equal interest, so the ranker learns the quantile of the watch time
inside a duration bucket; the tables here turn a quantile back into milliseconds. N rows, K buckets, Q grid points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from features.inputs import Inputs
from features.spec import Content, Numeric
from features.transforms import Encoder

GRID = np.linspace(0.0, 1.0, 101)
"""Quantiles at which each bucket's watch times are kept."""
ROWS_PER_BUCKET = 200
"""A bucket with fewer rows would keep noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DurationColumn:
    """Where a video's duration lies among its dense features, so that training and serving read the same number."""

    index: int
    mean: float
    deviation: float
    log: bool

    @classmethod
    def find(cls, encoder: Encoder) -> Self | None:
        """The numeric feature over `duration_ms`; None when the spec has none."""
        index = 0
        for feature in encoder.spec.video:
            if isinstance(feature, Numeric):
                if feature.column == "duration_ms":
                    mean, deviation = encoder.stats[f"video.{feature.name}"]
                    return cls(index=index, mean=mean, deviation=deviation, log=feature.log)
                index += 1
            elif isinstance(feature, Content):
                index += feature.dim
        return None

    def duration_ms(self, video_dense_ND: np.ndarray) -> np.ndarray:
        """Undo the standardisation: (N,) float64; a missing duration comes out as the training data's mean."""
        raw_N = video_dense_ND[:, self.index].astype(np.float64) * self.deviation + self.mean
        return np.expm1(raw_N) if self.log else raw_N


@dataclass(frozen=True, slots=True)
class WatchQuantiles:
    """Quantile tables of the watch time by duration bucket."""

    edges_ms: np.ndarray
    """(K-1,) float64, ascending: bucket k holds durations in edges[k-1] .. edges[k]."""
    watch_ms_KQ: np.ndarray
    """(K, len(GRID)) float64, ascending along a row."""
    duration: DurationColumn | None
    """None: one bucket for everything."""

    @classmethod
    def fit(
        cls, watch_ms_N: np.ndarray, duration_ms_N: np.ndarray, duration: DurationColumn | None, max_buckets: int = 20
    ) -> Self:
        """Buckets of equal mass over the rows whose watch time was logged; all zeros when none was."""
        logged = np.isfinite(watch_ms_N)
        watch, length = watch_ms_N[logged].astype(np.float64), duration_ms_N[logged]
        if not logged.any():
            return cls(np.zeros(0), np.zeros((1, len(GRID))), duration)
        buckets = int(np.clip(len(watch) // ROWS_PER_BUCKET, 1, max_buckets))
        edges = np.unique(np.quantile(length, np.linspace(0, 1, buckets + 1)[1:-1]))
        bucket_N = np.searchsorted(edges, length, side="right")
        filled = np.unique(bucket_N)
        edges = edges[filled[1:] - 1]
        bucket_N = np.searchsorted(edges, length, side="right")
        return cls(edges, np.stack([np.quantile(watch[bucket_N == k], GRID) for k in range(len(edges) + 1)]), duration)

    def durations(self, inputs: Inputs) -> np.ndarray:
        """Duration of each candidate (N,), in ms; zeros without a duration feature."""
        return self.durations_of(inputs.video_dense_UD[inputs.candidate_N])

    def durations_of(self, video_dense_ND: np.ndarray) -> np.ndarray:
        """Duration of each encoded video (N,), in ms; zeros without a duration feature."""
        return np.zeros(len(video_dense_ND)) if self.duration is None else self.duration.duration_ms(video_dense_ND)

    def quantile(self, watch_ms_N: np.ndarray, duration_ms_N: np.ndarray) -> np.ndarray:
        """(N,) float32 in 0 .. 1, the middle of a tie; NaN where the watch time is."""
        out_N = np.full(len(watch_ms_N), np.nan, np.float32)
        logged = np.isfinite(watch_ms_N)
        bucket_N = np.searchsorted(self.edges_ms, duration_ms_N, side="right")
        for k, table_Q in enumerate(self.watch_ms_KQ):
            at = np.flatnonzero(logged & (bucket_N == k))
            lowest, first = np.unique(table_Q, return_index=True)
            last = np.append(first[1:], len(table_Q)) - 1
            out_N[at] = np.interp(watch_ms_N[at], lowest, (GRID[first] + GRID[last]) / 2)
        return out_N

    def watch_ms(self, quantile_N: np.ndarray, duration_ms_N: np.ndarray) -> np.ndarray:
        """The inverse: (N,) float32 milliseconds. At an expected quantile this is nearer to a median than to a mean:
        watch times have a long tail, so it lies below their average."""
        out_N = np.zeros(len(quantile_N), np.float32)
        bucket_N = np.searchsorted(self.edges_ms, duration_ms_N, side="right")
        for k in np.unique(bucket_N):
            at = bucket_N == k
            out_N[at] = np.interp(quantile_N[at], GRID, self.watch_ms_KQ[k])
        return out_N

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `from_json` is the inverse."""
        duration = None
        if self.duration is not None:
            d = self.duration
            duration = {"index": d.index, "mean": d.mean, "deviation": d.deviation, "log": d.log}
        return {"edges_ms": self.edges_ms.tolist(), "watch_ms": self.watch_ms_KQ.tolist(), "duration": duration}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        duration = None if fields["duration"] is None else DurationColumn(**fields["duration"])
        return cls(np.array(fields["edges_ms"], np.float64), np.array(fields["watch_ms"], np.float64), duration)
