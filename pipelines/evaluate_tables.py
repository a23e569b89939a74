"""What it costs to serve embedding tables as codes: the same rows scored with float32 tables and with frozen ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from features.dataset import Dataset
from pipelines.evaluate_ranking import MIN_POSITIVES, score_examples
from pipelines.metrics import auc, normalised_entropy
from ranking.freeze import FrozenSize
from ranking.infer import Ranker
from ranking.tasks import TASKS, task_labels

COMPARED_ROWS = 50_000
"""Test rows, evenly spread: a difference on the same rows needs far fewer than a level does."""


def evaluate_tables(
    dataset: Dataset, exported: Ranker, frozen: Ranker, rows_N: np.ndarray, made: FrozenSize
) -> dict[str, Any]:
    """Bytes before and after, and by task what AUC loses and normalised entropy gains; tasks with too few positives
    are left out."""
    rows = rows_N[:: -(-len(rows_N) // COMPARED_ROWS)]
    exact_NT, coded_NT = (score_examples(dataset, ranker, rows)[0] for ranker in (exported, frozen))
    labels_NT = task_labels(dataset.examples.take(rows))
    tasks = []
    for t, task in enumerate(frozen.tasks):
        labels = labels_NT[:, TASKS.index(task)]
        logged = ~np.isnan(labels)
        y = labels[logged]
        if MIN_POSITIVES <= y.sum() <= len(y) - MIN_POSITIVES:
            exact, coded = exact_NT[logged, t], coded_NT[logged, t]
            tasks.append(
                {
                    "task": task,
                    "positives": int(y.sum()),
                    "auc_lost": auc(y, exact) - auc(y, coded),
                    "normalised_entropy_gained": normalised_entropy(y, coded) - normalised_entropy(y, exact),
                }
            )
    return {
        "precision": made.precision,
        "rows": made.rows,
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "compared_rows": len(rows),
        "tasks": tasks,
    }


def describe(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    before, after = found["bytes_before"], found["bytes_after"]
    mib = f"{before / 2**20:,.1f} -> {after / 2**20:,.1f} MiB"
    line = f"tables in {found['precision']}: {mib}, {before / after:.1f} times smaller"
    if found["tasks"]:
        worst = max(found["tasks"], key=lambda row: row["auc_lost"])
        entropy = max(row["normalised_entropy_gained"] for row in found["tasks"])
        line += f"; AUC lost at most {worst['auc_lost']:.5f} ({worst['task']}), normalised entropy {entropy:+.5f}"
    return line
