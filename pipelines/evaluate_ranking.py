"""Per-task quality of the ranker on days it never saw, beside what it has to beat.

N test impressions, T tasks. Scores are what serving would compute: slot hidden, probabilities calibrated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from features.dataset import Dataset
from features.schema import SIGNALS
from pipelines.baselines import FactorisationMachine, Popularity, RandomOrder
from pipelines.metrics import (
    auc,
    calibration,
    expected_calibration_error,
    gauc,
    kuairand_primary,
    mae,
    normalised_entropy,
    reliability,
    xauc,
)
from pipelines.slices import chance_calibration_error
from ranking.infer import Ranker
from ranking.tasks import TASKS, task_labels

CHUNK = 2048
MIN_POSITIVES = 20
"""A task with fewer positives on the test days has no AUC worth printing."""
DURATION_BUCKETS = 5


def score_examples(
    dataset: Dataset, ranker: Ranker, rows_N: np.ndarray, on_progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities (N, T), watch_ms (N,)) as a bundle made before the first of these days would score each row:
    its histories follow the user, its counters stand still."""
    counters_day = int(dataset.examples.day[rows_N].min())
    probabilities, watch = [], []
    for start in range(0, len(rows_N), CHUNK):
        scores = ranker.score(dataset.inputs(rows_N[start : start + CHUNK], with_slot=False, counters_day=counters_day))
        probabilities.append(scores.probability_NT)
        watch.append(scores.watch_ms_N)
        if on_progress:
            on_progress(min(start + CHUNK, len(rows_N)))
    return np.concatenate(probabilities), np.concatenate(watch)


def evaluate_tasks(
    dataset: Dataset,
    rows_N: np.ndarray,
    tasks: tuple[str, ...],
    probability_NT: np.ndarray,
    validation_rows: np.ndarray,
    oracle: dict[str, np.ndarray] | None = None,
) -> list[dict]:
    """One row a task: counts, AUC, GAUC, normalised entropy, calibration, ECE; the oracle's AUC where known."""
    e = dataset.examples
    labels_NT, fitted_on_NT = (task_labels(e.take(rows)) for rows in (rows_N, validation_rows))
    out = []
    for t, task in enumerate(tasks):
        labels = labels_NT[:, TASKS.index(task)]
        logged = ~np.isnan(labels)
        fitted_on = np.nansum(fitted_on_NT[:, TASKS.index(task)])
        y, p, users = labels[logged], probability_NT[logged, t], e.user_row[rows_N][logged]
        row: dict = {"task": task, "rows": int(logged.sum()), "positives": int(y.sum())}
        if MIN_POSITIVES <= y.sum() <= len(y) - MIN_POSITIVES:
            row |= {
                "auc": auc(y, p),
                "gauc": gauc(y, p, users),
                "normalised_entropy": normalised_entropy(y, p),
                "calibration": calibration(y, p),
                "calibration_two_se": 2.0 * float(np.sqrt(1.0 / y.sum() + 1.0 / max(fitted_on, 1.0))),
                "ece": expected_calibration_error(y, p),
                "ece_by_chance": chance_calibration_error(p, bins=20),
            }
            if oracle is not None:
                gap, error = auc_gap(y, oracle[task][logged], p)
                row |= {"oracle_auc": auc(y, oracle[task][logged]), "oracle_gap": gap, "oracle_gap_se": error}
        out.append(row)
    return out


def evaluate_watch(dataset: Dataset, rows_N: np.ndarray, watch_ms_N: np.ndarray) -> dict:
    """Watch time in seconds: mean absolute error, pair order, and the means of what was watched and predicted (a
    typical watch time lies below the average one), over all and by bucket of the duration."""
    actual, duration = dataset.examples.watch_ms[rows_N], dataset.examples.duration_ms[rows_N]
    logged = ~np.isnan(actual) & ~np.isnan(duration)
    y, p = actual[logged] / 1000.0, watch_ms_N[logged] / 1000.0
    return watch_figures(y, p) | {"buckets": watch_by_duration(y, p, duration[logged] / 1000.0)}


