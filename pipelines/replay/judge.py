"""One policy through the log: its weights and all its sums, part by part; then its estimates. N rows, C candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.replay.blocks import Catalogue, ListBlock, RankingBlock, RankingRows
from pipelines.replay.bootstrap import Estimate, Interval, Totals, interval, summarise
from pipelines.replay.checks import ReplayInputError
from pipelines.replay.estimators import CLIPS, SlateSums, Weights, available, named, value, weigh
from pipelines.replay.guardrails import GUARDRAILS, Exposure, GuardrailResult
from pipelines.replay.policies import YARDSTICKS, ActionProbabilities, Judged, Logged, Policy, Valued
from pipelines.replay.reward_model import RewardModel
from pipelines.replay.sampling import Sampler
from pipelines.replay.slates import Floats, Ints, LoggedRequests, Shard
from pipelines.replay.slices import SliceResult, judge_slices, slice_sums
from pipelines.replay.trust import Diagnostics, Thresholds, WeightTally


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of every policy."""

    metrics: tuple[str, ...]
    """The first decides."""
    guarded: tuple[str, ...]
    """Guardrails' rewards, judged with the head estimator only."""
    sampler: Sampler
    estimator: str = "snrips"
    clip: float = 100.0

    @property
    def head(self) -> str:
        """Name of the estimator of the head table and the verdict."""
        return named(self.estimator, self.clip)

    @property
    def clips(self) -> tuple[float, ...]:
        """The sweep, with the head's clip."""
        return tuple(dict.fromkeys((*CLIPS, self.clip)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyResult:
    """What the log says of one policy."""

    policy: str
    refused: list[str]
    """Why the log cannot answer for this policy; empty when it can."""
    diagnostics: Diagnostics
    metrics: dict[str, dict[str, Estimate]]
    """By metric, then by estimator (`snrips`, `snrips@100`, `ips`, ...)."""
    yardstick: bool = False
    """A built-in to compare with: its guardrails fail nothing."""
    guardrails: list[GuardrailResult] = field(default_factory=list)
    slices: list[SliceResult] = field(default_factory=list)
    ranking: RankingBlock | None = None
    lists: ListBlock | None = None
    notes: list[str] = field(default_factory=list)
    """What else to know before believing the numbers, such as estimators that disagree."""
    resampled: dict[str, list[float]] = field(default_factory=dict)
    """The head estimator's resamples by metric: two reports of one log and seed can be compared pair by pair."""

    @property
    def broken(self) -> list[GuardrailResult]:
        """Guardrails that fail the run."""
        return [] if self.yardstick or self.refused else [g for g in self.guardrails if g.state == "broken"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What all policies share in one part of the log."""

    shard: Shard
    counts_UB: npt.NDArray[np.uint8]
    model: RewardModel | None
    lifts: dict[str, Floats]
    slices: dict[str, Ints]
    catalogue: Catalogue


class LoggedJudge:
    """The log's own sums, which every difference is taken to."""

    def __init__(self, question: Question, catalogue: Catalogue) -> None:
        self.totals, self.exposure = Totals(), Exposure(catalogue.authors)
        self.lists: ListBlock | None = None
        self.unlogged: set[str] = set()
        self._question = question

    def add(self, c: Context) -> None:
        shard, users = c.shard, len(c.shard.user_ids_U)
        self.unlogged |= {name for name in self._question.guarded if np.isnan(shard.rewards[name]).any()}
        rewards = {name: np.nan_to_num(reward) for name, reward in shard.rewards.items()}
        blocks = SlateSums(shard.slates, users).logged(rewards)
        blocks |= slice_sums(shard, c.slices, rewards[self._question.metrics[0]], None, users)
        self.totals.add(c.counts_UB, blocks)
        shown = shard.requests.video_ids[shard.slates.candidate]
        self.exposure.add(c.catalogue.authors_of(shown), shard.user_ids_U[shard.slates.user])
        self.lists = self.lists or c.catalogue.list_block(shard, shard.slates.candidate)


class PolicyJudge:
    """Sums of one policy."""

    def __init__(self, policy: Judged, question: Question, catalogue: Catalogue) -> None:
        self.policy, self._q = policy, question
        self._totals, self._exposure = Totals(), Exposure(catalogue.authors)
        self._tally = WeightTally(question.estimator, question.clips, question.clip)
        self._ranking = RankingRows()
        self._lists: ListBlock | None = None
        self._drawn = False
        self.first_values_C: Floats | None = None
        """Values of the log's first part, for the self-checks."""

    def add(self, c: Context) -> None:
        """Weigh one part of the log."""
        shard, q, users = c.shard, self._q, len(c.shard.user_ids_U)
        sums = SlateSums(shard.slates, users)
        blocks: dict[str, Floats] = {}
        if isinstance(self.policy, Logged):
            weights = weigh(shard.slates, shard.slates.logged, np.ones(len(shard.slates.logged)))
        elif isinstance(self.policy, ActionProbabilities):
            probability = self.policy.probability(shard.requests, shard.slates)
            weights = weigh(shard.slates, probability, np.full(len(probability), np.nan))
        else:
            weights, modelled = self._valued(self.policy, c, sums)
            blocks |= modelled
        self._tally.add(weights)
        blocks |= sums.weights(weights, q.clips)
        for metric in q.metrics:
            blocks |= sums.earned(weights, metric, shard.rewards[metric], q.clips)
        for metric in q.guarded:
            if metric not in q.metrics:
                reward = np.nan_to_num(shard.rewards[metric])
                blocks |= sums.head(weights, metric, reward, q.estimator, q.clip)
        head = np.minimum(weights.of(q.estimator), q.clip)
        blocks |= slice_sums(shard, c.slices, shard.rewards[q.metrics[0]], head, users)
        self._totals.add(c.counts_UB, blocks)

    def _valued(self, policy: Policy, c: Context, sums: SlateSums) -> tuple[Weights, dict[str, Floats]]:
        shard, q = c.shard, self._q
        valued = checked_values(policy, shard.requests)
        if self.first_values_C is None:
            self.first_values_C = valued.values_C
        law = valued.law_by(q.sampler)
        found = law.conditional(shard.requests, shard.slates, c.lifts)
        weights = weigh(shard.slates, found.probability, found.greedy)
        drawn = law.draw(shard.requests, shard.slates)
        blocks: dict[str, Floats] = {}
        if c.model is not None:
            for metric, lift_C in c.lifts.items():
                model = c.model.modelled(shard, metric, lift_C, found, drawn)
                blocks |= sums.modelled(weights, metric, shard.rewards[metric], model, q.clips)
        authors = c.catalogue.authors_of(shard.requests.video_ids[drawn])
        self._exposure.add(authors, shard.user_ids_U[shard.slates.user])
        self._drawn = True
        self._ranking.add(shard, valued.values_C, valued.predicted)
        self._lists = self._lists or c.catalogue.list_block(shard, drawn)
        return weights, blocks

    def result(self, logged: LoggedJudge, thresholds: Thresholds, labels: dict[str, list[str]]) -> PolicyResult:
        """Everything that was summed, as estimates."""
        q, yardstick = self._q, isinstance(self.policy, YARDSTICKS)
        metrics = {metric: self._estimates(metric, logged.totals) for metric in q.metrics}
        diagnostics = self._tally.diagnostics(self._unsupported(logged.totals))
        is_logged = isinstance(self.policy, Logged)
        return PolicyResult(
            policy=self.policy.name,
            refused=thresholds.reasons(diagnostics),
            diagnostics=diagnostics,
            metrics=metrics,
            yardstick=yardstick,
            guardrails=[] if is_logged else self._guardrails(logged),
            slices=[] if is_logged else judge_slices(self._totals, logged.totals, labels),
            ranking=self._ranking.block(q.metrics) if self._drawn else None,
            lists=logged.lists if is_logged else self._lists,
            notes=disagreements(metrics[q.metrics[0]], q.head),
            resampled={m: value(q.head, m, self._totals, logged.totals).tolist() for m in q.metrics},
        )

    def _estimates(self, metric: str, logged: Totals) -> dict[str, Estimate]:
        base = value("logged", metric, self._totals, logged)
        names = ["logged", *available(metric, self._totals, self._q.clips)]
        return {name: summarise(value(name, metric, self._totals, logged), base) for name in names}

    def _unsupported(self, logged: Totals) -> Interval:
        missing = 1.0 - self._totals.total("w/ips") / logged["rows"].sum(axis=1)
        found = interval(missing)
        return Interval(estimate=max(found.estimate, 0.0), low=max(found.low, 0.0), high=max(found.high, 0.0))

    def _guardrails(self, logged: LoggedJudge) -> list[GuardrailResult]:
        found = []
        for guardrail in GUARDRAILS:
            if guardrail.metric == "author_gini":
                estimate = self._exposure.concentration(logged.exposure) if self._drawn else None
            elif guardrail.metric in logged.unlogged:
                estimate = None
            else:
                base = value("logged", guardrail.metric, self._totals, logged.totals)
                estimate = summarise(value(self._q.head, guardrail.metric, self._totals, logged.totals), base)
            if estimate is not None:
                found.append(guardrail.judge(estimate))
            else:
                found.append(not_logged(guardrail.metric, guardrail.harm, guardrail.why))
        return found


def not_logged(metric: str, harm: str, why: str) -> GuardrailResult:
    """A guardrail the log says nothing about."""
    unknown = Interval(estimate=float("nan"), low=float("nan"), high=float("nan"))
    state: Literal["not logged"] = "not logged"
    return GuardrailResult(
        metric=metric, state=state, logged=float("nan"), value=unknown, difference=unknown, limit=float("nan"),
        harm=harm, why=why,
    )  # fmt: skip


def disagreements(estimates: dict[str, Estimate], head: str) -> list[str]:
    """The unbiased estimators whose intervals do not meet the head's: one of their assumptions fails."""
    if head not in estimates:
        return []
    mine = estimates[head].value
    far = [
        name
        for name in ("snrips", "rips", "dr", "sips")
        if name in estimates and (estimates[name].value.low > mine.high or estimates[name].value.high < mine.low)
    ]
    return [f"estimators disagree: {head} and {', '.join(far)} have intervals that do not meet"] if far else []


def checked_values(policy: Policy, requests: LoggedRequests) -> Valued:
    """The policy's values in one flat array; a wrong length or a value that is no number names its request."""
    given = policy.values(requests)
    valued = given if isinstance(given, Valued) else Valued(values_C=_flat(given, policy.name, requests))
    flat = valued.values_C
    if flat.shape != (len(requests.video_ids),):
        raise ReplayInputError(
            f"policy '{policy.name}' gave {flat.shape} values for {len(requests.video_ids)} candidates of "
            f"{len(requests.request_id)} requests"
        )
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        request = int(np.searchsorted(requests.offsets, bad[0], side="right")) - 1
        raise ReplayInputError(
            f"policy '{policy.name}', request {requests.request_id[request]}, video {requests.video_ids[bad[0]]}: "
            f"value {flat[bad[0]]} is not a finite number; {bad.size} such values"
        )
    return valued


def _flat(values: object, name: str, requests: LoggedRequests) -> Floats:
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values.astype(np.float64, copy=False)
    lists = list(values)  # type: ignore[call-overload]
    if len(lists) != len(requests.request_id):
        raise ReplayInputError(
            f"policy '{name}' gave values for {len(lists)} requests; {len(requests.request_id)} were asked"
        )
    given = np.array([len(v) for v in lists])
    wrong = np.flatnonzero(given != np.diff(requests.offsets))
    if wrong.size:
        i = int(wrong[0])
        asked = int(requests.offsets[i + 1] - requests.offsets[i])
        raise ReplayInputError(
            f"policy '{name}', request {requests.request_id[i]}: {given[i]} values for {asked} candidates"
        )
    return np.concatenate([np.asarray(v, dtype=np.float64) for v in lists])
