"""Poisson bootstrap over users, streamed: a user enters a resample k times, k ~ Poisson(1), a hash of user and seed.

Every estimator is a function of sums over rows, so rows are summed by user, and the sums of all resamples grow by one
matrix product a part of the log. What is kept is a row a resample, however long the log. All policies, and two runs
with one seed, see the same resamples, so differences are paired.
U users, K columns of a block, B resamples. Row 0 of a total is the estimate, rows 1 to B its resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.replay.keys import poisson_counts
from pipelines.replay.slates import Floats, Ints

_USERS = 8192
"""Users multiplied at a time: bounds the counts at 8192 x B numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A point estimate and the central 95% of its resamples."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One estimator's answer about one policy and reward."""

    value: Interval
    """Reward per shown row."""
    difference: Interval
    """Value less the logged mean, both in the same resample."""
    probability_better: float
    """Share of resamples with a difference above 0; a draw counts one half."""


class Resamples:
    """How often each user enters each resample."""

    def __init__(self, resamples: int, seed: int) -> None:
        self.resamples, self.seed = resamples, seed

    def counts(self, user_ids_U: Ints) -> npt.NDArray[np.uint8]:
        """(U, B); the same for the same user, wherever it is met."""
        return poisson_counts(user_ids_U, self.resamples, self.seed)


class Totals:
    """Named sums over all rows so far, (1 + B, K) each."""

    def __init__(self) -> None:
        self._sums: dict[str, Floats] = {}

    def add(self, counts_UB: npt.NDArray[np.uint8], blocks_UK: dict[str, Floats]) -> None:
        """Add a part's sums by user. A block may be wider than before (a longer slate): there, earlier parts had 0."""
        sums_UM = np.concatenate(list(blocks_UK.values()), axis=1)
        grown = np.empty((1 + counts_UB.shape[1], sums_UM.shape[1]))
        grown[0] = sums_UM.sum(axis=0)
        grown[1:] = 0.0
        for start in range(0, len(sums_UM), _USERS):
            grown[1:] += counts_UB[start : start + _USERS].T.astype(np.float64) @ sums_UM[start : start + _USERS]
        edge = 0
        for name, block_UK in blocks_UK.items():
            width = block_UK.shape[1]
            self._sums[name] = _plus(self._sums.get(name), grown[:, edge : edge + width])
            edge += width

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> Floats:
        return self._sums[name]

    def total(self, name: str) -> Floats:
        """(1 + B,) the sum over the block's columns."""
        return self._sums[name].sum(axis=1)


def _plus(before: Floats | None, more: Floats) -> Floats:
    if before is None:
        return more.copy()
    width = max(before.shape[1], more.shape[1])
    wide = [np.pad(block, ((0, 0), (0, width - block.shape[1]))) for block in (before, more)]
    return wide[0] + wide[1]


def by_user(values_N: Floats | None, group_N: Ints, user_N: Ints, users: int, groups: int) -> Floats:
    """(U, groups) sums of values (or counts of rows) by user and group."""
    found = np.bincount(user_N * groups + group_N, weights=values_N, minlength=users * groups)
    return found.astype(np.float64).reshape(users, groups)


def interval(drawn: Floats) -> Interval:
    """Of (1 + B,): the estimate, and the central 95% of the finite resamples; NaN without any."""
    finite = drawn[1:][np.isfinite(drawn[1:])]
    if not finite.size:
        return Interval(estimate=float(drawn[0]), low=float("nan"), high=float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(estimate=float(drawn[0]), low=float(low), high=float(high))


def paired(value: Floats, logged: Floats) -> Floats:
    """Differences in each resample; adding the same numbers in another order, as a matrix product may, makes none."""
    difference = value - logged
    difference[np.abs(difference) <= 1e-12 * np.abs(logged)] = 0.0
    return difference


def summarise(value: Floats, logged: Floats) -> Estimate:
    """Of two (1 + B,): the value and how it differs from the logged one."""
    difference = paired(value, logged)
    with np.errstate(invalid="ignore"):
        better = float(np.mean((difference[1:] > 0) + 0.5 * (difference[1:] == 0)))
    return Estimate(value=interval(value), difference=interval(difference), probability_better=better)
