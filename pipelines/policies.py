"""What replay can judge: a policy puts a value on every candidate of every logged request.

Values become slates by Plackett-Luce sampling (`conditional_probabilities`), the same law the feed explores by.
Shapes: R requests, C candidates of all requests one after another (`offsets` [R + 1] cuts them), N shown rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRequests:
    """The requests under evaluation and what the logger chose from, ordered by request_id."""

    request_id: list[str]
    user_id: Ints
    ts_ms: Ints
    surface: list[str | None]
    offsets: Ints
    """Request i's candidates are `video_ids[offsets[i]:offsets[i + 1]]`."""
    video_ids: Ints

    def per_request(self, values_C: Floats) -> list[Floats]:
        """Cut one value a candidate into one array a request."""
        return np.split(values_C, self.offsets[1:-1])

    def request_of_candidate(self) -> Ints:
        """Index of the request each candidate belongs to."""
        return np.repeat(np.arange(len(self.request_id)), np.diff(self.offsets))


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a policy may know: everything before the evaluated window, and the catalogue."""

    events: pl.DataFrame
    """Canonical events before the window."""
    videos: pl.DataFrame
    """The canonical videos table; no rows when the dataset has none."""


class Policy(Protocol):
    """Something that values candidates; higher values are shown more often."""

    name: str

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """One float64 array a request, aligned with its candidates."""
        ...


class Logged:
    """The policy that wrote the log: its probabilities are the logged propensities, so every weight is exactly 1."""

    name = "logged"


class Random:
    """Every candidate alike: the uniform policy."""

    name = "random"

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """Zeros."""
        return requests.per_request(np.zeros(len(requests.video_ids)))


class Popular:
    """Log of the video's positives of one signal before the window."""

    name = "popularity"

    def __init__(self, history: History, signal: str = "long_view") -> None:
        self._counts = history.events.group_by("video_id").agg(positives=pl.col(signal).cast(pl.Float64).sum())

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """log(1 + positives), 0 for a video nobody has seen."""
        found = _lookup(requests.video_ids, self._counts, "positives").fill_null(0.0).to_numpy()
        return requests.per_request(np.log1p(found))


class Newest:
    """The later the upload, the higher: minus the log of the age at the time of the request."""

    name = "newest"

    def __init__(self, history: History) -> None:
        known = "upload_ts_ms" in history.videos.columns and history.videos["upload_ts_ms"].is_not_null().any()
        if not known:
            raise ValueError("policy 'newest' needs upload_ts_ms in videos.parquet: add the column, or drop the policy")
        self._uploads = history.videos.select("video_id", "upload_ts_ms")

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """Videos without an upload time count as old as the oldest candidate."""
        upload_ms = _lookup(requests.video_ids, self._uploads, "upload_ts_ms").cast(pl.Float64).to_numpy()
        asked_ms = np.repeat(requests.ts_ms, np.diff(requests.offsets))
        age_h = np.maximum(asked_ms - upload_ms, 0) / HOUR_MS
        value = -np.log1p(age_h)
        return requests.per_request(np.where(np.isnan(value), np.nanmin(value, initial=0.0), value))


class ScoreFile:
    """Scores that somebody else computed: Parquet with request_id, video_id, score, one row a candidate."""

    def __init__(self, path: str | Path) -> None:
        self.name = Path(path).stem
        self._path = Path(path)
        schema = pl.read_parquet_schema(self._path)
        missing = [column for column in ("request_id", "video_id", "score") if column not in schema]
        if missing:
            raise ValueError(
                f"{self._path}: no column {', '.join(missing)}; a score file has request_id, video_id, score"
            )

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """The file's scores; a candidate without one, or with two, is an error that names it."""
        scores = pl.read_parquet(self._path, columns=["request_id", "video_id", "score"])
        twice = scores.filter(scores.select("request_id", "video_id").is_duplicated())
        if len(twice):
            raise ValueError(
                f"{self._path}: two scores for request {twice[0, 'request_id']}, video {twice[0, 'video_id']}"
            )
        wanted = pl.DataFrame(
            {
                "request_id": pl.Series(requests.request_id, dtype=pl.String).gather(requests.request_of_candidate()),
                "video_id": requests.video_ids,
            }
        )
        found = wanted.join(scores, on=["request_id", "video_id"], how="left", maintain_order="left")
        bad = found.filter(pl.col("score").is_null() | ~pl.col("score").cast(pl.Float64).is_finite())
        if len(bad):
            raise ValueError(
                f"{self._path}: no finite score for request {bad[0, 'request_id']}, video {bad[0, 'video_id']} "
                f"({len(bad)} of {len(found)} candidates): write one row for every logged candidate"
            )
        return requests.per_request(found["score"].cast(pl.Float64).to_numpy())


