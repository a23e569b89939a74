"""Smoothed rates of users, videos, authors and tags, as of the start of a day.

An impression sees only what was counted on days before its own, so no row contributes to its own features, and a
published bundle carries exactly one day's view: training and serving read the same arrays. E keys, S signals.
Rates are (positives + prior * strength) / (impressions + strength), the prior being the global rate. Of the time
before the log (day BEFORE) nothing is known: zeros, the features of a key without impressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.arrays import Allocate, in_memory
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
class Counted:
    """Of some rows, for each counted signal: which have it logged (row numbers, None for all), which are positive."""

    logged: tuple[np.ndarray | None, ...]
    positive: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, signals_NS: np.ndarray) -> Counted:
        """From signals (N, len(SIGNALS)): 0, 1 or NaN for not logged."""
        logged, positive = [], []
        for signal in COUNTED:
            value_N = signals_NS[:, SIGNALS.index(signal)]
            missing_N = np.isnan(value_N)
            logged.append(np.flatnonzero(~missing_N) if missing_N.any() else None)
            positive.append(np.flatnonzero(value_N > 0))
        return cls(tuple(logged), tuple(positive))

    def where(self, mask_N: np.ndarray) -> Counted:
        """The same of the rows in a mask, numbered anew."""
        place_N = np.cumsum(mask_N) - 1
        logged = tuple(None if rows is None else place_N[rows[mask_N[rows]]] for rows in self.logged)
        return Counted(logged, tuple(place_N[rows[mask_N[rows]]] for rows in self.positive))


@dataclass(frozen=True, slots=True)
class Tally:
    """What one day adds: impressions where a signal was logged, and its positives."""

    logged_ES: np.ndarray
    positive_ES: np.ndarray

    @classmethod
    def zeros(cls, n_keys: int) -> Tally:
        shape = (n_keys, len(COUNTED))
        return cls(np.zeros(shape, np.float64), np.zeros(shape, np.float64))

    def add(self, keys_N: np.ndarray, counted: Counted) -> None:
        """Count rows by key (N,)."""
        n_keys = len(self.logged_ES)
        every_E: np.ndarray | None = None
        for s, (logged, positive) in enumerate(zip(counted.logged, counted.positive, strict=True)):
            if logged is None:
                every_E = np.bincount(keys_N, minlength=n_keys) if every_E is None else every_E
                self.logged_ES[:, s] += every_E
            else:
                self.logged_ES[:, s] += np.bincount(keys_N[logged], minlength=n_keys)
            self.positive_ES[:, s] += np.bincount(keys_N[positive], minlength=n_keys)

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
    allocate: Allocate = in_memory,
) -> DailyCounters:
    """Views for days 0 .. n_days; rows of day BEFORE are known from day 0 on.

    Authors and tags are keyed by their embedding rows, so they share the hash's collisions and nothing else.
    """
    author_of = np.maximum(np.asarray(videos.sparse[:, videos.columns.slice(author_feature)])[:, 0], 0)
    authors, author_of = np.unique(author_of, return_inverse=True)  # a table has many more rows than the log authors
    tags_of = np.asarray(videos.sparse[:, videos.columns.slice(tag_feature)])
    tag_rows = dict(zip(videos.columns.names, videos.columns.table_rows, strict=True))[tag_feature]
    user, video = Tally.zeros(len(users) + 1), Tally.zeros(len(videos) + 1)
    author, tag = Tally.zeros(len(authors)), Tally.zeros(tag_rows)
    user_day = allocate("counters_user", (n_days + 1, len(users) + 1, WIDTH_PER_KEY), np.float32)
    video_day = allocate("counters_video", (n_days + 1, len(videos) + 1, 3 * WIDTH_PER_KEY), np.float32)
    of_day = _by_day_ascending(day_N)
    for view, day in enumerate(range(BEFORE, n_days)):
        at = of_day(day)
        rows, counted = video_row_N[at], Counted.of(signals_NS[at])
        user.add(user_row_N[at], counted)
        video.add(rows, counted)
        author.add(author_of[rows], counted)
        for slot in range(tags_of.shape[1]):
            tags = tags_of[rows, slot]
            if (present := tags >= 0).any():
                tag.add(tags[present], counted.where(present))
        user_day[view] = user.features()
        video_day[view, :, :WIDTH_PER_KEY] = video.features()
        video_day[view, :, WIDTH_PER_KEY : 2 * WIDTH_PER_KEY] = author.features()[author_of]
        video_day[view, :, 2 * WIDTH_PER_KEY :] = _mean_over(tag.features(), tags_of)
    return DailyCounters(list(user_day), list(video_day))


def _by_day_ascending(day_N: np.ndarray) -> Callable[[int], slice | np.ndarray]:
    """day -> its rows: a range where the days ascend, as they do in the canonical tables without undated rows."""
    if (day_N[1:] >= day_N[:-1]).all():
        return lambda day: slice(*np.searchsorted(day_N, [day, day + 1]))
    order, days = np.argsort(day_N, kind="stable"), np.sort(day_N)
    return lambda day: order[slice(*np.searchsorted(days, [day, day + 1]))]


def _mean_over(features_EF: np.ndarray, keys_NW: np.ndarray) -> np.ndarray:
    padded_EF = np.concatenate([features_EF, np.zeros_like(features_EF[:1])])  # where a key of -1 points
    total_NF = padded_EF[keys_NW[:, 0]]
    for slot in range(1, keys_NW.shape[1]):
        total_NF += padded_EF[keys_NW[:, slot]]
    return total_NF / np.maximum((keys_NW >= 0).sum(axis=1, keepdims=True, dtype=np.float32), 1.0)


def _by_day(views: Sequence[np.ndarray], day_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
    out = np.zeros((len(row_N), views[0].shape[1]), np.float32)
    for day in np.unique(day_N[day_N != BEFORE]):
        at = day_N == day
        out[at] = views[int(day)][row_N[at]]
    return out
