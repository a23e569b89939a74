"""Off-policy estimators over logged slates: what another policy would have earned, from what the logger showed.

Every estimate is a reward per shown row, rows counted as logged. Uncertainty comes from resampling users, with the same
resamples for every policy, so differences are paired.
N rows, one a shown video; K slots; U users; M columns of sums; B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CLIPS: tuple[float, ...] = (float("inf"), 100.0, 30.0, 10.0, 3.0)
"""The clip sweep: weights above the clip are lowered to it, trading variance for bias."""

CHUNK = 64
"""Resamples multiplied at a time: bounds memory at 64 numbers a user."""

ESTIMATORS: tuple[str, ...] = ("replay", "ips", "snips", "rips", "snrips")
"""Names of the estimators, in the order reports show them.

- `replay`: mean over the rows where the greedy target would have shown the same video. Unbiased if logging was uniform.
- `ips`: each slot on its own, weighted by target over logged probability *given the earlier slots as logged*. It
  answers for changing one slot at a time; of a whole slate it is biased: the earlier slots stay the logger's.
- `snips`: `ips` divided by its weights instead of by the rows, slot by slot.
- `rips`: reward-interaction IPS for cascades (McInerney et al., KDD 2020): the weight of a slot is the product of the
  ratios down to it, so a reward may depend on everything above it. Unbiased for slates read from the top.
- `snrips`: `rips` divided by its weights, slot by slot. Its bias vanishes with n and its variance is far less.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slates:
    """Logged rows ordered by (request, slot), slots running 0, 1, 2 ... within a request."""

    request: Ints
    """Index of the request, ascending, [N]."""
    slot: Ints
    """Place in the slate from 0, [N]."""
    user: Ints
    """Index of the user from 0, [N]."""
    logged: Floats
    """Probability with which the logger put this video here given the slots above, [N]."""

    @staticmethod
    def order(request: Ints, slot: Ints) -> Ints:
        """The permutation that brings rows into the order this class asks for."""
        return np.lexsort((slot, request))


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Importance weights of one policy, [N] each."""

    step: Floats
    """Target over logged probability of the row alone."""
    cascade: Floats
    """Product of the steps from the top of the slate down to the row."""
    matched: Floats
    """Share with which the greedy target shows the row's video."""


