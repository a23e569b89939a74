"""Values become slates by Plackett-Luce sampling, the law the feed explores by: their probabilities, and draws.

Slots are filled in order, each from what the slots above left. Weights are computed once a candidate; a slot costs
sums over the candidates. R requests, C candidates of all requests one after another, N shown rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.replay.keys import uniforms
from pipelines.replay.slates import Floats, Ints, LoggedRequests, Slates

_LOW = 1e-200
"""Below this a request's remaining weights are computed anew, relative to the best that is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How values become a stochastic slate: Plackett-Luce without replacement, mixed with the uniform law."""

    temperature: float = 1.0
    """A value that is one temperature higher is e times as likely in a slot. Smaller is greedier."""
    epsilon: float = 0.05
    """Share of slots filled uniformly from what is left; keeps a policy from putting all its mass on a few videos."""
    standardise: bool = True
    """Divide values by their spread within the request first, so that one temperature means the same to every policy.
    Off, the values are taken as they are: right for a feed whose own temperature is known."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon}: must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditional:
    """A policy's view of each shown row given the slots above it as logged, [N] each."""

    probability: Floats
    """With which the policy shows this video here."""
    greedy: Floats
    """1 when the shown video has the highest value left, 1/n when n videos tie for it, else 0."""
    expected: dict[str, Floats]
    """The mean of each given score over what the policy might show here."""


class Law(Protocol):
    """How the values of some requests become slates."""

    def conditional(
        self, requests: LoggedRequests, slates: Slates, scores_C: Mapping[str, Floats] | None = None
    ) -> Conditional:
        """Probability and argmax share of each shown row, and the expectation of `scores_C`, one score a candidate."""
        ...

    def draw(self, requests: LoggedRequests, slates: Slates, salt: int = 0) -> Ints:
        """One slate a request, as long as the logged one: [N] flat candidate indices in the rows' order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The run's own sampler over a policy's values."""

    values_C: Floats
    sampler: Sampler

    def conditional(
        self, requests: LoggedRequests, slates: Slates, scores_C: Mapping[str, Floats] | None = None
    ) -> Conditional:
        """See `conditional`."""
        return conditional(self.values_C, requests, slates, self.sampler, scores_C)

    def draw(self, requests: LoggedRequests, slates: Slates, salt: int = 0) -> Ints:
        """See `draw_slates`."""
        return draw_slates(self.values_C, requests, slates, self.sampler, salt)


def conditional(
    values_C: Floats,
    requests: LoggedRequests,
    slates: Slates,
    sampler: Sampler,
    scores_C: Mapping[str, Floats] | None = None,
) -> Conditional:
    """Probability and argmax share of each shown row; and the expectation of `scores_C`, one score a candidate."""
    scores_C = scores_C or {}
    left = _Left(values_C, requests, sampler)
    probability, greedy = np.empty(len(slates.slot)), np.zeros(len(slates.slot))
    expected = {name: np.empty(len(slates.slot)) for name in scores_C}
    for slot in range(int(slates.slot.max(initial=-1)) + 1):
        rows = np.flatnonzero(slates.slot == slot)
        request, candidate = slates.request[rows], slates.candidate[rows]
        left.weigh(request)
        probability[rows] = left.probability(request, candidate)
        greedy[rows] = left.argmax_share(request, candidate)
        for name, score_C in scores_C.items():
            expected[name][rows] = left.mean(score_C)[request]
        left.take(request, candidate)
    return Conditional(probability=probability, greedy=greedy, expected=expected)


def draw_slates(values_C: Floats, requests: LoggedRequests, slates: Slates, sampler: Sampler, salt: int = 0) -> Ints:
    """One slate of the policy a request, as long as the logged one: [N] flat candidate indices in the rows' order.

    The draw depends on the request's id, the slot and `salt` alone, so two policies meet the same chance.
    """
    left = _Left(values_C, requests, sampler)
    key_R, drawn = requests.keys(), np.empty(len(slates.slot), dtype=np.int64)
    ends = requests.offsets[1:]
    for slot in range(int(slates.slot.max(initial=-1)) + 1):
        rows = np.flatnonzero(slates.slot == slot)
        request = slates.request[rows]
        left.weigh(request)
        odds_C = left.odds()
        reach_C = np.cumsum(odds_C)
        below = reach_C[requests.offsets[:-1][request]] - odds_C[requests.offsets[:-1][request]]
        mass = reach_C[ends[request] - 1] - below
        aim = below + uniforms(key_R[request], 1000 * salt + slot) * mass
        pick = np.clip(np.searchsorted(reach_C, aim, side="right"), requests.offsets[:-1][request], ends[request] - 1)
        for row in np.flatnonzero(odds_C[pick] == 0):  # rounding at a request's edge: take its likeliest
            first = requests.offsets[request[row]]
            pick[row] = first + int(np.argmax(odds_C[first : ends[request[row]]]))
        drawn[rows] = pick
        left.take(request, pick)
    return drawn


