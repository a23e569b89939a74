"""How far importance weights can be trusted, and when the log cannot answer at all.

Sums and a histogram are kept, not the weights, so that a log of any length can be judged. N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipelines.replay.bootstrap import Interval
from pipelines.replay.estimators import Weights
from pipelines.replay.slates import Floats

_BINS_A_DOUBLING = 64
_DOUBLINGS = 80
"""The histogram spans 2^-80 to 2^80 in steps of 1.1%; lighter weights count as 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostics:
    """How far one policy's weights can be trusted."""

    rows: int
    """Rows weighed."""
    effective_sample_size: float
    """(sum w)^2 / sum w^2 (Kish): the number of equally weighted rows that would be as informative."""
    effective_share: float
    """Effective sample size over rows."""
    mean_weight: float
    """1 in expectation when the logger could have shown whatever the target shows."""
    max_weight: float
    """The heaviest row."""
    share_clipped: float
    """Share of rows whose weight is above the clip."""
    top_percent_share: float
    """Share of all weight that the heaviest 1% of rows carry (to within 1%)."""
    match_rate: float
    """Share of rows where the greedy target shows the logged video."""
    unsupported_mass: Interval
    """Share of the policy's slots that the logger never fills so: 1 - mean of the slots' own weights, at least 0."""
    effective_by_clip: dict[str, float] = field(default_factory=dict)
    """Effective sample size of the weights cut at each clip."""
    histogram: dict[str, list[float]] = field(default_factory=dict)
    """`weight` (lower edges, doublings), `rows` and `mass` (share of the weight)."""


