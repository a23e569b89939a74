"""A small white-box log with a cascade and users who differ, whose every expectation can be enumerated.

Eight videos, slates of three by a Plackett-Luce logger. A long view depends on the video, on the user's mood (three
kinds of users), and on the slot above: who has just liked one is choosier. N requests, S slots, V videos, M moods.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import polars as pl

from pipelines.replay.keys import mix
from pipelines.replay.slates import Floats, LoggedRequests, Shard, Slates
from pipelines.world.logger import draw_page

VIDEOS, SLOTS = 8, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LogWorld:
    """Who is there, what is shown, and what it earns."""

    users: int = 400
    requests: int = 2_000
    logger_epsilon: float = 0.1
    satiation: float = 1.6
    """Logit lost in the slot below a long view."""
    moods: tuple[float, ...] = (-1.6, 0.0, 1.6)
    """Logit by kind of user, equally many of each: what makes the rows of a user alike."""
    activity: float = 1.0
    """Spread of the log of how often users come."""
    seed: int = 5

    def appeal_V(self) -> Floats:
        return np.random.default_rng(self.seed).normal(-0.3, 0.9, VIDEOS)

    def logger_V(self) -> Floats:
        """The logger's scores: half the truth."""
        return 0.6 * self.appeal_V() + np.random.default_rng(self.seed + 1).normal(0, 0.5, VIDEOS)

    def log(self, seed: int) -> Shard:
        """One log: users, their mood and activity, slates and outcomes are drawn afresh."""
        rng = np.random.default_rng([self.seed, seed])
        activity_U = rng.lognormal(0, self.activity, self.users)
        user_N = rng.choice(self.users, self.requests, p=activity_U / activity_U.sum())
        mood_N = np.array(self.moods)[rng.integers(0, len(self.moods), self.users)][user_N]
        scores = np.tile(self.logger_V(), (self.requests, 1))
        shown_NS, p_NS = draw_page(scores, np.ones(scores.shape, dtype=bool), SLOTS, self.logger_epsilon, rng)
        reward_NS, above_N = np.zeros((self.requests, SLOTS)), np.zeros(self.requests)
        for slot in range(SLOTS):
            chance_N = self._chance(shown_NS[:, slot], mood_N, above_N)
            above_N = (rng.random(self.requests) < chance_N).astype(np.float64)
            reward_NS[:, slot] = above_N
        return self._shard(user_N, shown_NS, p_NS, reward_NS, seed)

    def true_value(self, target_V: Floats, epsilon: float = 0.0) -> float:
        """Long views a shown row under Plackett-Luce over `target_V`: all 336 slates, moods and outcomes above."""
        total = 0.0
        for slate in permutations(range(VIDEOS), SLOTS):
            p, left = 1.0, np.ones(VIDEOS, dtype=bool)
            for video in slate:
                weight = np.exp(target_V) * left
                p *= (1 - epsilon) * weight[video] / weight.sum() + epsilon / left.sum()
                left[video] = False
            for mood in self.moods:
                liked = 0.0
                for video in slate:
                    calm, sated = (float(self._chance(video, mood, above)) for above in (0.0, 1.0))
                    liked = (1 - liked) * calm + liked * sated
                    total += p * liked / (SLOTS * len(self.moods))
        return total

    def _chance(self, video: np.ndarray | int, mood: np.ndarray | float, above: np.ndarray | float) -> Floats:
        return 1 / (1 + np.exp(-(self.appeal_V()[video] + mood - self.satiation * np.asarray(above))))

    def _shard(self, user_N: np.ndarray, shown_NS: np.ndarray, p_NS: Floats, reward_NS: Floats, seed: int) -> Shard:
        n = self.requests
        # Users of different logs are different users: their resamples must not be the same.
        ids_U = (mix(np.arange(self.users), seed + 100) >> np.uint64(1)).astype(np.int64)
        users, user = np.unique(ids_U[user_N], return_inverse=True)
        requests = LoggedRequests(
            request_id=[f"{seed}-{i}" for i in range(n)],
            user_id=ids_U[user_N],
            ts_ms=np.arange(n),
            surface=[None] * n,
            offsets=np.arange(n + 1) * VIDEOS,
            video_ids=np.tile(np.arange(VIDEOS), n),
        )
        slates = Slates(
            request=np.repeat(np.arange(n), SLOTS),
            slot=np.tile(np.arange(SLOTS), n),
            user=np.repeat(user, SLOTS),
            logged=p_NS.ravel(),
            candidate=(np.arange(n)[:, None] * VIDEOS + shown_NS).ravel(),
        )
        rewards = {"long_view": reward_NS.ravel()}
        rows = pl.DataFrame(
            {"user_id": ids_U[np.repeat(user_N, SLOTS)], "video_id": shown_NS.ravel(), "slot": slates.slot, **rewards}
        )
        return Shard(requests=requests, slates=slates, user_ids_U=users, rewards=rewards, rows=rows)
