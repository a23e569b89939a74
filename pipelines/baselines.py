"""What a learned ranker or retriever must beat: random order, item popularity, a plain factorisation machine.

Rankers fit on rows of (user_id, video_id, signal) and score (user_id, video_id) rows; rows with a null signal teach
nothing. Shapes: N rows, F fields, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from pipelines.metrics import kuairand_primary, log_loss

Floats = npt.NDArray[np.float64]
DAY_MS = 86_400_000


class Baseline(Protocol):
    """A ranker that needs no features but ids."""

    name: str

    def fit(self, rows: pl.DataFrame, signal: str) -> Self:
        """Learn from rows with user_id, video_id and `signal` (0, 1 or null); ts_ms may be null or absent."""
        ...

    def score(self, rows: pl.DataFrame) -> Floats:
        """One score a row, higher is better."""
        ...


class RandomOrder:
    """Scores drawn from a seed."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def fit(self, rows: pl.DataFrame, signal: str) -> Self:
        """Nothing to learn."""
        return self

    def score(self, rows: pl.DataFrame) -> Floats:
        """Independent uniform numbers, the same ones at every call."""
        return np.random.default_rng(self._seed).random(len(rows))


class Popularity:
    """The video's rate of the signal, drawn towards the overall rate as if by `strength` further impressions."""

    name = "popularity"

    def __init__(self, strength: float = 20.0) -> None:
        self._strength = strength
        self._rates = pl.DataFrame({"video_id": [], "rate": []}, schema={"video_id": pl.Int64, "rate": pl.Float64})
        self._base_rate = 0.0

    def fit(self, rows: pl.DataFrame, signal: str) -> Self:
        """Count impressions and positives of each video."""
        known = rows.filter(pl.col(signal).is_not_null())
        self._base_rate = float(known[signal].cast(pl.Float64).to_numpy().mean()) if len(known) else 0.0
        smoothed = (pl.col(signal).sum() + self._strength * self._base_rate) / (pl.len() + self._strength)
        self._rates = known.group_by("video_id").agg(rate=smoothed)
        return self

    def score(self, rows: pl.DataFrame) -> Floats:
        """The smoothed rate; an unseen video gets the overall rate."""
        joined = rows.select("video_id").join(self._rates, on="video_id", how="left", maintain_order="left")
        return joined["rate"].fill_null(self._base_rate).to_numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorisationMachineConfig:
    dim: int = 16
    """Width of each field's factor vector."""
    max_epochs: int = 5
    """Epochs tried on the validation day; the best one's count is then trained on all rows."""
    batch_size: int = 512
    """Rows a step."""
    learning_rate: float = 0.02
    """Adagrad's step size."""
    l2: float = 1e-5
    """Adagrad's weight decay, on weights and factors alike."""
    duration_buckets: int = 10
    """Equal-mass buckets of the videos' durations."""
    seed: int = 0
    """Of the initial factors and the order of rows."""