class WeightTally:
    """Sums of one policy's weights, part by part."""

    def __init__(self, estimator: str, clips: tuple[float, ...], clip: float) -> None:
        self._estimator, self._clips, self._clip = estimator, clips, clip
        self._rows = self._above = 0
        self._matched = self._max = 0.0
        self._sum, self._squares = np.zeros(len(clips)), np.zeros(len(clips))
        bins = 2 * _DOUBLINGS * _BINS_A_DOUBLING + 1
        self._count, self._mass = np.zeros(bins), np.zeros(bins)

    def add(self, weights: Weights) -> None:
        w = weights.of(self._estimator)
        self._rows += len(w)
        self._above += int((w > self._clip).sum())
        self._matched += float(weights.matched.sum())
        self._max = max(self._max, float(w.max(initial=0.0)))
        for i, clip in enumerate(self._clips):
            cut = np.minimum(w, clip)
            self._sum[i] += cut.sum()
            self._squares[i] += cut @ cut
        bin_N = _bin(w)
        self._count += np.bincount(bin_N, minlength=len(self._count))
        self._mass += np.bincount(bin_N, weights=w, minlength=len(self._mass))

    def diagnostics(self, unsupported: Interval) -> Diagnostics:
        """`clips` must hold inf: the weights before clipping."""
        ess = np.divide(self._sum**2, self._squares, out=np.zeros_like(self._sum), where=self._squares > 0)
        whole = self._clips.index(float("inf"))
        return Diagnostics(
            rows=self._rows,
            effective_sample_size=float(ess[whole]),
            effective_share=float(ess[whole] / self._rows),
            mean_weight=float(self._sum[whole] / self._rows),
            max_weight=self._max,
            share_clipped=self._above / self._rows,
            top_percent_share=self._top(max(self._rows // 100, 1)),
            match_rate=self._matched / self._rows,
            unsupported_mass=unsupported,
            effective_by_clip={f"{clip:g}": float(e) for clip, e in zip(self._clips, ess, strict=True)},
            histogram=self._doublings(),
        )

    def _top(self, rows: int) -> float:
        """Share of the weight in the heaviest rows; the last bin taken from gives in proportion."""
        total = self._mass.sum()
        if total <= 0:
            return 1.0
        taken = np.minimum(np.cumsum(self._count[::-1]), rows)
        share = np.diff(taken, prepend=0) / np.maximum(self._count[::-1], 1)
        return float((share * self._mass[::-1]).sum() / total)

    def _doublings(self) -> dict[str, list[float]]:
        count = self._count[1:].reshape(-1, _BINS_A_DOUBLING).sum(axis=1)
        mass = self._mass[1:].reshape(-1, _BINS_A_DOUBLING).sum(axis=1)
        used = np.flatnonzero(count)
        if not used.size:
            return {"weight": [], "rows": [], "mass": []}
        kept = np.arange(max(int(used[0]), _DOUBLINGS - 8), int(used[-1]) + 1)  # below 1/256 lies no weight to speak of
        total = max(float(self._mass.sum()), 1e-300)
        return {
            "weight": (2.0 ** (kept - _DOUBLINGS)).tolist(),
            "rows": count[kept].tolist(),
            "mass": (mass[kept] / total).tolist(),
        }


def _bin(w: Floats) -> np.ndarray:
    with np.errstate(divide="ignore"):
        place = np.floor((np.log2(w) + _DOUBLINGS) * _BINS_A_DOUBLING)
    return np.clip(np.nan_to_num(place, neginf=-1.0) + 1, 0, 2 * _DOUBLINGS * _BINS_A_DOUBLING).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """When the log cannot answer. Each limit refuses; none merely warns."""

    min_effective_sample_size: float = 200.0
    """With 200 effective rows a rate near one half has an interval of about +-.07: fewer decide nothing."""
    min_effective_share: float = 0.01
    """Less than 1% effective means that most rows say nothing: the policies hardly overlap."""
    max_mean_weight_error: float = 0.1
    """The mean weight is 1 when the logger could show all that the target shows; 10% off means missing support, wrong
    propensities, or too few rows to tell."""
    max_unsupported_mass: float = 0.05
    """What the logger never shows is missing from every estimate: with 5% of the slots unknown, a rate of one half is
    known to +-.025 at best, which no number of rows mends. Refused when the lower end of the interval is above."""
    max_top_percent_share: float = 0.5
    """When 1% of the rows carry half of the weight the estimate is those rows' luck."""

    def reasons(self, found: Diagnostics) -> list[str]:
        """Why these weights cannot be trusted and what would mend it; empty when they can."""
        reasons = []
        if found.effective_sample_size < self.min_effective_sample_size:
            short = self.min_effective_sample_size / max(found.effective_sample_size, 1.0)
            reasons.append(
                f"effective sample size {found.effective_sample_size:.0f} is below "
                f"{self.min_effective_sample_size:.0f} (mend: about {short:.1f} times the requests, or fewer slots)"
            )
        if found.effective_share < self.min_effective_share:
            reasons.append(
                f"only {found.effective_share:.2%} of {found.rows:,} rows are effective, below "
                f"{self.min_effective_share:.0%}: the policy hardly overlaps the logger (mend: judge fewer slots, a "
                "softer policy, or let the logger explore more)"
            )
        if not abs(found.mean_weight - 1) <= self.max_mean_weight_error:
            reasons.append(
                f"mean weight {found.mean_weight:.3f} is more than {self.max_mean_weight_error:g} away from 1: the "
                "logger never shows part of what the policy shows, its propensities are wrong, or the rows are too few "
                "(mend: check how propensities are logged, then explore more)"
            )
        if found.unsupported_mass.low > self.max_unsupported_mass:
            reasons.append(
                f"{found.unsupported_mass.estimate:.0%} of what the policy shows has no support in the log, above "
                f"{self.max_unsupported_mass:.0%} (mend: give every candidate a chance in the logger, e.g. epsilon > 0)"
            )
        if found.top_percent_share > self.max_top_percent_share:
            reasons.append(
                f"1% of the rows carry {found.top_percent_share:.0%} of the weight, above "
                f"{self.max_top_percent_share:.0%} (mend: judge fewer slots or a policy closer to the logger)"
            )
        return reasons
