"""Calibration: logits to probabilities that mean what they say, fitted on a held-out day with the side tower off.

Platt scaling a task, sigmoid(slope * logit + intercept), shrunk to the identity when positives are few; the intercept
also makes up for the side tower, which training had and serving has not. N rows, T tasks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

MIN_FOR_SLOPE = 30
"""Positives, and negatives, below which only the intercept is fitted."""
SLOPE_STRENGTH = 10.0
"""Weight of the pull towards slope 1, in units of log-likelihood."""
INTERCEPT_STRENGTH = 1.0
"""Weight of the pull towards intercept 0: about the evidence of one positive."""
MIN_SLOPE = 0.05
"""A slope never turns the order around."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """One slope and one intercept a task."""

    tasks: tuple[str, ...]
    slope_T: np.ndarray
    intercept_T: np.ndarray

    @classmethod
    def identity(cls, tasks: tuple[str, ...]) -> Self:
        """Probabilities as the model gives them."""
        return cls(tasks, np.ones(len(tasks)), np.zeros(len(tasks)))

    @classmethod
    def fit(cls, tasks: tuple[str, ...], logits_NT: np.ndarray, labels_NT: np.ndarray) -> Self:
        """Fit each task on its logged rows (labels 0, 1 or NaN); a task without any stays as it is."""
        found = [_platt(logits_NT[:, t].astype(np.float64), labels_NT[:, t]) for t in range(len(tasks))]
        return cls(tasks, np.array([slope for slope, _ in found]), np.array([shift for _, shift in found]))

    def apply(self, logits_NT: np.ndarray) -> np.ndarray:
        """Probabilities (N, T) float32."""
        z_NT = logits_NT * self.slope_T + self.intercept_T
        return _sigmoid(z_NT).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write JSON, one line a task."""
        rows = {
            task: {"slope": float(self.slope_T[t]), "intercept": float(self.intercept_T[t])}
            for t, task in enumerate(self.tasks)
        }
        path.write_text(json.dumps(rows, indent=2))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Inverse of `save`."""
        rows = json.loads(path.read_text())
        slopes, intercepts = ([row[name] for row in rows.values()] for name in ("slope", "intercept"))
        return cls(tuple(rows), np.array(slopes, np.float64), np.array(intercepts, np.float64))


def _platt(logit_N: np.ndarray, label_N: np.ndarray) -> tuple[float, float]:
    logged = ~np.isnan(label_N)
    logit_N, label_N = logit_N[logged], label_N[logged].astype(np.float64)
    positives = label_N.sum()
    fit_slope = min(positives, len(label_N) - positives) >= MIN_FOR_SLOPE
    slope, intercept = _newton(logit_N, label_N, fit_slope=fit_slope)
    if slope < MIN_SLOPE:
        slope = MIN_SLOPE
        intercept = _newton(logit_N * slope, label_N, fit_slope=False)[1]
    return slope, intercept


def _newton(logit_N: np.ndarray, label_N: np.ndarray, *, fit_slope: bool) -> tuple[float, float]:
    """Maximum a posteriori of the strictly concave log-posterior, with halved steps where Newton overshoots."""
    strength = np.array([SLOPE_STRENGTH, INTERCEPT_STRENGTH])
    design_N2 = np.stack([logit_N, np.ones_like(logit_N)], axis=1)
    prior, free = np.array([1.0, 0.0]), np.array([fit_slope, True])

    def objective(at: np.ndarray) -> float:
        z_N = design_N2 @ at
        return float((np.logaddexp(0.0, z_N) - label_N * z_N).sum() + (strength * (at - prior) ** 2).sum() / 2)

    at, value = prior.copy(), objective(prior)
    for _ in range(50):
        p_N = _sigmoid(design_N2 @ at)
        gradient = (design_N2 * (p_N - label_N)[:, None]).sum(0) + strength * (at - prior)
        curvature = (design_N2 * (p_N * (1 - p_N))[:, None]).T @ design_N2 + np.diag(strength)
        step = np.zeros(2)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        scale = 1.0
        while objective(at - scale * step) > value and scale > 1e-6:
            scale /= 2
        at = at - scale * step
        value = objective(at)
        if np.abs(step).max() < 1e-9:
            break
    return float(at[0]), float(at[1])


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