class FactorisationMachine:
    """Rendle's factorisation machine over user, video, author, first tag and duration bucket; logistic loss.

    The number of epochs is the one with the best long_view-protocol primary on the last day of the training rows;
    the model is then trained afresh on all of them. Ids that training has not seen share one row a field.
    """

    name = "factorisation machine"

    def __init__(
        self,
        videos: pl.DataFrame,
        config: FactorisationMachineConfig | None = None,
        progress: Callable[[str], None] = print,
    ) -> None:
        self._config = config or FactorisationMachineConfig()
        self._fields = _video_fields(videos, self._config.duration_buckets)
        self._progress = progress
        self._vocabulary: list[npt.NDArray[np.int64]] = []
        self._bias = 0.0
        self._weight = torch.zeros(0)
        self._factor = torch.zeros(0, self._config.dim)

    def fit(self, rows: pl.DataFrame, signal: str) -> Self:
        """Choose the number of epochs on the last day, then train on every row."""
        known = rows.filter(pl.col(signal).is_not_null())
        last_day = _is_last_day(known)
        epochs = self._config.max_epochs
        if last_day.any() and not last_day.all():
            epochs = self._choose_epochs(known.filter(~last_day), known.filter(last_day), signal)
        self._train(known, signal, epochs, after_epoch=None)
        return self

    def score(self, rows: pl.DataFrame) -> Floats:
        """Logits, in float64."""
        with torch.no_grad():
            return self._logits(self._encode(rows)).double().numpy()

    def _choose_epochs(self, train: pl.DataFrame, held_out: pl.DataFrame, signal: str) -> int:
        labels, users = held_out[signal].to_numpy(), held_out["user_id"].to_numpy()
        found: list[float] = []

        def measure(epoch: int) -> None:
            logits = self.score(held_out)
            primary = kuairand_primary(labels, logits, users)[2]
            loss = log_loss(labels, 1 / (1 + np.exp(-logits)))
            found.append(primary)
            self._progress(
                f"factorisation machine: epoch {epoch}, last day's primary {primary:.4f}, log loss {loss:.4f}"
            )

        self._train(train, signal, self._config.max_epochs, after_epoch=measure)
        return int(np.nanargmax(found)) + 1 if not np.isnan(found).all() else self._config.max_epochs

    def _train(self, rows: pl.DataFrame, signal: str, epochs: int, after_epoch: Callable[[int], None] | None) -> None:
        config = self._config
        raw_NF = self._raw_fields(rows)
        self._vocabulary = [np.unique(raw_NF[:, field]) for field in range(raw_NF.shape[1])]
        ids_NF = self._encode(rows)
        labels = torch.from_numpy(rows[signal].cast(pl.Float32).to_numpy().copy())
        rate = float(labels.mean().clamp(1e-4, 1 - 1e-4))
        self._bias = float(np.log(rate / (1 - rate)))
        size = sum(len(values) + 1 for values in self._vocabulary)
        generator = torch.Generator().manual_seed(config.seed)
        self._weight = torch.zeros(size, requires_grad=True)
        self._factor = (torch.randn(size, config.dim, generator=generator) * 0.01).requires_grad_()
        optimiser = torch.optim.Adagrad([self._weight, self._factor], lr=config.learning_rate, weight_decay=config.l2)
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(labels), generator=generator).split(config.batch_size):
                optimiser.zero_grad()
                logits = self._logits(ids_NF[batch])
                torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[batch]).backward()
                optimiser.step()
            if after_epoch:
                after_epoch(epoch)

    def _logits(self, ids_NF: torch.Tensor) -> torch.Tensor:
        factors_NFD = torch.nn.functional.embedding(ids_NF, self._factor)
        pairs_ND = factors_NFD.sum(1).square() - factors_NFD.square().sum(1)
        return self._bias + self._weight[ids_NF].sum(1) + pairs_ND.sum(1) / 2

    def _raw_fields(self, rows: pl.DataFrame) -> npt.NDArray[np.int64]:
        ids = rows.select(pl.col("user_id", "video_id").cast(pl.Int64))
        joined = ids.join(self._fields, on="video_id", how="left", maintain_order="left")
        return (
            joined.select("user_id", "video_id", "author_id", "first_tag", "duration_bucket").fill_null(-1).to_numpy()
        )

    def _encode(self, rows: pl.DataFrame) -> torch.Tensor:
        """Row of the parameter tables for each field; place 0 of a field's range is the unseen id's."""
        raw_NF = self._raw_fields(rows)
        ids_NF = np.empty(raw_NF.shape, dtype=np.int64)
        offset = 0
        for field, values in enumerate(self._vocabulary):
            at = np.minimum(np.searchsorted(values, raw_NF[:, field]), len(values) - 1)
            ids_NF[:, field] = offset + np.where(values[at] == raw_NF[:, field], at + 1, 0)
            offset += len(values) + 1
        return torch.from_numpy(ids_NF)


def popular_videos(
    events: pl.DataFrame, signal: str, count: int, *, now_ms: int | None = None, days: float | None = None
) -> npt.NDArray[np.int64]:
    """The `count` videos with the most positives of `signal` in the `days` before `now_ms`, best first.

    Without `days` the whole log counts. Equal counts are ordered by id, so the answer is the same on every machine.
    """
    rows = events
    if days is not None:
        end_ms = now_ms if now_ms is not None else int(events["ts_ms"].to_numpy().max()) + 1
        rows = events.filter(pl.col("ts_ms").is_between(end_ms - round(days * DAY_MS), end_ms, closed="left"))
    counts = (
        rows.group_by("video_id").agg(positives=pl.col(signal).cast(pl.Int64).sum()).filter(pl.col("positives") > 0)
    )
    return counts.sort(["positives", "video_id"], descending=[True, False])["video_id"].head(count).to_numpy()


def _video_fields(videos: pl.DataFrame, duration_buckets: int) -> pl.DataFrame:
    durations = videos["duration_ms"].cast(pl.Float64).to_numpy()
    edges = np.unique(np.nanquantile(durations, np.linspace(0, 1, duration_buckets + 1)[1:-1]))
    bucket = np.where(np.isnan(durations), -1, np.searchsorted(edges, durations, side="right"))
    return videos.select(
        pl.col("video_id").cast(pl.Int64),
        pl.col("author_id").cast(pl.Int64),
        first_tag=pl.col("tags").list.first().cast(pl.Int64),
        duration_bucket=pl.Series(bucket),
    )


def _is_last_day(rows: pl.DataFrame) -> pl.Series:
    """Rows of the last 24 hours; undated rows are never among them."""
    if "ts_ms" not in rows.columns or rows["ts_ms"].null_count() == len(rows):
        return pl.Series(np.zeros(len(rows), dtype=bool))
    last_ms = int(rows["ts_ms"].drop_nulls().to_numpy().max())
    return (rows["ts_ms"] > last_ms - DAY_MS).fill_null(value=False)
