"""What must not get worse, whatever the primary metric gains: each guardrail compares a policy with the logged one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.metrics import gini
from pipelines.replay.bootstrap import Estimate, Interval
from pipelines.replay.keys import mix
from pipelines.replay.slates import Floats, Ints

GROUPS = 10
"""Groups of users that the interval of the concentration leaves out one at a time (jackknife)."""
_SALT = 55


@dataclass(frozen=True, kw_only=True, slots=True)
class Guardrail:
    """A limit on how a rate may move against the logged policy's."""

    metric: str
    harm: Literal["up", "down", "either"]
    """Which way hurts."""
    allowed: float
    """How far it may move: a share of the logged rate, or the rate itself when `absolute`."""
    absolute: bool = False
    why: str

    def judge(self, found: Estimate) -> GuardrailResult:
        """Broken when the move is beyond what is allowed and its interval excludes no move at all; undecided when only
        the interval reaches beyond."""
        difference = found.difference
        logged = found.value.estimate - difference.estimate
        limit = self.allowed if self.absolute else self.allowed * abs(logged)
        signs = {"up": (1,), "down": (-1,), "either": (1, -1)}[self.harm]
        state: Literal["kept", "undecided", "broken"] = "kept"
        for sign in signs:
            worst = max(sign * difference.low, sign * difference.high)
            surest = min(sign * difference.low, sign * difference.high)
            if sign * difference.estimate > limit and surest > 0:
                state = "broken"
            elif worst > limit and state == "kept":
                state = "undecided"
        return GuardrailResult(
            metric=self.metric,
            state=state,
            logged=logged,
            value=found.value,
            difference=difference,
            limit=limit,
            harm=self.harm,
            why=self.why,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardrailResult:
    """One guardrail, one policy."""

    metric: str
    state: Literal["kept", "undecided", "broken", "not logged"]
    logged: float
    value: Interval
    difference: Interval
    limit: float
    """The move that is allowed, in the metric's unit."""
    harm: str
    why: str


GUARDRAILS: tuple[Guardrail, ...] = (
    Guardrail(metric="hate", harm="up", allowed=0.1, why="a tenth more hate is a tenth more people driven away"),
    Guardrail(
        metric="quick_skip", harm="up", allowed=0.05, why="a video left within two seconds cost the viewer a swipe"
    ),
    Guardrail(
        metric="author_gini",
        harm="up",
        allowed=0.05,
        absolute=True,
        why="exposure that gathers on few authors takes away the others' reason to upload",
    ),
    Guardrail(
        metric="fresh",
        harm="down",
        allowed=0.25,
        why="videos of the last day that are not shown now are never known: tomorrow's catalogue is decided here",
    ),
    Guardrail(
        metric="unconnected",
        harm="either",
        allowed=0.1,
        absolute=True,
        why="the balance of followed and unknown authors is the product's decision, not the ranker's by-product",
    ),
)
REWARDS = tuple(g.metric for g in GUARDRAILS if g.metric != "author_gini")
"""Guardrails that are a mean over shown rows."""


class Exposure:
    """How slots fall on authors, by group of users: as logged, or drawn from a policy."""

    def __init__(self, authors: int) -> None:
        self._shown_GA = np.zeros((GROUPS, authors))

    def add(self, author_N: Ints, user_ids_N: Ints) -> None:
        """Rows whose author is not known (-1) are left out."""
        known = author_N >= 0
        group = (mix(user_ids_N[known], _SALT) % np.uint64(GROUPS)).astype(np.int64)
        authors = self._shown_GA.shape[1]
        cells = np.bincount(group * authors + author_N[known], minlength=GROUPS * authors)
        self._shown_GA += cells.reshape(GROUPS, authors)

    def concentration(self, logged: Exposure) -> Estimate | None:
        """Gini over the authors that either policy showed, with its jackknife interval; None when none is known."""
        seen = (self._shown_GA.sum(axis=0) + logged._shown_GA.sum(axis=0)) > 0
        if not seen.any():
            return None
        mine, theirs = self._leave_one_out(seen), logged._leave_one_out(seen)
        difference = _jackknife(mine - theirs)
        return Estimate(value=_jackknife(mine), difference=difference, probability_better=float("nan"))

    def _leave_one_out(self, seen: np.ndarray) -> Floats:
        """(1 + G,): the Gini of all users, then without each group."""
        shown = self._shown_GA[:, seen]
        whole = shown.sum(axis=0)
        return np.array([gini(whole), *(gini(whole - part) for part in shown)])


def _jackknife(found: Floats) -> Interval:
    without = found[1:]
    error = np.sqrt((GROUPS - 1) / GROUPS * ((without - without.mean()) ** 2).sum())
    return Interval(estimate=float(found[0]), low=float(found[0] - 1.96 * error), high=float(found[0] + 1.96 * error))
