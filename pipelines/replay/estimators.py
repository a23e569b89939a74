"""Off-policy estimators over logged slates: what another policy would have earned, from what the logger showed.

Every estimate is a reward per shown row, rows counted as logged. An estimator is a formula over sums by slot, so the
same sums give the estimate and all its resamples (`bootstrap.py`). N rows, K slots, U users, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipelines.replay.bootstrap import Totals, by_user
from pipelines.replay.slates import Floats, Ints, Slates

CLIPS: tuple[float, ...] = (float("inf"), 100.0, 30.0, 10.0, 3.0)
"""The clip sweep: weights above the clip are lowered to it, trading variance for bias."""

ESTIMATORS: dict[str, str] = {
    "replay": "mean over the rows where the greedy target would have shown the same video (Li et al., WSDM 2011); "
    "unbiased if logging was uniform",
    "ips": "each slot on its own, weighted by target over logged probability given the slots above as logged; answers "
    "for changing one slot at a time, biased for whole slates",
    "snips": "ips divided by its weights instead of by the rows, slot by slot",
    "rips": "reward-interaction IPS for cascades (McInerney et al., KDD 2020): weights multiply down to the slot, so a "
    "reward may depend on everything above it",
    "snrips": "rips divided by its weights, slot by slot: its bias vanishes with n and its variance is far less",
    "sips": "slate IPS (Swaminathan et al., NeurIPS 2017, as the baseline): the weight of the whole slate for every "
    "slot; unbiased whatever depends on what, and the most variance",
    "snsips": "sips divided by its weights",
    "dm": "direct method: the reward model's mean over slates drawn from the target; as good as the model",
    "dr": "doubly robust for cascades (Kiyohara et al., WSDM 2022): the reward model, corrected by weighted residuals; "
    "unbiased whatever the model, and of less variance the better it is",
}
CLIPPED = ("ips", "snips", "rips", "snrips", "dr")


def named(estimator: str, clip: float) -> str:
    """`rips` unclipped, `rips@100` clipped."""
    return estimator if math.isinf(clip) else f"{estimator}@{clip:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Importance weights of one policy, [N] each."""

    step: Floats
    """Target over logged probability of the row alone."""
    cascade: Floats
    """Product of the steps from the top of the slate down to the row."""
    slate: Floats
    """Product of all the slate's steps."""
    matched: Floats
    """Share with which the greedy target shows the row's video."""

    def of(self, estimator: str) -> Floats:
        """The weights that an estimator uses."""
        return self.slate if "sips" in estimator else self.cascade if estimator not in ("ips", "snips") else self.step


