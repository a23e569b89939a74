"""From one value a candidate to the slate: author cap, decay, diversity, and exploration with exact propensities.

K candidates, S slots filled, D vector width. Slots are filled in order; each draw is conditional on the slots before
it and is the last thing that happens to it, so the probability it was drawn with is its propensity, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNKNOWN_AUTHOR = 0
"""Videos whose author is not known are not one author's: neither capped nor decayed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrangeConfig:
    """Penalties are in units of value; the sampler's temperature too."""

    author_cap: int = 2
    """At most so many videos of one author in a slate, whatever their value."""
    author_decay: float = 0.7
    """Each earlier video of the same author leaves this share of a (positive) value."""
    diversity: float = 0.1
    """Value lost by a video that equals one of the last `window` (cosine 1), in proportion for similar ones (MMR)."""
    window: int = 5
    """Slots back that a video is compared with."""
    explore: bool = True
    """False: always the best, propensity 1."""
    temperature: float = 0.05
    """Plackett-Luce: a slot is drawn from the softmax of value / temperature."""
    epsilon: float = 0.02
    """Share of each draw that is uniform, which bounds propensities from below by epsilon / candidates considered."""
    top_m: int = 100
    """A slot is drawn among the best so many of what the cap allows; 0 means all."""

    def __post_init__(self) -> None:
        if self.author_cap < 1 or self.window < 0 or self.top_m < 0:
            raise ValueError("ArrangeConfig: author_cap must be at least 1, window and top_m at least 0")
        if not 0 <= self.author_decay <= 1 or not 0 <= self.epsilon <= 1 or self.diversity < 0:
            raise ValueError("ArrangeConfig: author_decay and epsilon must lie in 0 .. 1, diversity at or above 0")
        if self.temperature <= 0:
            raise ValueError("ArrangeConfig: temperature must be positive; for no exploration set explore=False")


@dataclass(frozen=True, slots=True)
class Slate:
    """What is shown, in order; shorter than asked when the author cap leaves nothing."""

    order_S: np.ndarray
    """(S,) int64, positions among the K candidates."""
    propensity_S: np.ndarray
    """(S,) float64, probability of each choice given the choices before it."""


def arrange(
    value_K: np.ndarray,
    author_K: np.ndarray,
    vector_KD: np.ndarray,
    config: ArrangeConfig,
    k: int,
    rng: np.random.Generator,
) -> Slate:
    """Fill up to k slots."""
    walk = _Walk(value_K, author_K, vector_KD, config)
    order, propensity = [], []
    for _ in range(k):
        considered, probability = walk.choices()
        if len(considered) == 0:
            break
        at = int(rng.choice(len(considered), p=probability)) if config.explore else 0
        order.append(int(considered[at]))
        propensity.append(float(probability[at]))
        walk.place(order[-1])
    return Slate(np.array(order, np.int64), np.array(propensity, np.float64))


def slate_propensities(
    order_S: np.ndarray, value_K: np.ndarray, author_K: np.ndarray, vector_KD: np.ndarray, config: ArrangeConfig
) -> np.ndarray:
    """Probability (S,) of each choice of a given slate, under these values and this config; 0 where impossible."""
    walk = _Walk(value_K, author_K, vector_KD, config)
    propensity_S = np.zeros(len(order_S))
    for slot, item in enumerate(order_S):
        considered, probability = walk.choices()
        propensity_S[slot] = probability[considered == item].sum()
        walk.place(int(item))
    return propensity_S


class _Walk:
    """The slots filled so far and what they do to the rest."""

    def __init__(self, value_K: np.ndarray, author_K: np.ndarray, vector_KD: np.ndarray, config: ArrangeConfig) -> None:
        if not len(value_K) == len(author_K) == len(vector_KD):
            raise ValueError(
                f"arrange: {len(value_K)} values, {len(author_K)} authors and {len(vector_KD)} vectors must be as many"
            )
        if not np.isfinite(value_K).all():
            raise ValueError(f"arrange: value of candidate {np.argmin(np.isfinite(value_K))} is not finite")
        self.value_K, self.author_K, self.config = np.asarray(value_K, np.float64), author_K, config
        norms_K = np.linalg.norm(vector_KD, axis=1, keepdims=True)
        self.vector_KD = vector_KD / np.where(norms_K > 0, norms_K, 1.0)
        self.placed_K = np.zeros(len(value_K), bool)
        self.by_author_K = np.zeros(len(value_K), np.int64)
        self.similarities: list[np.ndarray] = []

    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidates considered for the next slot, best first, and the probability of each (sums to 1)."""
        config = self.config
        allowed = np.flatnonzero(~self.placed_K & (self.by_author_K < config.author_cap))
        if len(allowed) == 0:
            return allowed, np.zeros(0)
        adjusted = self._adjusted()[allowed]
        best_first = np.argsort(-adjusted, kind="stable")[: config.top_m or None]
        considered, adjusted = allowed[best_first], adjusted[best_first]
        if not config.explore:
            return considered[:1], np.ones(1)
        softmax = np.exp((adjusted - adjusted[0]) / config.temperature)
        probability = (1 - config.epsilon) * softmax / softmax.sum() + config.epsilon / len(considered)
        return considered, probability / probability.sum()

    def place(self, item: int) -> None:
        """Put a candidate into the next slot."""
        self.placed_K[item] = True
        if self.author_K[item] != UNKNOWN_AUTHOR:
            self.by_author_K += self.author_K == self.author_K[item]
        self.similarities.append(self.vector_KD @ self.vector_KD[item])

    def _adjusted(self) -> np.ndarray:
        lost_K = (1.0 - self.config.author_decay**self.by_author_K) * np.abs(self.value_K)
        recent = self.similarities[-self.config.window :] if self.config.window else []
        if recent:
            lost_K = lost_K + self.config.diversity * np.maximum(np.max(recent, axis=0), 0.0)
        return self.value_K - lost_K
