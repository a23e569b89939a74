"""What changes with time and with what was shown: tastes drift, topics tire, pages are left, viewers return or not.

All of it is off in the default world (`LifeConfig`). Chances given a page stay exact: satiation depends on what was
shown above, and leaving on a slot's own outcome, so that the chance to reach a slot is a product down the page.
U users, K topics, D days, B pages, S slots.
"""

from __future__ import annotations

import numpy as np

from pipelines.world.config import DAY_MS, START_MS, LifeConfig


def tastes_by_day(taste_UK: np.ndarray, days: int, life: LifeConfig, rng: np.random.Generator) -> np.ndarray:
    """(D, U, K) float32, unit length: an Ornstein-Uhlenbeck walk around what a viewer is, in steps of a day."""
    away_UK = np.zeros(taste_UK.shape)
    found = np.empty((days, *taste_UK.shape), dtype=np.float32)
    for day in range(days):
        now_UK = np.maximum(taste_UK + away_UK, 0.01)
        found[day] = now_UK / np.linalg.norm(now_UK, axis=1, keepdims=True)
        away_UK = life.drift_kept * away_UK + rng.normal(0, life.drift, taste_UK.shape)
    return found


def day_of(ts_ms_B: np.ndarray, days: int) -> np.ndarray:
    """Day of each instant; what comes after the last counts as the last."""
    return np.clip((ts_ms_B - START_MS) // DAY_MS, 0, days - 1)


def satiation(topic_BS: np.ndarray, life: LifeConfig) -> np.ndarray:
    """(B, S) affinity lost to the videos of the same topic above in the page, the nearer ones more."""
    if not life.satiation:
        return np.zeros(topic_BS.shape)
    slots = np.arange(topic_BS.shape[1])
    gap_SS = slots[:, None] - slots[None, :] - 1
    fading_SS = np.where(gap_SS >= 0, life.satiation_kept ** np.maximum(gap_SS, 0), 0.0)
    same_BSS = topic_BS[:, :, None] == topic_BS[:, None, :]
    return life.satiation * (same_BSS * fading_SS).sum(axis=2)


def leaving(stay_B: np.ndarray, life: LifeConfig) -> np.ndarray:
    """Chance that the page ends below a slot, given the outcome there or, exactly, the chance of it."""
    return life.leave_after_skip + (life.leave_after_stay - life.leave_after_skip) * stay_B


def reach(stay_BS: np.ndarray, life: LifeConfig) -> np.ndarray:
    """(B, S) chance to get to each slot, given the chances to stay for the ones above."""
    goes_on_BS = 1.0 - leaving(stay_BS, life)
    return np.cumprod(np.column_stack([np.ones(len(stay_BS)), goes_on_BS[:, :-1]]), axis=1)


class Returning:
    """How gladly each viewer comes back: a memory of the last days, 0 for the usual share of videos stayed for."""

    def __init__(self, n_users: int, life: LifeConfig) -> None:
        self._life = life
        self._mood_U = np.zeros(n_users)

    @property
    def pull_U(self) -> np.ndarray:
        """Factor of tomorrow's visits."""
        return np.exp(self._life.return_gain * self._mood_U)

    def learn(self, user_N: np.ndarray, stayed_N: np.ndarray, hated_N: np.ndarray) -> None:
        """A day's shown videos; who did not come forgets a little."""
        n = len(self._mood_U)
        shown_U = np.bincount(user_N, minlength=n)
        liked_U = np.bincount(user_N, stayed_N - self._life.return_hate * hated_N, n) / np.maximum(shown_U, 1)
        today_U = np.where(shown_U > 0, liked_U - self._life.return_usual, 0.0)
        self._mood_U = self._life.return_memory * self._mood_U + (1 - self._life.return_memory) * today_U
