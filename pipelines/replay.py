"""Offline replay: would another policy have earned more on the logged requests? An interval, or an honest refusal.

`replay` reads and checks the log, asks every policy for values, weighs the logged rows and estimates with a paired user
bootstrap. Shapes: C candidates of all requests, N shown rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pipelines.estimators import CLIPS, Diagnostics, Estimate, Floats, Interval, UserBootstrap, Weights, diagnose, weigh
from pipelines.policies import (
    Logged,
    LoggedRequests,
    Policy,
    PolicyFactory,
    Sampler,
    conditional_probabilities,
    resolve,
)
from pipelines.replay_log import ReplayInputError, ReplayLog, read_log

__all__ = ["ReplayInputError", "ReplayReport", "Thresholds", "print_report", "replay"]

SCHEMA_VERSION = 1

MEND = "log more requests or explore more, judge fewer slots, or judge a policy closer to the logger"
"""What helps when a log cannot answer."""


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
    max_top_percent_share: float = 0.5
    """When 1% of the rows carry half of the weight the estimate is those rows' luck."""

    def reasons(self, found: Diagnostics) -> list[str]:
        """Why these weights cannot be trusted; empty when they can."""
        reasons = []
        if found.effective_sample_size < self.min_effective_sample_size:
            reasons.append(
                f"effective sample size {found.effective_sample_size:.0f} is below {self.min_effective_sample_size:.0f}"
            )
        if found.effective_share < self.min_effective_share:
            reasons.append(
                f"only {found.effective_share:.2%} of {found.rows:,} rows are effective, below "
                f"{self.min_effective_share:.0%}: the policy hardly overlaps the logger"
            )
        if not abs(found.mean_weight - 1) <= self.max_mean_weight_error:
            reasons.append(
                f"mean weight {found.mean_weight:.3f} is more than {self.max_mean_weight_error:g} away from 1: the "
                "logger never shows part of what the policy shows, its propensities are wrong, or the rows are too few"
            )
        if found.top_percent_share > self.max_top_percent_share:
            reasons.append(
                f"1% of the rows carry {found.top_percent_share:.0%} of the weight, above "
                f"{self.max_top_percent_share:.0%}"
            )
        return reasons


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyResult:
    """What the log says of one policy."""

    policy: str
    refused: list[str]
    """Why the log cannot answer for this policy; empty when it can."""
    diagnostics: Diagnostics
    metrics: dict[str, dict[str, Estimate]]
    """By metric, then by estimator (`snrips`, `snrips@100`, `ips`, ...)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """A finished replay. `logged` is always the first policy."""

    estimator: str
    """The estimator of the head table and the verdict."""
    metrics: tuple[str, ...]
    policies: list[PolicyResult]
    verdict: str
    requests: int
    users: int
    rows: int
    first_ts_ms: int
    last_ts_ms: int
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Reasons by refused policy."""

    @property
    def exit_code(self) -> int:
        """0, or 3 when any policy was refused."""
        return 3 if self.refused else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: numbers that do not exist are null."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def write(self, path: str | Path) -> None:
        """Write `report.json`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def replay(
    dataset_dir: str | Path,
    policies: Sequence[str | Policy | Logged],
    *,
    metrics: Sequence[str] = ("long_view", "watch_s"),
    sampler: Sampler | None = None,
    days: float | None = None,
    slots: int | None = None,
    resamples: int = 500,
    seed: int = 0,
    estimator: str = "snrips",
    clip: float = 100.0,
    thresholds: Thresholds | None = None,
    factories: Mapping[str, PolicyFactory] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> ReplayReport:
    """Judge `policies` (names for `policies.resolve`, or objects) on the requests logged in `dataset_dir`.

    `days` limits the window to the log's last days, `slots` the question to the first slots of each slate: weights
    multiply down the slate, so fewer slots need a shorter log. `sampler` says how values become slates. The head
    estimator is `estimator` clipped at `clip`. Raises ReplayInputError when the log breaks its contract.
    """
    tell = on_progress or (lambda _: None)
    sampler, thresholds = sampler or Sampler(), thresholds or Thresholds()
    metrics = tuple(metrics)
    head = _head_name(estimator, clip)
    log = read_log(dataset_dir, metrics, days=days, slots=slots)
    tell(f"read {len(log.slates.slot)} shown rows of {len(set(log.slates.request.tolist()))} requests")
    chosen = _resolve_all(policies, log, factories)
    bootstrap = UserBootstrap(log.slates, resamples, seed)
    clips = tuple(dict.fromkeys((*CLIPS, clip)))
    results = []
    for policy in chosen:
        weights = _weights_of(policy, log, sampler)
        diagnostics = diagnose(weights, estimator, clip)
        estimates = {metric: bootstrap.estimate(weights, log.rewards[metric], clips) for metric in metrics}
        refused = thresholds.reasons(diagnostics)
        results.append(PolicyResult(policy=policy.name, refused=refused, diagnostics=diagnostics, metrics=estimates))
        tell(f"judged {policy.name}")
    return ReplayReport(
        estimator=head,
        metrics=metrics,
        policies=results,
        verdict=_verdict(results, metrics, head),
        requests=len(np.unique(log.slates.request)),
        users=log.users,
        rows=len(log.slates.slot),
        first_ts_ms=log.first_ts_ms,
        last_ts_ms=log.last_ts_ms,
        provenance={
            "data_fingerprint": log.fingerprint,
            "seed": seed,
            "resamples": resamples,
            "slots": slots,
            "days": days,
            "sampler": asdict(sampler),
            "thresholds": asdict(thresholds),
            "versions": {name: version(name) for name in ("reelrank", "numpy", "polars")},
        },
        refused={result.policy: result.refused for result in results if result.refused},
    )


def _head_name(estimator: str, clip: float) -> str:
    if estimator not in ("ips", "snips", "rips", "snrips"):
        raise ValueError(f"estimator '{estimator}': known are ips, snips, rips, snrips")
    if not clip > 0:
        raise ValueError(f"clip {clip}: must be above 0; use inf for no clipping")
    return estimator if math.isinf(clip) else f"{estimator}@{clip:g}"


def _resolve_all(
    policies: Sequence[str | Policy | Logged], log: ReplayLog, factories: Mapping[str, PolicyFactory] | None
) -> list[Policy | Logged]:
    """The policies, `logged` first whether it was asked for or not."""
    resolved = [resolve(p, log.history, factories) if isinstance(p, str) else p for p in policies]
    chosen = [Logged(), *(p for p in resolved if not isinstance(p, Logged))]
    names = [policy.name for policy in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two policies are called {', '.join(twice)}: rename one, the report tells them apart by name")
    return chosen


def _weights_of(policy: Policy | Logged, log: ReplayLog, sampler: Sampler) -> Weights:
    if isinstance(policy, Logged):
        return weigh(log.slates, log.slates.logged, np.ones(len(log.slates.logged)))
    values_C = _checked_values(policy, log.requests)
    probability, greedy = conditional_probabilities(values_C, log.requests, log.shown, sampler)
    return weigh(log.slates, probability, greedy)


def _checked_values(policy: Policy, requests: LoggedRequests) -> Floats:
    """The policy's values in one flat array; a wrong length or a value that is no number names its request."""
    values = policy.values(requests)
    if len(values) != len(requests.request_id):
        raise ReplayInputError(
            f"policy '{policy.name}' gave values for {len(values)} requests; {len(requests.request_id)} were asked"
        )
    given = np.array([len(v) for v in values])
    wrong = np.flatnonzero(given != np.diff(requests.offsets))
    if wrong.size:
        i = int(wrong[0])
        asked = int(requests.offsets[i + 1] - requests.offsets[i])
        raise ReplayInputError(
            f"policy '{policy.name}', request {requests.request_id[i]}: {given[i]} values for {asked} candidates"
        )
    flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in values])
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        request = int(np.searchsorted(requests.offsets, bad[0], side="right")) - 1
        raise ReplayInputError(
            f"policy '{policy.name}', request {requests.request_id[request]}, video {requests.video_ids[bad[0]]}: "
            f"value {flat[bad[0]]} is not a finite number; {bad.size} such values"
        )
    return flat


