"""Tasks that are not signals follow from the other columns of an impression."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from features.dataset import Examples
from features.schema import SIGNALS
from ranking.tasks import QUICK_SKIP, TASKS, task_labels


def test_a_quick_skip_is_under_two_seconds_and_before_the_end() -> None:
    watch = np.array([0.0, 1999.0, 2000.0, 1500.0, 1500.0, np.nan, 1999.0], np.float32)
    duration = np.array([9e3, 9e3, 9e3, 1500.0, 1501.0, 9e3, np.nan], np.float32)
    named = {f.name: np.zeros(7) for f in fields(Examples)}
    examples = Examples(
        **(named | {"watch_ms": watch, "duration_ms": duration, "signals": np.ones((7, len(SIGNALS)), np.float32)})
    )
    labels = task_labels(examples)
    assert labels.shape == (7, len(TASKS))
    assert np.array_equal(labels[:, TASKS.index(QUICK_SKIP)], [1, 1, 0, 0, 1, np.nan, 1], equal_nan=True)
    assert (labels[:, : len(SIGNALS)] == 1).all()
