"""What a policy is truly worth on logged requests: slates drawn from it, and the exact chance of what they would earn.

The counterpart of replay: the same requests, candidates and sampler, but the world's own probabilities in place of
logged rewards. For tests and benchmarks; nothing that trains or serves may read it. N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.replay.judge import checked_values
from pipelines.replay.log import CanonicalLog, Window
from pipelines.replay.policies import Policy
from pipelines.replay.rewards import WATCH_METRIC
from pipelines.replay.sampling import Sampler
from pipelines.world.oracle import World


def true_values(
    world: World,
    dataset_dir: str | Path,
    policies: Sequence[Policy],
    metric: str,
    *,
    sampler: Sampler | None = None,
    window: Window | None = None,
    draws: int = 2,
) -> dict[str, float]:
    """Expected `metric` (a signal, or `watch_s`) a shown row, by policy: what replay of the log estimates.

    Each request gets `draws` slates of every policy. Random numbers are common: they belong to request, slot and
    draw, so policies differ by what they are. Slots keep the times at which the log filled them.
    """
    log = CanonicalLog(dataset_dir, ("long_view",), window or Window())
    earned, rows = {policy.name: 0.0 for policy in policies}, 0
    for shard in log.shards():
        requests, slates = shard.requests, shard.slates
        user_N, ts_ms_N = shard.rows["user_id"].to_numpy(), shard.rows["ts_ms"].to_numpy()
        rows += len(slates.slot) * draws
        for policy in policies:
            law = checked_values(policy, requests).law_by(sampler or Sampler())
            for draw in range(draws):
                drawn_N = law.draw(requests, slates, salt=1 + draw)
                found = world.oracle(user_N, requests.video_ids[drawn_N], ts_ms_N, slates.slot)
                reward_N = found["watch_ms"] / 1000 if metric == WATCH_METRIC else found[metric]
                earned[policy.name] += float(np.sum(reward_N))
    return {name: total / rows for name, total in earned.items()}
