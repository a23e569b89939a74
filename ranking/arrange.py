"""From one value a candidate to the slate: caps, fatigue, diversity, quotas, and exploration with exact propensities.

K candidates, S slots filled, N videos shown before in the session, D vector width. Slots are filled in order; each
draw is conditional on the slots before it and is the last thing that happens to it, so the probability it was drawn
with is its propensity, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ranking.diversity import marginal_relevance, spectral

UNKNOWN_AUTHOR = 0
"""Videos whose author is not known are not one author's: neither capped nor decayed."""
NO_TOPIC = -1
"""Likewise for topics."""
MMR, SSD = "mmr", "ssd"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrangeConfig:
    """Penalties are in units of value; the sampler's temperature too. What is off by default says so."""

    author_cap: int = 2
    """At most so many videos of one author in a slate, whatever their value."""
    author_decay: float = 0.7
    """Each earlier video of the same author, in the slate or the session, leaves this share of a (positive) value."""
    topic_decay: float = 1.0
    """Likewise for the topic of `FeedConfig.topic_feature`: session fatigue. 1: off."""
    diversity: float = 0.1
    """Value lost by a video that repeats the last `window` ones entirely, in proportion for similar ones."""
    diversity_by: str = MMR
    """`mmr`: by the most similar of them; `ssd`: by what they span together."""
    window: int = 5
    """Slots back that a video is compared with, into the session."""
    duplicate_cosine: float | None = None
    """A video at least so similar to one in the slate, or among the session's last, is left out. None: off."""
    explore: bool = True
    """False: always the best, propensity 1."""
    temperature: float = 0.05
    """Plackett-Luce: a slot is drawn from the softmax of value / temperature."""
    epsilon: float = 0.02
    """Share of each draw that is uniform, which bounds propensities from below by epsilon / candidates considered."""
    top_m: int = 100
    """A slot is drawn among the best so many of what the rules allow; 0 means all."""
    uniform_slots: tuple[int, ...] = ()
    """Slots (from 0) drawn uniformly among the considered: the cleanest data there is, at the highest price."""
    fresh_slots: tuple[int, ...] = ()
    """Slots drawn among fresh uploads alone, where there are any: a quota for new videos."""
    fresh_h: float = 24.0
    """Uploads are fresh for so long."""

    def __post_init__(self) -> None:
        if self.author_cap < 1 or self.window < 0 or self.top_m < 0:
            raise ValueError("ArrangeConfig: author_cap must be at least 1, window and top_m at least 0")
        shares = (self.author_decay, self.topic_decay, self.epsilon)
        if not all(0 <= share <= 1 for share in shares) or self.diversity < 0:
            raise ValueError(
                "ArrangeConfig: author_decay, topic_decay and epsilon must lie in 0 .. 1, diversity at or above 0"
            )
        if self.temperature <= 0:
            raise ValueError("ArrangeConfig: temperature must be positive; for no exploration set explore=False")
        if self.diversity_by not in (MMR, SSD):
            raise ValueError(f"ArrangeConfig.diversity_by: {self.diversity_by!r}, expected one of {MMR!r} and {SSD!r}")
        if self.duplicate_cosine is not None and not 0 < self.duplicate_cosine <= 1:
            raise ValueError("ArrangeConfig.duplicate_cosine: give a cosine above 0 and up to 1, or null")
        if min((*self.uniform_slots, *self.fresh_slots), default=0) < 0 or self.fresh_h <= 0:
            raise ValueError("ArrangeConfig: uniform_slots and fresh_slots count from 0, fresh_h must be positive")


def _nothing(kind: type) -> np.ndarray:
    return np.zeros(0, kind)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the session has shown before this slate, oldest first."""

    author_N: np.ndarray = field(default_factory=lambda: _nothing(np.int64))
    topic_N: np.ndarray = field(default_factory=lambda: _nothing(np.int64))
    vector_ND: np.ndarray | None = None
    """Of the last of them."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What the rules look at."""

    value_K: np.ndarray
    author_K: np.ndarray
    vector_KD: np.ndarray
    topic_K: np.ndarray | None = None
    """None: no topics."""
    fresh_K: np.ndarray | None = None
    """bool; None: nothing is fresh."""

    def __post_init__(self) -> None:
        optional = [column for column in (self.topic_K, self.fresh_K) if column is not None]
        lengths = [len(column) for column in (self.value_K, self.author_K, self.vector_KD, *optional)]
        if len(set(lengths)) != 1:
            raise ValueError(f"arrange: columns of {lengths} candidates must be as many")
        if not np.isfinite(self.value_K).all():
            raise ValueError(f"arrange: value of candidate {np.argmin(np.isfinite(self.value_K))} is not finite")


@dataclass(frozen=True, slots=True)
class Slate:
    """What is shown, in order; shorter than asked when caps and duplicates leave nothing."""

    order_S: np.ndarray
    """(S,) int64, positions among the K candidates."""
    propensity_S: np.ndarray
    """(S,) float64, probability of each choice given the choices before it."""
    considered: np.ndarray
    """int64, ascending positions of all that could have been drawn into some slot: arranged anew from these alone, the
    same slate has the same propensities."""


def arrange(
    candidates: Candidates, config: ArrangeConfig, k: int, rng: np.random.Generator, shown: Shown | None = None
) -> Slate:
    """Fill up to k slots."""
    walk = _Walk(candidates, config, shown or Shown())
    order, propensity, drawable_K = [], [], np.zeros(len(candidates.value_K), bool)
    for _ in range(k):
        considered, probability = walk.choices()
        if len(considered) == 0:
            break
        drawable_K[considered] = True
        at = int(rng.choice(len(considered), p=probability)) if config.explore else 0
        order.append(int(considered[at]))
        propensity.append(float(probability[at]))
        walk.place(order[-1])
    return Slate(np.array(order, np.int64), np.array(propensity, np.float64), np.flatnonzero(drawable_K))


