"""What replay can judge: a policy puts a value on every candidate of every logged request.

Values become slates by Plackett-Luce sampling (`sampling.py`), the same law the feed explores by. A policy that only
knows the probability of what was logged can be judged too (`ActionProbabilities`).
Shapes: C candidates of all requests one after another, N shown rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from pipelines.replay.sampling import Law, Sampled, Sampler
from pipelines.replay.score_files import ActionProbabilities, ScoreFile, open_score_file
from pipelines.replay.slates import Floats, Ints, LoggedRequests

HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a policy may know: everything before the evaluated window, and the catalogue."""

    events: pl.LazyFrame
    """Canonical events before the window."""
    videos: pl.DataFrame
    """The canonical videos table; no rows when the dataset has none."""
    start_ms: int = 0
    """The window's first moment."""
    log: pl.LazyFrame = field(default_factory=pl.LazyFrame)
    """All the log's events, the window's too: a user's history as of a request, and nothing else, may be made of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Valued:
    """What a policy says of candidates."""

    values_C: Floats
    predicted: dict[str, Floats] = field(default_factory=dict)
    """Its predictions by metric (chances of signals, `watch_s` in seconds), one a candidate: judged, not used."""
    law: Law | None = None
    """How its values become slates, where it has a way of its own; None: by the run's sampler."""

    def law_by(self, sampler: Sampler) -> Law:
        """Its own, or else the sampler's."""
        return self.law or Sampled(values_C=self.values_C, sampler=sampler)


class Policy(Protocol):
    """Something that values candidates; higher values are shown more often."""

    name: str

    def values(self, requests: LoggedRequests) -> Floats | Sequence[Floats] | Valued:
        """One float64 a candidate in one flat array, or one array a request."""
        ...


class Logged:
    """The policy that wrote the log: its probabilities are the logged propensities, so every weight is exactly 1."""

    name = "logged"


class Random:
    """Every candidate alike: the uniform policy."""

    name = "random"

    def values(self, requests: LoggedRequests) -> Floats:
        """Zeros."""
        return np.zeros(len(requests.video_ids))


class Popular:
    """Log of the video's positives of one signal before the window."""

    name = "popularity"

    def __init__(self, history: History, signal: str = "long_view") -> None:
        positives = pl.col(signal).cast(pl.Float64).sum()
        self._counts = history.events.group_by("video_id").agg(positives=positives).collect()

    def values(self, requests: LoggedRequests) -> Floats:
        """log(1 + positives), 0 for a video nobody has seen."""
        return np.log1p(_lookup(requests.video_ids, self._counts, "positives").fill_null(0.0).to_numpy())


class Newest:
    """The later the upload, the higher: minus the log of the age at the time of the request."""

    name = "newest"

    def __init__(self, history: History) -> None:
        known = "upload_ts_ms" in history.videos.columns and history.videos["upload_ts_ms"].is_not_null().any()
        if not known:
            raise ValueError("policy 'newest' needs upload_ts_ms in videos.parquet: add the column, or drop the policy")
        self._uploads = history.videos.select("video_id", "upload_ts_ms")
        self._first_ms = float(self._uploads["upload_ts_ms"].cast(pl.Float64).to_numpy().min())

    def values(self, requests: LoggedRequests) -> Floats:
        """Videos without an upload time count as old as the oldest of the catalogue."""
        upload = _lookup(requests.video_ids, self._uploads, "upload_ts_ms").cast(pl.Float64)
        asked_ms = np.repeat(requests.ts_ms, np.diff(requests.offsets))
        age_h = np.maximum(asked_ms - upload.fill_null(self._first_ms).to_numpy(), 0) / HOUR_MS
        return -np.log1p(age_h)


Judged = Policy | Logged | ActionProbabilities
PolicyFactory = Callable[[str, History], "Policy | ActionProbabilities"]
"""Makes a policy from what follows the colon of its name: `bundle:V` calls factories["bundle"]("V", history)."""

BUILT_IN: Mapping[str, PolicyFactory] = {
    "random": lambda _, history: Random(),
    "popularity": lambda signal, history: Popular(history, signal or "long_view"),
    "newest": lambda _, history: Newest(history),
    "file": lambda path, history: open_score_file(Path(path)),
}
YARDSTICKS: tuple[type, ...] = (Logged, Random, Popular, Newest)
"""What others are compared with. Nobody ships them, so guardrails are shown for them and fail nothing."""


def resolve(name: str, history: History, factories: Mapping[str, PolicyFactory] | None = None) -> Judged:
    """The policy that a name like `popularity`, `file:scores.parquet` or `bundle:VERSION` stands for.

    `factories` adds kinds of policy to the built-in ones, or replaces them. Raises ValueError for an unknown name.
    """
    kind, _, argument = name.partition(":")
    if kind == Logged.name:
        return Logged()
    known = {**BUILT_IN, **(factories or {})}
    if kind not in known:
        raise ValueError(f"unknown policy '{name}': known are {', '.join(['logged', *sorted(known)])}")
    return known[kind](argument, history)


def _lookup(video_ids: Ints, table: pl.DataFrame, column: str) -> pl.Series:
    wanted = pl.DataFrame({"video_id": video_ids})
    return wanted.join(table, on="video_id", how="left", maintain_order="left")[column]


__all__ = [
    "YARDSTICKS",
    "ActionProbabilities",
    "History",
    "Judged",
    "Logged",
    "Newest",
    "Policy",
    "PolicyFactory",
    "Popular",
    "Random",
    "ScoreFile",
    "Valued",
    "resolve",
]
