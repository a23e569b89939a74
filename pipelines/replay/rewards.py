"""What a shown row earned, by metric name: feedback signals, watch time, and what guardrails watch over."""

from __future__ import annotations

import numpy as np
import polars as pl

from features.schema import SIGNALS
from pipelines.replay.slates import Floats

WATCH_METRIC = "watch_s"
"""Seconds watched."""
QUICK_SKIP_MS = 2_000
"""A watch shorter than this is a skip: below two seconds nobody has seen what the video is about."""
FRESH_MS = 86_400_000
"""A video is fresh for a day after its upload."""

METRICS: dict[str, tuple[str, ...]] = {
    **{signal: (signal,) for signal in SIGNALS},
    WATCH_METRIC: ("watch_ms",),
    "quick_skip": ("watch_ms",),
    "fresh": ("ts_ms", "upload_ts_ms"),
    "unconnected": ("connected",),
}
"""The columns each metric is made of; `upload_ts_ms` comes from videos.parquet."""


def reward(rows: pl.DataFrame, metric: str) -> Floats:
    """One number a row; NaN where a column is missing or null."""
    if not set(METRICS[metric]) <= set(rows.columns):
        return np.full(len(rows), np.nan)
    first = pl.col(METRICS[metric][0])
    if metric == WATCH_METRIC:
        value = first.cast(pl.Float64) / 1000
    elif metric == "quick_skip":
        value = (first < QUICK_SKIP_MS).cast(pl.Float64)
    elif metric == "fresh":
        value = (first - pl.col("upload_ts_ms") < FRESH_MS).cast(pl.Float64)
    elif metric == "unconnected":
        value = 1.0 - first.cast(pl.Float64)
    else:
        value = first.cast(pl.Float64)
    return rows.select(value.fill_null(np.nan).alias("reward"))["reward"].to_numpy()