def watch_figures(actual_s: np.ndarray, predicted_s: np.ndarray) -> dict:
    """Rows, MAE, XAUC, and both means."""
    if len(actual_s) == 0:
        return {"rows": 0}
    return {
        "rows": len(actual_s),
        "mae_s": mae(actual_s, predicted_s),
        "xauc": xauc(actual_s, predicted_s),
        "mean_s": float(actual_s.mean()),
        "mean_predicted_s": float(predicted_s.mean()),
    }


def watch_by_duration(actual_s: np.ndarray, predicted_s: np.ndarray, duration_s: np.ndarray) -> list[dict]:
    """The same figures in buckets of the duration of equal mass, shortest first."""
    if len(duration_s) == 0:
        return []
    edges = np.unique(np.quantile(duration_s, np.linspace(0, 1, DURATION_BUCKETS + 1)[1:-1]))
    bucket = np.searchsorted(edges, duration_s, side="right")
    out = []
    for at in (bucket == k for k in np.unique(bucket)):
        span = f"{duration_s[at].min():.0f} to {duration_s[at].max():.0f}"
        out.append({"duration_s": span} | watch_figures(actual_s[at], predicted_s[at]))
    return out


def auc_gap(labels: np.ndarray, better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """AUC of one score less that of another on the same rows, and its standard error (DeLong et al., 1988: the
    variance of each row's share in the difference, positives and negatives by themselves)."""
    positive = labels > 0
    share = _placements(labels, better) - _placements(labels, worse)
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (share[positive], share[~positive]))
    return auc(labels, better) - auc(labels, worse), float(np.sqrt(variance))


def _placements(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For a positive the share of negatives below it, for a negative the share of positives above it; ties half."""
    positive = labels > 0
    out = np.empty(len(scores))
    for own, sign in ((positive, 1.0), (~positive, -1.0)):
        others = np.sort(sign * scores[~own])
        asked = sign * scores[own]
        low, high = (np.searchsorted(others, asked, side=side) for side in ("left", "right"))
        out[own] = (low + high) / 2 / len(others)
    return out


def evaluate_protocol(
    dataset: Dataset,
    rows_N: np.ndarray,
    score_N: np.ndarray,
    *,
    train_rows: np.ndarray,
    events: pl.DataFrame,
    videos: pl.DataFrame,
    undated: pl.DataFrame | None,
    signal: str = "long_view",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict]:
    """KuaiRand's protocol for one signal: the ranker, random order, popularity and factorisation machines.

    `events` holds the same rows in the same order as the dataset's examples. A baseline marked "+ undated" also
    trains on the undated impressions, whose counts and histories the ranker reads as features.
    """
    labels = dataset.examples.signals[rows_N, SIGNALS.index(signal)].astype(np.float64)
    users = dataset.examples.user_row[rows_N]
    test, train = events[rows_N], events[train_rows]
    scores = {"reelrank ranker": score_N, "random": RandomOrder(seed).fit(train, signal).score(test)}
    with_undated = _stack(undated, train, signal) if undated is not None else None
    for name, rows in (("", train), (" + undated", with_undated)):
        if rows is not None:
            scores[f"popularity{name}"] = Popularity().fit(rows, signal).score(test)
            machine = FactorisationMachine(videos, progress=progress)
            scores[f"factorisation machine{name}"] = machine.fit(rows, signal).score(test)
    out = []
    for name, score in scores.items():
        g, ndcg5, primary = kuairand_primary(labels, score, users, seed)
        out.append({"name": name, "gauc": g, "ndcg5": ndcg5, "primary": primary})
    return out


def reliability_points(labels: np.ndarray, predictions: np.ndarray) -> dict:
    """The calibration curve as lists, for the report."""
    curve = reliability(labels, predictions)
    return {
        "predicted": curve.predicted.tolist(),
        "observed": curve.observed.tolist(),
        "rows": curve.rows.tolist(),
    }


def _stack(undated: pl.DataFrame, train: pl.DataFrame, signal: str) -> pl.DataFrame:
    columns = ["user_id", "video_id", signal]
    undated_rows = undated.select(columns).with_columns(ts_ms=pl.lit(None, dtype=pl.Int64))
    return pl.concat([undated_rows, train.select([*columns, "ts_ms"])], how="vertical_relaxed")
