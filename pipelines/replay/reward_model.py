"""A reward model for the direct and the doubly robust estimator: slot rate times the video's shrunken lift.

Cross-fitted: users fall in two folds by a hash, and each fold is predicted from the other's outcomes, so no row's own
outcome (or its user's) is in its prediction. V videos, K slots, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.replay.estimators import Modelled
from pipelines.replay.keys import mix
from pipelines.replay.sampling import Conditional
from pipelines.replay.slates import Floats, Ints, Shard

FOLDS = 2
PRIOR_IMPRESSIONS = 20.0
"""A video's lift counts as much as the average's after so many impressions. Any number leaves DR unbiased."""
_SALT = 77


def fold_of(user_ids: Ints) -> Ints:
    """0 or 1 a user."""
    return (mix(user_ids, _SALT) >> np.uint64(63)).astype(np.int64)


class RewardModel:
    """E[reward | video, slot] = slot rate x lift of the video, for each fold of users and metric."""

    def __init__(self, outcomes: pl.LazyFrame, metrics: Sequence[str]) -> None:
        """`outcomes`: user_id, video_id, slot and one column a metric, a row a shown video."""
        fold = pl.col("user_id").map_batches(lambda s: pl.Series(fold_of(s.to_numpy())), pl.Int64)
        sums = [pl.col(m).sum() for m in metrics]
        grouped = (
            outcomes.drop_nulls()
            .group_by(fold.alias("fold"), "video_id", "slot")
            .agg(*sums, rows=pl.len())
            .sort("fold", "video_id", "slot")
            .collect()
        )
        self._videos, video = np.unique(grouped["video_id"].to_numpy(), return_inverse=True)
        slot, found_in = grouped["slot"].cast(pl.Int64).to_numpy(), grouped["fold"].to_numpy()
        rows = grouped["rows"].to_numpy().astype(np.float64)
        slots = int(slot.max(initial=0)) + 1
        self._rate: dict[str, Floats] = {}
        self._lift: dict[str, Floats] = {}
        for m in metrics:
            rate_FK, lift_FV = np.zeros((FOLDS, slots)), np.ones((FOLDS, len(self._videos) + 1))
            for f in range(FOLDS):
                other = found_in != f
                earned = grouped[m].to_numpy()[other]
                rate_FK[f] = _rates(slot[other], earned, rows[other], slots)
                expected = np.bincount(
                    video[other], weights=rows[other] * rate_FK[f, slot[other]], minlength=len(self._videos)
                )
                got = np.bincount(video[other], weights=earned, minlength=len(self._videos))
                prior = PRIOR_IMPRESSIONS * (earned.sum() / max(rows[other].sum(), 1.0))
                if prior > 0:
                    lift_FV[f, :-1] = (got + prior) / (expected + prior)
            self._rate[m], self._lift[m] = rate_FK, lift_FV

    def lifts(self, shard: Shard, metric: str) -> Floats:
        """(C,) lift of every candidate as its user's fold may know it; 1 for videos without outcomes."""
        return self._lift[metric][self._fold_C(shard), self._rows(shard)]

    def modelled(self, shard: Shard, metric: str, lift_C: Floats, policy: Conditional, drawn: Ints) -> Modelled:
        """The model's view of each shown row. Below a slot, the policy is taken to show what it would at the top."""
        slates = shard.slates
        fold_N = fold_of(shard.user_ids_U)[slates.user]
        last = np.flatnonzero(np.diff(slates.request, append=-1) != 0)
        length_N = np.repeat(slates.slot[last] + 1, np.diff(last, prepend=-1))
        slots = max(self._rate[metric].shape[1], int(slates.slot.max()) + 1)
        rate_FK = np.pad(self._rate[metric], ((0, 0), (0, slots - self._rate[metric].shape[1])), mode="edge")
        sums_FK = np.concatenate([np.zeros((FOLDS, 1)), np.cumsum(rate_FK, axis=1)], axis=1)
        rate_N = rate_FK[fold_N, slates.slot]
        expected = policy.expected[metric]
        top_N = expected[np.repeat(last - slates.slot[last], np.diff(last, prepend=-1))]
        return Modelled(
            shown=rate_N * lift_C[slates.candidate],
            policy=rate_N * expected,
            below=(sums_FK[fold_N, length_N] - sums_FK[fold_N, slates.slot + 1]) * top_N,
            drawn=rate_N * lift_C[drawn],
        )

    def _fold_C(self, shard: Shard) -> Ints:
        return np.repeat(fold_of(shard.requests.user_id), np.diff(shard.requests.offsets))

    def _rows(self, shard: Shard) -> Ints:
        known = pc.index_in(pa.array(shard.requests.video_ids), value_set=pa.array(self._videos))  # pyright: ignore[reportAttributeAccessIssue]
        return known.fill_null(len(self._videos)).to_numpy(zero_copy_only=False).astype(np.int64)


def _rates(slot: Ints, earned: Floats, rows: Floats, slots: int) -> Floats:
    """Mean reward by slot; a slot without rows has the overall mean."""
    n = np.bincount(slot, weights=rows, minlength=slots)
    total = np.bincount(slot, weights=earned, minlength=slots)
    overall = total.sum() / max(n.sum(), 1.0)
    return np.divide(total, n, out=np.full(slots, overall), where=n > 0)
