"""What a policy is truly worth on logged requests: slates drawn from it, and the exact chance of what they would earn.

The counterpart of replay: the same requests, candidates and sampler, but the world's own probabilities in place of
logged rewards. For tests and benchmarks; nothing that trains or serves may read it. N rows, B pages, S slots.
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
from pipelines.replay.slates import Shard, Slates
from pipelines.world.oracle import World

_MOST_SLOTS = 100


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
    draw, so policies differ by what they are. Slots keep the times at which the log filled them. Where viewers leave,
    a slot's reward is that of those who get there under the policy, and slots count as the log's rows do: the
    self-normalised estimators' question.
    """
    log = CanonicalLog(dataset_dir, ("long_view",), window or Window())
    earned = {policy.name: np.zeros((_MOST_SLOTS, 2)) for policy in policies}
    rows_S = np.zeros(_MOST_SLOTS)
    for shard in log.shards():
        requests = shard.requests
        slates, ts_ms_BS, shown_BS = _pages(shard)
        rows_S += np.bincount(shard.slates.slot, minlength=_MOST_SLOTS)
        user_B = requests.user_id[slates.request[:: ts_ms_BS.shape[1]]]
        for policy in policies:
            law = checked_values(policy, requests).law_by(sampler or Sampler())
            for draw in range(draws):
                drawn_N = law.draw(requests, slates, salt=1 + draw)
                found, reach_BS = world.page_oracle(
                    user_B, requests.video_ids[drawn_N].reshape(ts_ms_BS.shape), ts_ms_BS
                )
                reward_BS = found["watch_ms"] / 1000 if metric == WATCH_METRIC else found[metric]
                weight_BS = reach_BS if world.config.life.leaves else shown_BS
                sums_S2 = np.stack([(weight_BS * reward_BS).sum(axis=0), weight_BS.sum(axis=0)], axis=1)
                earned[policy.name][: len(sums_S2)] += sums_S2
    seen = rows_S > 0
    return {
        name: float((rows_S[seen] * sums_S2[seen, 0] / sums_S2[seen, 1]).sum() / rows_S.sum())
        for name, sums_S2 in earned.items()
    }


def _pages(shard: Shard) -> tuple[Slates, np.ndarray, np.ndarray]:
    """The logged slates at full length, the times (B, S) of their slots, and which slots (B, S) the log holds."""
    logged = shard.slates
    asked, page_N = np.unique(logged.request, return_inverse=True)
    S = int(logged.slot.max()) + 1
    ts_ms_BS = np.repeat(shard.requests.ts_ms[asked][:, None], S, axis=1)
    shown_BS = np.zeros(ts_ms_BS.shape, dtype=bool)
    ts_ms_BS[page_N, logged.slot] = shard.rows["ts_ms"].to_numpy()
    shown_BS[page_N, logged.slot] = True
    n = len(asked) * S
    full = Slates(
        request=np.repeat(asked, S),
        slot=np.tile(np.arange(S), len(asked)),
        user=np.zeros(n, dtype=np.int64),
        logged=np.ones(n),
        candidate=np.zeros(n, dtype=np.int64),
    )
    return full, ts_ms_BS, shown_BS
