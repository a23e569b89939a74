"""Offline replay: would another policy have earned more on the logged requests? An interval, or an honest refusal.

    log -> parts of whole requests -> every policy's weights -> sums by resample -> estimates, guardrails, slices

One pass over the log, a part at a time; what is kept between parts is sums.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from pipelines.replay.blocks import Catalogue
from pipelines.replay.bootstrap import Resamples, Totals
from pipelines.replay.checks import ReplayInputError
from pipelines.replay.estimators import ESTIMATORS
from pipelines.replay.formats import open_log
from pipelines.replay.guardrails import REWARDS
from pipelines.replay.judge import Context, LoggedJudge, PolicyJudge, PolicyResult, Question
from pipelines.replay.log import ReplayLog, Window
from pipelines.replay.policies import Judged, Logged, Policy, PolicyFactory, Random, resolve
from pipelines.replay.report import Fingerprint, ReplayReport, verdict
from pipelines.replay.reward_model import RewardModel
from pipelines.replay.rewards import METRICS
from pipelines.replay.sampling import Sampler
from pipelines.replay.selfchecks import (
    SelfCheck,
    constants_leak_no_order,
    half_sums,
    halves_agree,
    logger_is_itself,
    shuffled_is_random,
)
from pipelines.replay.slices import Slicer
from pipelines.replay.trust import Thresholds

HEADS = ("ips", "snips", "rips", "snrips")
"""Estimators that can head a report; the others are shown beside them."""


def replay(
    dataset_dir: str | Path,
    policies: Sequence[str | Policy | Logged],
    *,
    metrics: Sequence[str] | None = None,
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

    `dataset_dir` is a folder of canonical tables, an Open Bandit campaign, or KuaiRand's random log (`formats.py`).
    The first of `metrics` decides; by default the log's own. `days` limits the window to the log's last days, `slots`
    the question to the first slots of each slate: weights multiply down the slate, so fewer slots need a shorter log.
    `sampler` says how values become slates. Raises ReplayInputError when the log breaks its contract.
    """
    tell = on_progress or (lambda _: None)
    thresholds = thresholds or Thresholds()
    log = open_log(Path(dataset_dir), checked_metrics(metrics), Window(days=days, slots=slots), REWARDS)
    question = Question(
        metrics=log.metrics,
        guarded=REWARDS,
        sampler=sampler or Sampler(),
        estimator=_known_head(estimator),
        clip=_positive(clip),
    )
    chosen = _resolve_all(policies, log, factories)
    return _judge(log, chosen, question, Resamples(resamples, seed), thresholds, tell).report(
        {
            "data": str(dataset_dir),
            "seed": seed,
            "resamples": resamples,
            "slots": slots,
            "days": days,
            "sampler": asdict(question.sampler),
            "thresholds": asdict(thresholds),
            "versions": versions(),
        }
    )


class _Run:
    """What a run has found so far."""

    def __init__(self, question: Question, thresholds: Thresholds) -> None:
        self._q, self._thresholds = question, thresholds
        self.fingerprint, self.halves = Fingerprint(), Totals()
        self.checks: list[SelfCheck] = []
        self.results: list[PolicyResult] = []
        self.not_judged: dict[str, int] = {}
        self.rows = self.requests = 0
        self.users = np.zeros(0, dtype=np.int64)
        self.first_ms, self.last_ms = 2**63 - 1, 0

    def see(self, context: Context) -> None:
        shard = context.shard
        self.fingerprint.add(shard, self._q.metrics)
        self.halves.add(context.counts_UB, half_sums(shard, self._q.metrics[0]))
        self.rows += len(shard.slates.slot)
        self.requests += int((shard.slates.slot == 0).sum())
        self.users = np.union1d(self.users, shard.user_ids_U)
        ts_ms = shard.rows["ts_ms"].to_numpy()
        self.first_ms, self.last_ms = min(self.first_ms, int(ts_ms.min())), max(self.last_ms, int(ts_ms.max()))

    def report(self, provenance: dict) -> ReplayReport:
        results = self.results
        return ReplayReport(
            estimator=self._q.head,
            metrics=self._q.metrics,
            policies=results,
            verdict=verdict(results, self._q.metrics, self._q.head),
            requests=self.requests,
            users=len(self.users),
            rows=self.rows,
            first_ts_ms=self.first_ms,
            last_ts_ms=self.last_ms,
            provenance={"data_fingerprint": self.fingerprint.hexdigest(), **provenance},
            refused={r.policy: r.refused for r in results if r.refused},
            broken={r.policy: [g.metric for g in r.broken] for r in results if r.broken},
            self_checks=self.checks,
            not_judged=self.not_judged,
        )


