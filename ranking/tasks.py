"""What the ranker predicts: the logged signals, and what follows from the other columns of an impression.

The vocabulary of the value model, the heads and their evaluation. Events and histories know the signals alone.
"""

from __future__ import annotations

import numpy as np

from features.dataset import Examples
from features.schema import SIGNALS

QUICK_SKIP = "quick_skip"
QUICK_SKIP_MS = 2_000
"""Gone before this: the viewer judged the first frames. KuaiRand's log, and the simulated world, part there."""
TASKS: tuple[str, ...] = (*SIGNALS, QUICK_SKIP)


def task_labels(examples: Examples) -> np.ndarray:
    """(E, len(TASKS)) float32, 0 or 1, NaN where not logged. A quick skip is a watch time under QUICK_SKIP_MS that did
    not reach the end; without a watch time nothing is known of it."""
    watch_ms = np.asarray(examples.watch_ms, np.float64)
    enough_ms = np.fmin(np.asarray(examples.duration_ms, np.float64), QUICK_SKIP_MS)
    skipped = np.where(np.isnan(watch_ms), np.nan, watch_ms < enough_ms).astype(np.float32)
    return np.concatenate([np.asarray(examples.signals), skipped[:, None]], axis=1)
