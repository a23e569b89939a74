"""The candidate less the live bundle on the same users: one number a user and bundle, users resampled together.

Poisson bootstrap with replay's machinery: a user enters a resample k times, k ~ Poisson(1), drawn by a hash of user and
seed, for both bundles alike. What they share (an easy user, a loud day) cancels, and what is left is their difference.
N items (rows, queries or users), U users, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.metrics import auc_by_group
from pipelines.replay.bootstrap import Interval, Resamples, Totals, interval, paired


@dataclass(frozen=True, slots=True)
class Compared:
    """A weighted mean of each bundle, and their difference with its 95% interval."""

    candidate: float
    live: float
    difference: Interval

    def __str__(self) -> str:
        d = self.difference
        return f"difference {d.estimate:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def compare(
    user_N: np.ndarray, candidate_N: np.ndarray, live_N: np.ndarray, weight_N: np.ndarray, resamples: Resamples
) -> Compared:
    """Weighted means over items that belong to users (their ids)."""
    users, of = np.unique(user_N, return_inverse=True)
    by_user = {
        name: np.bincount(of, weights=values_N, minlength=len(users)).astype(np.float64)[:, None]
        for name, values_N in (
            ("candidate", weight_N * candidate_N),
            ("live", weight_N * live_N),
            ("weight", weight_N.astype(np.float64)),
        )
    }
    totals = Totals()
    totals.add(resamples.counts(users), by_user)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may draw nobody
        candidate, live = (totals.total(name) / totals.total("weight") for name in ("candidate", "live"))
    return Compared(float(candidate[0]), float(live[0]), interval(paired(candidate, live)))


def compare_gauc(
    label_N: np.ndarray, candidate_N: np.ndarray, live_N: np.ndarray, user_N: np.ndarray, resamples: Resamples
) -> Compared:
    """GAUC: the AUC inside each user with both classes, weighted by the user's positives."""
    found = [auc_by_group(label_N, score_N, user_N) for score_N in (candidate_N, live_N)]
    both = np.isfinite(found[0].auc_G)
    return compare(found[0].group_G[both], found[0].auc_G[both], found[1].auc_G[both], found[0].positives_G[both],
                   resamples)  # fmt: skip