def choices_along(
    order_S: np.ndarray, candidates: Candidates, config: ArrangeConfig, shown: Shown | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slot by slot of a given slate: what these values and this config would consider there, best first, and the
    probability of each, given the slots above."""
    walk = _Walk(candidates, config, shown or Shown())
    for item in order_S:
        yield walk.choices()
        walk.place(int(item))


def slate_propensities(
    order_S: np.ndarray, candidates: Candidates, config: ArrangeConfig, shown: Shown | None = None
) -> np.ndarray:
    """Probability (S,) of each choice of a given slate, under these values and this config; 0 where impossible."""
    slots = zip(order_S, choices_along(order_S, candidates, config, shown), strict=True)
    return np.array([probability[considered == item].sum() for item, (considered, probability) in slots])


class _Walk:
    """The slots filled so far, the session before them, and what both do to the rest."""

    def __init__(self, candidates: Candidates, config: ArrangeConfig, shown: Shown) -> None:
        self.config = config
        self.value_K = np.asarray(candidates.value_K, np.float64)
        self.author_K, n = candidates.author_K, len(candidates.value_K)
        self.topic_K = np.full(n, NO_TOPIC) if candidates.topic_K is None else candidates.topic_K
        self.fresh_K = np.zeros(n, bool) if candidates.fresh_K is None else candidates.fresh_K
        self.vector_KD = _unit(candidates.vector_KD)
        self.slot = 0
        self.open_K = np.ones(n, bool)
        self.of_author_K = np.zeros(n, np.int64)
        author_times_K = _times(self.author_K, shown.author_N, UNKNOWN_AUTHOR)
        topic_times_K = _times(self.topic_K, shown.topic_N, NO_TOPIC)
        self.left_K = config.author_decay**author_times_K * config.topic_decay**topic_times_K
        self.recent: list[tuple[np.ndarray, np.ndarray]] = []
        for vector_D in () if shown.vector_ND is None else _unit(shown.vector_ND):
            self._compare_with(vector_D)

    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidates considered for the next slot, best first, and the probability of each (sums to 1)."""
        config = self.config
        allowed = np.flatnonzero(self.open_K & (self.of_author_K < config.author_cap))
        if self.slot in config.fresh_slots and self.fresh_K[allowed].any():
            allowed = allowed[self.fresh_K[allowed]]
        if len(allowed) == 0:
            return allowed, np.zeros(0)
        adjusted = self._adjusted()[allowed]
        best_first = np.argsort(-adjusted, kind="stable")[: config.top_m or None]
        considered, adjusted = allowed[best_first], adjusted[best_first]
        if not config.explore:
            return considered[:1], np.ones(1)
        epsilon = 1.0 if self.slot in config.uniform_slots else config.epsilon
        softmax = np.exp((adjusted - adjusted[0]) / config.temperature)
        probability = (1 - epsilon) * softmax / softmax.sum() + epsilon / len(considered)
        return considered, probability / probability.sum()

    def place(self, item: int) -> None:
        """Put a candidate into the next slot."""
        self.slot += 1
        self.open_K[item] = False
        if self.author_K[item] != UNKNOWN_AUTHOR:
            same_K = self.author_K == self.author_K[item]
            self.of_author_K += same_K
            self.left_K[same_K] *= self.config.author_decay
        if self.topic_K[item] != NO_TOPIC:
            self.left_K[self.topic_K == self.topic_K[item]] *= self.config.topic_decay
        self._compare_with(self.vector_KD[item])

    def _compare_with(self, vector_D: np.ndarray) -> None:
        """Once a video shown: its vector, and every candidate's cosine with it."""
        cosine_K = self.vector_KD @ vector_D
        self.recent.append((vector_D, cosine_K))
        if self.config.duplicate_cosine is not None:
            self.open_K &= cosine_K < self.config.duplicate_cosine - 1e-6

    def _adjusted(self) -> np.ndarray:
        config = self.config
        lost_K = (1.0 - self.left_K) * np.abs(self.value_K)
        if config.diversity and config.window and self.recent:
            vectors, cosines = zip(*self.recent[-config.window :], strict=True)
            if config.diversity_by == MMR:
                redundancy_K = marginal_relevance(np.stack(cosines))
            else:
                redundancy_K = spectral(self.vector_KD, np.stack(vectors))
            lost_K = lost_K + config.diversity * redundancy_K
        return self.value_K - lost_K


def _unit(vector_ND: np.ndarray) -> np.ndarray:
    vector_ND = np.asarray(
        vector_ND, np.promote_types(vector_ND.dtype, np.float32)
    )  # half precision has no fast product
    norms_N = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return vector_ND / np.where(norms_N > 0, norms_N, 1.0)


def _times(of_K: np.ndarray, shown_N: np.ndarray, unknown: int) -> np.ndarray:
    """How often what each candidate has in common with the session was shown (K,) int64."""
    found, times = np.unique(shown_N[shown_N != unknown], return_counts=True)
    if len(found) == 0:
        return np.zeros(len(of_K), np.int64)
    at_K = np.minimum(np.searchsorted(found, of_K), len(found) - 1)
    return np.where(found[at_K] == of_K, times[at_K], 0).astype(np.int64)