def _verdict(results: Sequence[PolicyResult], metrics: tuple[str, ...], head: str) -> str:
    """Plain words on the first metric, the one that decides."""
    metric = metrics[0]
    others = [result for result in results if result.policy != Logged.name]
    if not others:
        return "Only the logged policy was asked for: nothing to compare."
    sentences, silent, refused = [], [], []
    for result in others:
        difference = result.metrics[metric][head].difference
        size = f"{_shown(difference, 4, sign='+')} {metric} a shown video"
        if result.refused:
            refused.append(result.policy)
        elif difference.low > 0:
            sentences.append(f"{result.policy} would have been better than the logged policy: {size}.")
        elif difference.high < 0:
            sentences.append(f"{result.policy} would have been worse than the logged policy: {size}.")
        else:
            silent.append(result.policy)
    if silent:
        sentences.append(f"No evidence of a difference from the logged policy for {', '.join(silent)}.")
    if refused:
        sentences.append(f"This log cannot say how {', '.join(refused)} would have done: {MEND}.")
    return " ".join(sentences)


def print_report(report: ReplayReport, console: Console | None = None) -> None:
    """The head table, how far the weights can be trusted, the refusals and the verdict."""
    console = console or Console()
    console.print(head_table(report))
    console.print(weight_table(report))
    for policy, reasons in report.refused.items():
        console.print(f"[bold]refused[/bold] {policy}: {'; '.join(reasons)}", highlight=False)
    console.print(report.verdict, highlight=False)


def head_table(report: ReplayReport) -> Table:
    """One row a policy and metric. A refused policy has no number to be quoted."""
    slots = report.provenance["slots"]
    depth = f"first {slots} slot{'s' if slots > 1 else ''}" if slots else "all slots"
    asked = f"{report.requests:,} requests by {report.users:,} users, {depth}"
    table = Table(title=f"replay of {asked}; {report.estimator}", box=SIMPLE, pad_edge=False)
    for name in ("policy", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("estimate [95%]", "less logged [95%]"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.policies:
        for metric in report.metrics:
            found = result.metrics[metric][report.estimator]
            digits = 4 if abs(found.value.estimate) < 1 else 2
            numbers = (_shown(found.value, digits), _shown(found.difference, digits, sign="+"))
            table.add_row(result.policy, metric, *(("refused", "") if result.refused else numbers))
    return table


def weight_table(report: ReplayReport) -> Table:
    """One row a policy: overlap with the logger and what the importance weights look like."""
    table = Table(box=SIMPLE)
    table.add_column("policy", no_wrap=True)
    for name in ("matched", "ESS", "ESS/n", "mean w", "max w", "clipped", "top 1%"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.policies:
        d = result.diagnostics
        table.add_row(
            result.policy,
            f"{d.match_rate:.1%}",
            f"{d.effective_sample_size:,.0f}",
            f"{d.effective_share:.1%}",
            f"{d.mean_weight:.3f}",
            f"{d.max_weight:,.1f}",
            f"{d.share_clipped:.2%}",
            f"{d.top_percent_share:.0%}",
        )
    return table


def _shown(interval: Interval, digits: int, sign: str = "") -> str:
    low, middle, high = (f"{x:{sign}.{digits}f}" for x in (interval.low, interval.estimate, interval.high))
    return f"{middle} [{low}, {high}]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