class _Left:
    """The candidates not yet taken, with their weights."""

    def __init__(self, values_C: Floats, requests: LoggedRequests, sampler: Sampler) -> None:
        self._starts, self._counts = requests.offsets[:-1], np.diff(requests.offsets)
        self._epsilon = sampler.epsilon
        self._logit_C = _scaled(values_C, self._starts, self._counts, sampler)
        best_R = np.maximum.reduceat(self._logit_C, self._starts)
        self._weight_C = np.exp(self._logit_C - np.repeat(best_R, self._counts))
        self._left_C = np.ones(len(values_C), dtype=bool)
        self._left_R = self._counts.astype(np.float64)
        self._total_R = np.zeros(len(self._counts))

    def weigh(self, request: Ints) -> None:
        """Sum what is left; `request` are those that fill this slot."""
        self._total_R = np.add.reduceat(self._weight_C, self._starts)
        faint = request[(self._total_R[request] < _LOW) & (self._left_R[request] > 0)]
        for r in faint:
            mine = slice(self._starts[r], self._starts[r] + self._counts[r])
            logit = np.where(self._left_C[mine], self._logit_C[mine], -np.inf)
            self._weight_C[mine] = np.exp(logit - logit.max())
            self._total_R[r] = self._weight_C[mine].sum()

    def probability(self, request: Ints, candidate: Ints) -> Floats:
        softmax = self._weight_C[candidate] / self._total_R[request]
        return (1 - self._epsilon) * softmax + self._epsilon / self._left_R[request]

    def odds(self) -> Floats:
        """Probability of every candidate, 0 for those taken; requests with nothing left get none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share_R = np.where(self._total_R > 0, (1 - self._epsilon) / self._total_R, 0.0)
            floor_R = np.where(self._left_R > 0, self._epsilon / self._left_R, 0.0)
        return self._weight_C * np.repeat(share_R, self._counts) + self._left_C * np.repeat(floor_R, self._counts)

    def argmax_share(self, request: Ints, candidate: Ints) -> Floats:
        best_R = np.maximum.reduceat(np.where(self._left_C, self._logit_C, -np.inf), self._starts)
        hit = self._logit_C[candidate] == best_R[request]
        best_C = self._left_C & (self._logit_C == np.repeat(best_R, self._counts))
        ties_R = np.add.reduceat(best_C.astype(np.float64), self._starts)
        return hit / ties_R[request]

    def mean(self, score_C: Floats) -> Floats:
        """(R,) expectation of a score over what may be shown next."""
        weighted_R = np.add.reduceat(self._weight_C * score_C, self._starts)
        flat_R = np.add.reduceat(self._left_C * score_C, self._starts) if self._epsilon else np.zeros(len(weighted_R))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (1 - self._epsilon) * weighted_R / self._total_R + self._epsilon * flat_R / self._left_R

    def take(self, request: Ints, candidate: Ints) -> None:
        self._weight_C[candidate] = 0.0
        self._left_C[candidate] = False
        self._left_R[request] -= 1


def _scaled(values_C: Floats, starts: Ints, counts: Ints, sampler: Sampler) -> Floats:
    if not sampler.standardise:
        return values_C / sampler.temperature
    mean_C = np.repeat(np.add.reduceat(values_C, starts) / counts, counts)
    centred_C = values_C - mean_C
    spread_R = np.sqrt(np.add.reduceat(centred_C**2, starts) / counts)
    # Rounding leaves equal values a hair apart: below this they count as equal.
    flat_R = spread_R <= 1e-12 * np.maximum(np.abs(mean_C[starts]), 1.0)
    scale_C = np.repeat(np.where(flat_R, 0.0, 1.0 / np.where(flat_R, 1.0, spread_R) / sampler.temperature), counts)
    return centred_C * scale_C