def weigh(slates: Slates, target: Floats, greedy: Floats) -> Weights:
    """Weights of a policy from its conditional probability, and its argmax share, of each logged row."""
    step = target / slates.logged
    return Weights(step=step, cascade=_product_down_the_slate(step, slates.slot), matched=greedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """How far one policy's weights can be trusted."""

    rows: int
    """Rows weighed."""
    effective_sample_size: float
    """(sum w)^2 / sum w^2: the number of equally weighted rows that would be as informative."""
    effective_share: float
    """Effective sample size over rows."""
    mean_weight: float
    """1 in expectation when the logger could have shown whatever the target shows."""
    max_weight: float
    """The heaviest row."""
    share_clipped: float
    """Share of rows whose weight is above the clip."""
    top_percent_share: float
    """Share of all weight that the heaviest 1% of rows carry."""
    match_rate: float
    """Share of rows where the greedy target shows the logged video."""


def diagnose(weights: Weights, estimator: str, clip: float) -> Diagnostics:
    """Diagnostics of the weights that `estimator` uses, before clipping except for the share clipped."""
    w = weights.cascade if "rips" in estimator else weights.step
    total, squares = float(w.sum()), float((w**2).sum())
    heaviest = np.partition(w, len(w) - max(len(w) // 100, 1))[len(w) - max(len(w) // 100, 1) :]
    ess = total**2 / squares if squares > 0 else 0.0
    return Diagnostics(
        rows=len(w),
        effective_sample_size=ess,
        effective_share=ess / len(w),
        mean_weight=total / len(w),
        max_weight=float(w.max()),
        share_clipped=float((w > clip).mean()),
        top_percent_share=float(heaviest.sum() / total) if total > 0 else 1.0,
        match_rate=float(weights.matched.mean()),
    )


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


class UserBootstrap:
    """Poisson bootstrap over users: every user enters a resample k times, k ~ Poisson(1).

    Every estimator is a function of sums over rows, so rows are first summed by user and a resample is one product of a
    vector of counts and the [U, M] matrix of sums. Counts come from `seed` alone: every policy sees the same resamples.
    """

    def __init__(self, slates: Slates, resamples: int, seed: int) -> None:
        self._slates = slates
        self._users = int(slates.user.max()) + 1
        self._slots = int(slates.slot.max()) + 1
        # A Poisson(1) count never reaches 256, so a byte holds it.
        self._counts_BU = np.random.default_rng(seed).poisson(1.0, (resamples, self._users)).astype(np.uint8)

    def estimate(self, weights: Weights, reward: Floats, clips: tuple[float, ...] = CLIPS) -> dict[str, Estimate]:
        """Every estimator, `NAME` unclipped and `NAME@CLIP` for each finite clip, and `logged` for the log itself."""
        columns = _Columns(self._slates, self._users, self._slots)
        rows, rewards = columns.by_slot(np.ones(len(reward))), columns.by_slot(reward)
        plan = {"logged": (rewards, rows)}
        plan["replay"] = (columns.total(weights.matched * reward), columns.total(weights.matched))
        for family, raw in (("ips", weights.step), ("rips", weights.cascade)):
            unclipped = columns.by_slot(raw * reward), columns.by_slot(raw)
            for clip in clips:
                w = np.minimum(raw, clip)
                bites = raw.max() > clip
                earned, carried = (columns.by_slot(w * reward), columns.by_slot(w)) if bites else unclipped
                plan[_named(family, clip)] = (earned, rows)
                plan[_named(f"sn{family}", clip)] = (earned, carried)
        sums_UM = columns.matrix()
        point = _ratios(sums_UM.sum(0, keepdims=True), plan, rows)
        drawn = [
            _ratios(self._counts_BU[start : start + CHUNK].astype(np.float64) @ sums_UM, plan, rows)
            for start in range(0, len(self._counts_BU), CHUNK)
        ]
        resampled = {name: np.concatenate([chunk[name] for chunk in drawn]) for name in plan}
        return {name: _summarise(point, resampled, name) for name in plan}


class _Columns:
    """Sums by user, gathered side by side into one [U, M] matrix; callers keep the columns' places."""

    def __init__(self, slates: Slates, users: int, slots: int) -> None:
        self._user_slot = slates.user * slots + slates.slot
        self._user = slates.user
        self._shape = (users, slots)
        self._blocks: list[Floats] = []
        self._width = 0

    def by_slot(self, values_N: Floats) -> slice:
        """One column a slot."""
        users, slots = self._shape
        sums = np.bincount(self._user_slot, weights=values_N, minlength=users * slots)
        return self._add(sums.astype(np.float64).reshape(users, slots))

    def total(self, values_N: Floats) -> slice:
        """One column over all slots."""
        sums = np.bincount(self._user, weights=values_N, minlength=self._shape[0])
        return self._add(sums.astype(np.float64)[:, None])

    def matrix(self) -> Floats:
        return np.concatenate(self._blocks, axis=1)

    def _add(self, block_UK: Floats) -> slice:
        self._blocks.append(block_UK)
        self._width += block_UK.shape[1]
        return slice(self._width - block_UK.shape[1], self._width)


def _ratios(sums_BM: Floats, plan: dict[str, tuple[slice, slice]], rows: slice) -> dict[str, Floats]:
    """Each estimator from its sums: rewards over rows, or the mean of slot ratios weighted by the slots' rows."""
    rows_BK = sums_BM[:, rows]
    found = {}
    for name, (earned, carried) in plan.items():
        numerator, denominator = sums_BM[:, earned], sums_BM[:, carried]
        if name.startswith("sn"):
            seen = denominator > 0
            # Rows over weights first: it is exactly 1 when every weight is, and the logged mean comes out to the bit.
            numerator = numerator * np.divide(rows_BK, denominator, out=np.zeros_like(rows_BK), where=seen)
            denominator = rows_BK * seen
        with np.errstate(invalid="ignore", divide="ignore"):
            found[name] = numerator.sum(1) / denominator.sum(1)
    return found


def _summarise(point: dict[str, Floats], resampled: dict[str, Floats], name: str) -> Estimate:
    difference = resampled[name] - resampled["logged"]
    # A matrix product may add the same numbers in another order: rounding is not a difference.
    difference[np.abs(difference) <= 1e-12 * np.abs(resampled["logged"])] = 0.0
    with np.errstate(invalid="ignore"):
        better = float(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return Estimate(
        value=_interval(float(point[name][0]), resampled[name]),
        difference=_interval(float(point[name][0] - point["logged"][0]), difference),
        probability_better=better,
    )


def _interval(estimate: float, resampled: Floats) -> Interval:
    finite = resampled[np.isfinite(resampled)]
    if not finite.size:
        return Interval(estimate=estimate, low=float("nan"), high=float("nan"))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Interval(estimate=estimate, low=float(low), high=float(high))


def _named(family: str, clip: float) -> str:
    return family if np.isinf(clip) else f"{family}@{clip:g}"


def _product_down_the_slate(step: Floats, slot: Ints) -> Floats:
    """Running product within each slate, one slot after another; no logarithms, so ratios of exactly 1 stay 1."""
    product = step.copy()
    for place in range(1, int(slot.max(initial=0)) + 1):
        rows = np.flatnonzero(slot == place)
        product[rows] *= product[rows - 1]
    return product