def _judge(
    log: ReplayLog,
    policies: list[Judged],
    question: Question,
    resamples: Resamples,
    thresholds: Thresholds,
    tell: Callable[[str], None],
) -> _Run:
    run, catalogue, slicer = _Run(question, thresholds), Catalogue(log.history.videos), Slicer(log.history)
    logged = LoggedJudge(question, catalogue)
    judges = [PolicyJudge(policy, question, catalogue) for policy in policies]
    model: RewardModel | None = None
    # Policies keep their own sums, so threads change no number; most of the work is numpy's, outside the lock.
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for number, shard in enumerate(log.shards()):
            if model is None:  # after the first part has passed its checks: a broken row is named, not modelled
                model = RewardModel(log.outcomes(), question.metrics)
            context = Context(
                shard=shard,
                counts_UB=resamples.counts(shard.user_ids_U),
                model=model,
                lifts={metric: model.lifts(shard, metric) for metric in question.metrics},
                slices=slicer.codes(shard),
                catalogue=catalogue,
            )
            run.see(context)
            logged.add(context)
            list(pool.map(lambda judge, c=context: judge.add(c), judges))
            if number == 0:
                run.checks.append(constants_leak_no_order(shard, question))
                run.checks += _shuffled(judges, context, question)
            tell(f"judged {run.rows:,} shown rows of {run.requests:,} requests")
    run.not_judged = log.not_judged()
    run.results = [judge.result(logged, thresholds, slicer.labels) for judge in judges]
    run.checks += [logger_is_itself(run.results[0]), halves_agree(run.halves, question.metrics[0])]
    return run


def _shuffled(judges: Sequence[PolicyJudge], context: Context, question: Question) -> list[SelfCheck]:
    """The check on the first policy that has values of its own."""
    for judge in judges:
        if judge.first_values_C is not None and not isinstance(judge.policy, Random):
            return [shuffled_is_random(judge.policy.name, judge.first_values_C, context, question)]
    return []


def _resolve_all(
    policies: Sequence[str | Policy | Logged], log: ReplayLog, factories: Mapping[str, PolicyFactory] | None
) -> list[Judged]:
    """The policies, `logged` first whether it was asked for or not."""
    resolved = [resolve(p, log.history, factories) if isinstance(p, str) else p for p in policies]
    chosen = [Logged(), *(p for p in resolved if not isinstance(p, Logged))]
    names = [policy.name for policy in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two policies are called {', '.join(twice)}: rename one, the report tells them apart by name")
    return chosen


def checked_metrics(metrics: Sequence[str] | None) -> tuple[str, ...] | None:
    """The metrics asked for; raises ReplayInputError for one nobody knows."""
    if metrics is None:
        return None
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ReplayInputError(f"metric '{''.join(unknown[:1])}': known are {', '.join(METRICS)}")
    return tuple(dict.fromkeys(metrics))


def _known_head(estimator: str) -> str:
    if estimator not in HEADS:
        raise ValueError(f"estimator '{estimator}': known are {', '.join(HEADS)}; others are: {', '.join(ESTIMATORS)}")
    return estimator


def _positive(clip: float) -> float:
    if not clip > 0:
        raise ValueError(f"clip {clip}: must be above 0; use inf for no clipping")
    return clip


def versions() -> dict[str, str]:
    """Of Python, of what computes, and of the code where it runs from a checkout."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("reelrank", "numpy", "polars", "pyarrow")}
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],  # noqa: S607
        cwd=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})
