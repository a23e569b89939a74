"""From calibrated probabilities to one value a candidate: a versioned list of weights, every term of it explainable.

K candidates, T tasks. A value is a plain sum, so an item's terms say exactly how its value came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranking.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Scores:
    """What the ranker says of K candidates."""

    tasks: tuple[str, ...]
    probability_NT: np.ndarray
    """(N, T) float32, calibrated, slot and surface left out."""
    watch_ms_N: np.ndarray
    """(N,) float32, typical (not average) watch time; zeros when the training log had none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueConfig:
    """What an expected signal and an expected second of watching are worth."""

    version: str = "value-2"
    """Logged with each served item; change it with the weights."""
    weights: tuple[tuple[str, float], ...] = (
        ("click", 0.1),
        ("long_view", 1.0),
        ("like", 2.0),
        ("follow", 4.0),
        ("comment", 2.0),
        ("share", 3.0),
        ("profile_enter", 0.5),
        ("hate", -20.0),
        ("quick_skip", -0.1),
    )
    """Worth of one signal; rare signals weigh more, or they would never count. A quick skip costs what a click is
    worth: where videos play by themselves, they are the two ends of one decision. A task the ranker was not taught
    (no positives in its training data) adds nothing."""
    watch_per_s: float = 0.01
    """Worth of the first second of predicted watch time."""
    watch_saturation_s: float = 60.0
    """Seconds after which more watching adds little: seconds s count as saturation * (1 - exp(-s / saturation))."""
    unconnected_factor: float = 1.0
    """Multiplies a positive value of videos by authors the viewer does not follow, and divides a negative one."""

    def __post_init__(self) -> None:
        unknown = sorted({task for task, _ in self.weights} - set(TASKS))
        if unknown:
            raise ValueError(f"ValueConfig.weights: unknown tasks {unknown}, expected some of {TASKS}")
        if self.watch_saturation_s <= 0 or self.unconnected_factor <= 0:
            raise ValueError("ValueConfig: watch_saturation_s and unconnected_factor must be positive")


def terms(scores: Scores, connected_K: np.ndarray, config: ValueConfig) -> dict[str, np.ndarray]:
    """Each part of the value (K,) float64, keyed by signal, `watch` and `unconnected`; they add up to the value."""
    parts = {
        task: weight * scores.probability_NT[:, scores.tasks.index(task)].astype(np.float64)
        for task, weight in config.weights
        if task in scores.tasks
    }
    watch_s = scores.watch_ms_N.astype(np.float64) / 1000.0
    parts["watch"] = config.watch_per_s * config.watch_saturation_s * -np.expm1(-watch_s / config.watch_saturation_s)
    total_K = np.sum(list(parts.values()), axis=0)
    factor_K = np.where(total_K > 0, config.unconnected_factor, 1.0 / config.unconnected_factor)
    parts["unconnected"] = np.where(np.asarray(connected_K, dtype=bool), 0.0, total_K * (factor_K - 1.0))
    return parts


def values(scores: Scores, connected_K: np.ndarray, config: ValueConfig) -> np.ndarray:
    """One value a candidate (K,) float64, higher is better."""
    return np.sum(list(terms(scores, connected_K, config).values()), axis=0)
