"""Calibration and order of the ranker by slice: where a probability that is right on average is wrong.

N test impressions, T tasks. A slice is a group of impressions that is known before their outcome: day, surface, how
active the viewer was, age and popularity of the video, its duration, whether its author is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from features.dataset import Dataset
from pipelines.metrics import auc, calibration, expected_calibration_error
from ranking.tasks import TASKS, task_labels

MIN_SLICE_POSITIVES = 50
"""With fewer the two standard errors are beyond a quarter; such a slice says nothing."""
ECE_BINS = 10
HOUR_MS = 3_600_000.0


@dataclass(frozen=True, slots=True)
class Slicing:
    """One way of parting impressions."""

    name: str
    labels: tuple[str, ...]
    code_N: np.ndarray
    """(N,) place in `labels`, -1 for a row that belongs to none."""


def slicings(dataset: Dataset, rows_N: np.ndarray, train_rows: np.ndarray, surfaces: Sequence[str]) -> list[Slicing]:
    """The ways of parting `rows_N`; activity and popularity are counted on the training rows (and undated ones)."""
    e = dataset.examples.take(rows_N)
    of_user, of_video = (
        np.bincount(np.asarray(getattr(dataset.examples, name)[train_rows]), minlength=size)
        + np.bincount(np.asarray(getattr(dataset.undated, name)), minlength=size)
        for name, size in (("user_row", len(dataset.users) + 1), ("video_row", len(dataset.videos) + 1))
    )
    uploaded_ms = np.asarray(dataset.upload_ts_ms[e.video_row])
    age_h = np.where(uploaded_ms < 0, np.nan, (e.ts_ms - uploaded_ms) / HOUR_MS)
    return [
        _named("day", [dataset.dates[day] for day in e.day]),
        _named("surface", surfaces),
        _between("viewer's training impressions", of_user[e.user_row], (1, 20, 100)),
        _between("video's training impressions", of_video[e.video_row], (1, 20, 100)),
        _between("video's age, h", age_h, (24, 24 * 7)),
        _between("duration, s", np.asarray(e.duration_ms, np.float64) / 1000.0, (10, 30, 60)),
        Slicing("author", ("not followed", "followed"), np.asarray(e.followed).astype(np.int64)),
    ]


def evaluate_slices(
    dataset: Dataset,
    rows_N: np.ndarray,
    tasks: tuple[str, ...],
    probability_NT: np.ndarray,
    parts: Sequence[Slicing],
) -> list[dict]:
    """A row a slice and task: positives, AUC, mean prediction over mean label with two of its standard errors, ECE
    over equal-mass bins, and the ECE that chance alone would give at these sizes."""
    labels_NT = task_labels(dataset.examples.take(rows_N))
    return [row for part in parts for row in _rows(part, tasks, probability_NT, labels_NT)]


def chance_calibration_error(predictions: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected ECE of predictions that are exactly right: mean over bins of E|mean of n Bernoulli draws - its mean|,
    by the normal approximation sqrt(2 / pi) * sd. What an ECE is above this is the model's."""
    p = np.sort(np.asarray(predictions, np.float64))
    parts = [part for part in np.array_split(p, bins) if len(part)]
    spread = [np.sqrt((part * (1 - part)).sum()) * np.sqrt(2 / np.pi) for part in parts]
    return float(np.sum(spread) / max(len(p), 1))


def _rows(part: Slicing, tasks: tuple[str, ...], probability_NT: np.ndarray, labels_NT: np.ndarray) -> Iterator[dict]:
    for code, label in enumerate(part.labels):
        inside_N = part.code_N == code
        for t, task in enumerate(tasks):
            y_N = labels_NT[:, TASKS.index(task)]
            at = inside_N & ~np.isnan(y_N)
            y, p = y_N[at].astype(np.float64), probability_NT[at, t].astype(np.float64)
            if min(y.sum(), len(y) - y.sum()) < MIN_SLICE_POSITIVES:
                continue
            yield {
                "slice": part.name,
                "value": label,
                "task": task,
                "rows": len(y),
                "positives": int(y.sum()),
                "auc": auc(y, p),
                "calibration": calibration(y, p),
                "two_se": 2.0 * float(np.sqrt((1 - y.mean()) / y.sum())),
                "ece": expected_calibration_error(y, p, ECE_BINS),
                "ece_by_chance": chance_calibration_error(p),
            }


def _named(name: str, values: Sequence[str]) -> Slicing:
    labels, code_N = np.unique(np.array([str(value) for value in values]), return_inverse=True)
    return Slicing(name, tuple(labels.tolist()), code_N)


def _between(name: str, value_N: np.ndarray, edges: tuple[int, ...]) -> Slicing:
    """Parts below, between and from the edges on; a value that is not known belongs to none."""
    labels = [f"< {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges))]
    code_N = np.searchsorted(np.array(edges), value_N, side="right")
    return Slicing(name, (*labels, f">= {edges[-1]}"), np.where(np.isnan(value_N), -1, code_N))
