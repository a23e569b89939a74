"""What every run checks about itself before its numbers are believed; the checks cost a part of the log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.replay.bootstrap import Totals
from pipelines.replay.estimators import SlateSums, value, weigh
from pipelines.replay.judge import Context, PolicyResult, Question
from pipelines.replay.keys import mix, uniforms
from pipelines.replay.sampling import conditional
from pipelines.replay.slates import Floats, LoggedRequests, Shard

SIGMAS = 5.0
"""A check by chance fails at five standard errors: once in 1.7 million runs when nothing is wrong."""
_SALT = 91


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfCheck:
    """One check; a failed one refuses the whole run."""

    name: str
    passed: bool
    detail: str


def logger_is_itself(logged: PolicyResult) -> SelfCheck:
    """Target = logger: every weight is 1 and every estimator gives the logged mean, to the bit."""
    d = logged.diagnostics
    off = [
        f"{name} of {metric}"
        for metric, estimates in logged.metrics.items()
        for name, found in estimates.items()
        if found.value.estimate != estimates["logged"].value.estimate
    ]
    ones = d.max_weight == 1 and d.mean_weight == 1
    detail = "all weights are 1, all estimators give the logged mean exactly"
    if not ones or off:
        detail = f"weights up to {d.max_weight}, mean {d.mean_weight}; not the logged mean: {', '.join(off) or 'none'}"
    return SelfCheck(name="target = logger", passed=ones and not off, detail=detail)


def constants_leak_no_order(shard: Shard, question: Question) -> SelfCheck:
    """Equal values: every candidate left is equally likely, whatever the order of the candidates."""
    flat = np.full(len(shard.requests.video_ids), 0.1)
    found = conditional(flat, shard.requests, shard.slates, question.sampler)
    left = np.diff(shard.requests.offsets)[shard.slates.request] - shard.slates.slot
    worst = max(np.abs(found.probability * left - 1).max(), np.abs(found.greedy * left - 1).max())
    return SelfCheck(
        name="constant scores leak no order", passed=bool(worst < 1e-9), detail=f"largest relative error {worst:.1e}"
    )


def shuffled_is_random(name: str, values_C: Floats, context: Context, question: Question) -> SelfCheck:
    """A policy's values in the context's part, shuffled within each request, are worth what the uniform policy is."""
    shard, metric, logged = context.shard, question.metrics[0], Totals()
    rewards = {metric: shard.rewards[metric]}
    logged.add(context.counts_UB, SlateSums(shard.slates, len(shard.user_ids_U)).logged(rewards))
    mixed_C = shuffled(values_C, shard.requests)
    worth = [_worth(v, context, question, logged) for v in (mixed_C, np.zeros(len(values_C)))]
    difference = worth[0] - worth[1]
    spread = float(np.nanstd(difference[1:]))
    sigmas = abs(float(difference[0])) / spread if spread > 0 else 0.0
    return SelfCheck(
        name="shuffled scores equal random",
        passed=sigmas < SIGMAS,
        detail=f"{name} shuffled less random: {difference[0]:+.4f} {metric}, {sigmas:.1f} standard errors",
    )


def shuffled(values_C: Floats, requests: LoggedRequests) -> Floats:
    """The values handed to the wrong candidates of their request, by a permutation made from its id."""
    request_C = requests.request_of_candidate()
    place_C = np.arange(len(values_C)) - requests.offsets[:-1][request_C]
    chance_C = uniforms(mix(place_C, _SALT) ^ requests.keys()[request_C], _SALT)
    return values_C[np.lexsort((chance_C, request_C))]


def halves_agree(totals: Totals, metric: str) -> SelfCheck:
    """Users split in half by a hash: the logged means of the halves differ by chance alone."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = totals[f"half/{metric}"] / totals["half/rows"]
    difference = mean[:, 0] - mean[:, 1]
    spread = float(np.nanstd(difference[1:]))
    sigmas = abs(float(difference[0])) / spread if spread > 0 else 0.0
    return SelfCheck(
        name="halves of the users agree",
        passed=bool(sigmas < SIGMAS),
        detail=f"difference {difference[0]:+.4f} {metric}, {sigmas:.1f} standard errors",
    )


def half_sums(shard: Shard, metric: str) -> dict[str, Floats]:
    """Blocks (U, 2) for `halves_agree`."""
    users = len(shard.user_ids_U)
    half_U = (mix(shard.user_ids_U, _SALT) >> np.uint64(63)).astype(np.int64)
    rows, reward = np.zeros((users, 2)), np.zeros((users, 2))
    rows[np.arange(users), half_U] = np.bincount(shard.slates.user, minlength=users)
    reward[np.arange(users), half_U] = np.bincount(shard.slates.user, shard.rewards[metric], users)
    return {"half/rows": rows, f"half/{metric}": reward}


def _worth(values_C: Floats, context: Context, question: Question, logged: Totals) -> Floats:
    shard, metric, totals = context.shard, question.metrics[0], Totals()
    found = conditional(values_C, shard.requests, shard.slates, question.sampler)
    weights = weigh(shard.slates, found.probability, found.greedy)
    sums, clips = SlateSums(shard.slates, len(shard.user_ids_U)), question.clips
    earned = sums.earned(weights, metric, shard.rewards[metric], clips)
    totals.add(context.counts_UB, sums.weights(weights, clips) | earned)
    return value(question.head, metric, totals, logged)
