"""Smoothed rates of users, videos, authors and tags, as of the start of a day.

An impression sees only what was counted on days before its own, so no row contributes to its own features, and a
published bundle carries exactly one day's view: training and serving read the same arrays. E keys, S signals.
Rates are (positives + prior * strength) / (impressions + strength), the prior being the global rate. Of the time
before the log (day BEFORE) nothing is known: zeros, the features of a key without impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.entities import Entities, mapped
from features.schema import SIGNALS

COUNTED: tuple[str, ...] = ("click", "long_view", "like")
"""Signals that are counted."""
STRENGTH = 20.0
"""Pseudo-impressions behind the prior."""
BEFORE = -1
"""The day of impressions that precede the log."""
WIDTH_PER_KEY = len(COUNTED) + 1
"""Features a key: one log-odds a signal, and log1p of the impressions."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one day adds: impressions where a signal was logged, and its positives."""

    logged_ES: np.ndarray
    positive_ES: np.ndarray

    @classmethod
    def zeros(cls, n_keys: int) -> Tally:
        shape = (n_keys, len(COUNTED))
        return cls(np.zeros(shape, np.float64), np.zeros(shape, np.float64))

    def add(self, keys_N: np.ndarray, signals_NS: np.ndarray) -> None:
        """Count rows (keys (N,), signals (N, len(SIGNALS)) with NaN for not logged)."""
        n_keys = len(self.logged_ES)
        for s, signal in enumerate(COUNTED):
            value = signals_NS[:, SIGNALS.index(signal)]
            logged = ~np.isnan(value)
            self.logged_ES[:, s] += np.bincount(keys_N[logged], minlength=n_keys)
            self.positive_ES[:, s] += np.bincount(keys_N[logged], weights=value[logged], minlength=n_keys)

    def features(self) -> np.ndarray:
        """(E, WIDTH_PER_KEY) float32: log-odds of each smoothed rate less the prior's, then log1p(impressions) / 5."""
        total = self.logged_ES.sum(axis=0)
        prior_S = np.clip((self.positive_ES.sum(axis=0) + 1.0) / (total + 2.0), 1e-4, 1 - 1e-4)
        rate_ES = (self.positive_ES + prior_S * STRENGTH) / (self.logged_ES + STRENGTH)
        log_odds_ES = np.log(rate_ES / (1.0 - rate_ES)) - np.log(prior_S / (1.0 - prior_S))
        support_E1 = np.log1p(self.logged_ES.max(axis=1, keepdims=True)) / 5.0
        return np.concatenate([log_odds_ES, support_E1], axis=1).astype(np.float32)


class DailyCounters:
    """Counter features of users and videos for each day: `user_day[d]` and `video_day[d]` know days before d."""

    def __init__(self, user_day: Sequence[np.ndarray], video_day: Sequence[np.ndarray]) -> None:
        self.user_day = user_day
        self.video_day = video_day

    @property
    def days(self) -> int:
        """Number of views; the last is the one a bundle serves with."""
        return len(self.user_day)

    def user(self, day_B: np.ndarray, user_row_B: np.ndarray) -> np.ndarray:
        """(B, user width) float32."""
        return _by_day(self.user_day, day_B, user_row_B)

    def video(self, day_N: np.ndarray, video_row_N: np.ndarray) -> np.ndarray:
        """(N, video width) float32: the video's own counters, its author's, and the mean over its tags."""
        return _by_day(self.video_day, day_N, video_row_N)

    def save(self, folder: Path) -> None:
        """Write `counters_user.npy` (days, users+1, width) and `counters_video.npy`."""
        np.save(folder / "counters_user.npy", np.stack(self.user_day), allow_pickle=False)
        np.save(folder / "counters_video.npy", np.stack(self.video_day), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> DailyCounters:
        """Memory-map what `save` wrote."""
        return cls(list(mapped(folder / "counters_user.npy")), list(mapped(folder / "counters_video.npy")))


def count_days(
    *,
    users: Entities,
    videos: Entities,
    author_feature: str,
    tag_feature: str,
    n_days: int,
    day_N: np.ndarray,
    user_row_N: np.ndarray,
    video_row_N: np.ndarray,
    signals_NS: np.ndarray,
) -> DailyCounters:
    """Views for days 0 .. n_days; rows of day BEFORE are known from day 0 on.

    Authors and tags are keyed by their embedding rows, so they share the hash's collisions and nothing else.
    """
    author_of = np.maximum(np.asarray(videos.sparse[:, videos.columns.slice(author_feature)])[:, 0], 0)
    tags_of = np.asarray(videos.sparse[:, videos.columns.slice(tag_feature)])
    table_rows = dict(zip(videos.columns.names, videos.columns.table_rows, strict=True))
    user, video = Tally.zeros(len(users) + 1), Tally.zeros(len(videos) + 1)
    author, tag = Tally.zeros(table_rows[author_feature]), Tally.zeros(table_rows[tag_feature])
    user_day, video_day = [], []
    for day in range(BEFORE, n_days):
        at = np.flatnonzero(day_N == day)
        rows, signals = video_row_N[at], signals_NS[at]
        user.add(user_row_N[at], signals)
        video.add(rows, signals)
        author.add(author_of[rows], signals)
        for slot in range(tags_of.shape[1]):
            tags = tags_of[rows, slot]
            tag.add(tags[tags >= 0], signals[tags >= 0])
        user_day.append(user.features())
        video_day.append(
            np.concatenate(
                [video.features(), author.features()[author_of], _mean_over(tag.features(), tags_of)], axis=1
            )
        )
    return DailyCounters(user_day, video_day)


def _mean_over(features_EF: np.ndarray, keys_NW: np.ndarray) -> np.ndarray:
    present = (keys_NW >= 0).astype(np.float32)
    total = (features_EF[np.maximum(keys_NW, 0)] * present[:, :, None]).sum(axis=1)
    return total / np.maximum(present.sum(axis=1, keepdims=True), 1.0)


def _by_day(views: Sequence[np.ndarray], day_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
    out = np.zeros((len(row_N), views[0].shape[1]), np.float32)
    for day in np.unique(day_N[day_N != BEFORE]):
        at = day_N == day
        out[at] = views[int(day)][row_N[at]]
    return out