PolicyFactory = Callable[[str, History], Policy]
"""Makes a policy from what follows the colon of its name: `bundle:V` calls factories["bundle"]("V", history)."""

BUILT_IN: Mapping[str, PolicyFactory] = {
    "random": lambda _, history: Random(),
    "popularity": lambda signal, history: Popular(history, signal or "long_view"),
    "newest": lambda _, history: Newest(history),
    "file": lambda path, history: ScoreFile(path),
}


def resolve(name: str, history: History, factories: Mapping[str, PolicyFactory] | None = None) -> Policy | Logged:
    """The policy that a name like `popularity`, `file:scores.parquet` or `bundle:VERSION` stands for.

    `factories` adds kinds of policy to the built-in ones, or replaces them.
    """
    kind, _, argument = name.partition(":")
    if kind == Logged.name:
        return Logged()
    known = {**BUILT_IN, **(factories or {})}
    if kind not in known:
        raise ValueError(f"unknown policy '{name}': known are {', '.join(['logged', *sorted(known)])}")
    return known[kind](argument, history)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How values become a stochastic slate: Plackett-Luce without replacement, mixed with the uniform law."""

    temperature: float = 1.0
    """A value that is one temperature higher is e times as likely in a slot. Smaller is greedier."""
    epsilon: float = 0.05
    """Share of slots filled uniformly from what is left; keeps a policy from putting all its mass on a few videos."""
    standardise: bool = True
    """Divide values by their spread within the request first, so that one temperature means the same to every policy.
    Off, the values are taken as they are: right for a feed whose own temperature is known."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """Shown rows, ordered by (request, slot); slots run 0, 1, 2 ... within a request."""

    request: Ints
    """Index into the requests, [N]."""
    slot: Ints
    """Place in the slate, [N]."""
    candidate: Ints
    """Flat index of the shown video among all candidates, [N]."""


def conditional_probabilities(
    values_C: Floats, requests: LoggedRequests, shown: Shown, sampler: Sampler
) -> tuple[Floats, Floats]:
    """(probability, argmax share) of each shown video in its slot, given the slots before it as logged.

    The candidates of a slot are the request's, less those shown in earlier slots. The argmax share is 1 when the shown
    video has the highest value left, 1/n when n videos tie for it, else 0: what a greedy policy would have done.
    """
    counts = np.diff(requests.offsets)
    starts = requests.offsets[:-1]
    logits_C = _scaled(values_C, starts, counts, sampler)
    left_C = np.ones(len(values_C), dtype=bool)
    probability = np.empty(len(shown.slot))
    greedy = np.zeros(len(shown.slot))
    for slot in range(int(shown.slot.max(initial=-1)) + 1):
        rows = np.flatnonzero(shown.slot == slot)
        request, candidate = shown.request[rows], shown.candidate[rows]
        open_C = np.where(left_C, logits_C, -np.inf)
        best_R = np.maximum.reduceat(open_C, starts)
        with np.errstate(invalid="ignore"):  # -inf - -inf, in requests whose every candidate has been shown
            mass_C = np.where(left_C, np.exp(open_C - np.repeat(best_R, counts)), 0.0)
        total_R = np.add.reduceat(mass_C, starts)
        count_R = np.add.reduceat(left_C.astype(np.int64), starts)
        ties_R = np.add.reduceat((left_C & (open_C == np.repeat(best_R, counts))).astype(np.int64), starts)
        softmax = mass_C[candidate] / total_R[request]
        probability[rows] = (1 - sampler.epsilon) * softmax + sampler.epsilon / count_R[request]
        greedy[rows] = (logits_C[candidate] == best_R[request]) / ties_R[request]
        left_C[candidate] = False
    return probability, greedy


def _scaled(values_C: Floats, starts: Ints, counts: Ints, sampler: Sampler) -> Floats:
    if not sampler.standardise:
        return values_C / sampler.temperature
    mean_C = np.repeat(np.add.reduceat(values_C, starts) / counts, counts)
    centred_C = values_C - mean_C
    spread_C = np.repeat(np.sqrt(np.add.reduceat(centred_C**2, starts) / counts), counts)
    # Rounding leaves equal values a hair apart: below this they count as equal.
    flat_C = spread_C <= 1e-12 * np.maximum(np.abs(mean_C), 1.0)
    return np.where(flat_C, 0.0, centred_C / np.where(flat_C, 1.0, spread_C)) / sampler.temperature


def _lookup(video_ids: Ints, table: pl.DataFrame, column: str) -> pl.Series:
    wanted = pl.DataFrame({"video_id": video_ids})
    return wanted.join(table, on="video_id", how="left", maintain_order="left")[column]