def weigh(slates: Slates, target: Floats, greedy: Floats) -> Weights:
    """Weights of a policy from its conditional probability, and its argmax share, of each logged row."""
    step = target / slates.logged
    cascade = _product_down_the_slate(step, slates)
    last = np.flatnonzero(np.diff(slates.request, append=-1) != 0)
    lengths = np.diff(last, prepend=-1)
    return Weights(step=step, cascade=cascade, slate=np.repeat(cascade[last], lengths), matched=greedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modelled:
    """What a reward model expects, [N] each: the control of the doubly robust estimator."""

    shown: Floats
    """Reward of the shown video in its slot."""
    policy: Floats
    """Reward of the slot under the policy, given the slots above as logged."""
    below: Floats
    """Reward of all the slots below, under the policy."""
    drawn: Floats
    """Reward of the video that a slate drawn from the policy has in this slot."""


class SlateSums:
    """Sums by user and slot of one part of the log, under the names that `value` reads."""

    def __init__(self, slates: Slates, users: int) -> None:
        self._slates, self._users = slates, users
        self._slots = int(slates.slot.max()) + 1

    def logged(self, rewards: dict[str, Floats]) -> dict[str, Floats]:
        """Rows and rewards as logged."""
        blocks = {"rows": self._by_slot(None)}
        return blocks | {f"r/{metric}": self._by_slot(reward) for metric, reward in rewards.items()}

    def weights(self, weights: Weights, clips: tuple[float, ...]) -> dict[str, Floats]:
        """What the self-normalised estimators divide by, and the mean step for the unsupported mass."""
        blocks = {"matched": self._by_slot(weights.matched), "w/sips": self._by_slot(weights.slate)}
        for family, raw in (("ips", weights.step), ("rips", weights.cascade)):
            blocks |= {f"w/{named(family, c)}": self._by_slot(np.minimum(raw, c)) for c in clips}
        return blocks

    def earned(self, weights: Weights, metric: str, reward: Floats, clips: tuple[float, ...]) -> dict[str, Floats]:
        """Weighted rewards of one metric."""
        blocks = {
            f"matched/{metric}": self._by_slot(weights.matched * reward),
            f"sips/{metric}": self._by_slot(weights.slate * reward),
        }
        for family, raw in (("ips", weights.step), ("rips", weights.cascade)):
            for clip in clips:
                blocks[f"{named(family, clip)}/{metric}"] = self._by_slot(np.minimum(raw, clip) * reward)
        return blocks

    def head(self, weights: Weights, metric: str, reward: Floats, estimator: str, clip: float) -> dict[str, Floats]:
        """Weighted rewards for one estimator only, as a guardrail needs."""
        raw = np.minimum(weights.of(estimator), clip)
        return {f"{named(estimator.removeprefix('sn'), clip)}/{metric}": self._by_slot(raw * reward)}

    def modelled(
        self, weights: Weights, metric: str, reward: Floats, model: Modelled, clips: tuple[float, ...]
    ) -> dict[str, Floats]:
        """The direct method and the doubly robust estimator. With w_k the weight down to slot k and w_-1 = 1, a row is

        w_k (r_k - q(shown) - below) + w_(k-1) (q(policy) + below): whatever q and below are, their terms cancel in
        expectation, because E[w_k f(a_k)] = E[w_(k-1) E_policy f].
        """
        blocks = {f"dm/{metric}": self._total(model.drawn)}
        above = np.where(self._slates.slot == 0, 1.0, np.roll(weights.cascade, 1))
        for clip in clips:
            w, before = np.minimum(weights.cascade, clip), np.minimum(above, clip)
            residual = reward - model.shown - model.below
            doubly_robust = w * residual + before * (model.policy + model.below)
            blocks[f"{named('dr', clip)}/{metric}"] = self._total(doubly_robust)
        return blocks

    def _by_slot(self, values_N: Floats | None) -> Floats:
        return by_user(values_N, self._slates.slot, self._slates.user, self._users, self._slots)

    def _total(self, values_N: Floats) -> Floats:
        return by_user(values_N, np.zeros_like(self._slates.slot), self._slates.user, self._users, 1)


def value(name: str, metric: str, policy: Totals, logged: Totals) -> Floats:
    """(1 + B,) an estimator such as `snrips@100`, or `logged`, and its resamples; NaN where one has no weight."""
    rows = logged["rows"]
    family, _, clip = name.partition("@")
    suffix = f"@{clip}" if clip else ""
    with np.errstate(invalid="ignore", divide="ignore"):
        if family == "logged":
            return logged.total(f"r/{metric}") / rows.sum(axis=1)
        if family == "replay":
            return policy.total(f"matched/{metric}") / policy.total("matched")
        if family == "snsips":
            return policy.total(f"sips/{metric}") / policy.total("w/sips")
        if family in ("snips", "snrips"):
            family = family.removeprefix("sn")
            return _self_normalised(policy[f"{family}{suffix}/{metric}"], policy[f"w/{family}{suffix}"], rows)
        return policy.total(f"{name}/{metric}") / rows.sum(axis=1)


def available(metric: str, policy: Totals, clips: tuple[float, ...]) -> list[str]:
    """The estimators that the policy's sums allow, in reporting order."""
    found = [name for name in ("replay", "sips", "snsips", "dm") if f"{_sum_of(name)}/{metric}" in policy]
    for name in CLIPPED:
        found += [named(name, c) for c in clips if f"{named(_sum_of(name), c)}/{metric}" in policy]
    order = list(ESTIMATORS)
    return sorted(found, key=lambda name: order.index(name.partition("@")[0]))


def _sum_of(name: str) -> str:
    return "matched" if name == "replay" else name.removeprefix("sn")


def _self_normalised(earned: Floats, carried: Floats, rows: Floats) -> Floats:
    """The mean of slot ratios, weighted by the slots' rows."""
    seen = carried > 0
    # Rows over weights first: it is exactly 1 when every weight is, and the logged mean comes out to the bit.
    scaled = earned * np.divide(rows, carried, out=np.zeros_like(rows), where=seen)
    return scaled.sum(axis=1) / (rows * seen).sum(axis=1)


def _product_down_the_slate(step: Floats, slates: Slates) -> Floats:
    """Running product within each slate, one slot after another; no logarithms, so ratios of exactly 1 stay 1."""
    product = step.copy()
    for place in range(1, int(slates.slot.max(initial=0)) + 1):
        rows: Ints = np.flatnonzero(slates.slot == place)
        product[rows] *= product[rows - 1]
    return product
