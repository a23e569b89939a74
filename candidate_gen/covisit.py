"""Item-to-item co-visitation: who liked this video also liked those, counted from the histories.

A pair counts when one user gave positive feedback to both videos within a window of events and hours; pairs far apart
in the user's order count less. The sums are divided by both videos' popularity, so that a hit is not everybody's
neighbour (item-based collaborative filtering: Sarwar et al., WWW 2001; Linden, Smith and York, IEEE Internet Computing
2003), and the best few are kept as rows of a sparse matrix.

V video rows (row 0 unknown), M positive events in the order of the history log, P pairs, E events of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from features.history import UNDATED_TS_MS, HistoryLog, HistoryWindow
from features.schema import SIGNALS

HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True, slots=True)
class CovisitConfig:
    """What counts as a pair, how pairs become scores, and how a user's events are weighed."""

    feedback: dict[str, float] = field(default_factory=lambda: {"click": 0.5, "long_view": 1.0, "like": 2.0})
    """Signals that make an event positive, and the event's weight in a query: the largest of those it gave."""
    window: int = 20
    """A pair is at most this many of the user's positive events apart."""
    window_h: float = 168.0
    """And at most this many hours, where both times are known."""
    decay: float = 0.95
    """Weight of a pair n events apart: decay ** (n - 1)."""
    half_life_h: float = 48.0
    """A pair as old as this, by its later event, counts half: what is watched together changes within days."""
    popularity_power: float = 0.3
    """A pair's sum is divided by n_a ** (1 - power) * n_b ** power, n being the users who liked a video: 0 is the share
    of a's users, 0.5 the cosine, 1 favours rare neighbours."""
    shrinkage: float = 5.0
    """Added to the divisor: pairs that few users made are drawn towards 0."""
    neighbours: int = 200
    """Kept a video."""
    recency: float = 0.97
    """A query's event counts recency ** (positive events since)."""
    pairs_at_once: int = 500_000
    """Pairs in memory while counting; some 100 bytes each."""

    def __post_init__(self) -> None:
        if unknown := sorted(self.feedback.keys() - set(SIGNALS)):
            raise ValueError(f"CovisitConfig.feedback names {unknown}; the signals are {', '.join(SIGNALS)}")
        for name in ("window", "neighbours", "pairs_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"CovisitConfig.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("decay", "recency"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"CovisitConfig.{name} is {getattr(self, name)}: give more than 0, at most 1")
        if self.half_life_h <= 0 or self.shrinkage < 0:
            raise ValueError(
                f"CovisitConfig: half_life_h {self.half_life_h} must be above 0, shrinkage {self.shrinkage} not below"
            )

    def weight_of(self, signals: np.ndarray) -> np.ndarray:
        """Feedback bit masks (...,) uint8 -> weights (...,) float32; 0 where nothing positive was given."""
        masks = np.arange(256, dtype=np.uint8)
        weight_of_mask = np.zeros(256, np.float32)
        for signal, weight in self.feedback.items():
            given = (masks >> SIGNALS.index(signal)) & 1 == 1
            weight_of_mask[given] = np.maximum(weight_of_mask[given], weight)
        return weight_of_mask[signals]


@dataclass(frozen=True, slots=True)
class Covisits:
    """A sparse V x V matrix by rows: the neighbours of row v lie at start[v] .. start[v+1], best first."""

    start: np.ndarray
    """(V+1,) int64."""
    neighbour: np.ndarray
    """int64 video rows."""
    score: np.ndarray
    """float32, falling within a row."""

    @classmethod
    def count(
        cls,
        history: HistoryLog,
        eligible_V: np.ndarray,
        config: CovisitConfig,
        *,
        before_ms: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Covisits:
        """Count the log's pairs, all or those whose events lie before an instant; neighbours are eligible videos.

        Ages are taken at that instant, or at the newest event; an undated event is as old as the oldest dated one.
        Works through the videos in blocks of about `config.pairs_at_once` pairs, so memory grows with positive events
        (some 50 bytes each) and with what is kept (12 bytes a neighbour), not with pairs. Progress counts videos.
        """
        positives = _Positives.of(history, len(eligible_V), config, before_ms)
        users_V, eligible_V = np.diff(positives.start_V), np.asarray(eligible_V)
        counts_V, kept = np.zeros(len(eligible_V), np.int64), []
        for first, last in positives.blocks(config):
            video_P, neighbour_P, sum_P = positives.pairs(first, last, eligible_V, config)
            score_P = sum_P / _divisor(users_V[video_P], users_V[neighbour_P], config)
            chosen = _best_of_each(video_P, score_P, config.neighbours)
            counts_V[first:last] = np.bincount(video_P[chosen] - first, minlength=last - first)
            kept.append((neighbour_P[chosen], score_P[chosen].astype(np.float32)))
            if on_progress is not None:
                on_progress(last - first)
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        neighbour, score = (np.concatenate(part) for part in zip(nothing, *kept, strict=True))
        return cls(np.concatenate([[0], np.cumsum(counts_V)]), neighbour, score)

    def similar(self, rows_E: np.ndarray, weight_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of these videos, distinct and ascending (int64), and the weighted sums of their scores.

        A row beyond those counted, of a video that came later, has none."""
        counted_E = rows_E < len(self.start) - 1
        rows_E, weight_E = rows_E[counted_E], weight_E[counted_E]
        begin_E, end_E = self.start[rows_E], self.start[rows_E + 1]
        counts_E = end_E - begin_E
        at = np.repeat(begin_E - np.concatenate([[0], np.cumsum(counts_E)[:-1]]), counts_E) + np.arange(counts_E.sum())
        rows, inverse = np.unique(self.neighbour[at], return_inverse=True)
        summed = np.bincount(inverse, weights=np.repeat(weight_E, counts_E) * self.score[at], minlength=len(rows))
        return rows, summed.astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `covisit_FIELD.npy` for each field into an existing folder."""
        for array in fields(self):
            np.save(folder / f"covisit_{array.name}.npy", getattr(self, array.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Covisits:
        """Memory-map what `save` wrote; raises ValueError when the arrays do not belong together."""
        start, neighbour, score = (
            np.asarray(np.load(folder / f"covisit_{array.name}.npy", mmap_mode="r", allow_pickle=False))
            for array in fields(cls)
        )
        if not len(start) or start[-1] != len(neighbour) or len(neighbour) != len(score):
            raise ValueError(
                f"{folder}: covisit_start.npy ends at {start[-1:]}, there are {len(neighbour)} neighbours and "
                f"{len(score)} scores; count them again"
            )
        return cls(start, neighbour, score)


def liked(history: HistoryWindow, config: CovisitConfig) -> tuple[np.ndarray, np.ndarray]:
    """What a query asks with: video rows (E,) of the one user's positive events, newest first, and their weights."""
    events = slice(int(history.length_B[0]) - 1, None, -1) if history.length_B[0] else slice(0, 0)
    rows_E, weight_E = history.video_row_BL[0, events], config.weight_of(history.signals_BL[0, events])
    positive = (weight_E > 0) & (rows_E > 0)
    rows_E, weight_E = rows_E[positive], weight_E[positive]
    return rows_E, weight_E * config.recency ** np.arange(len(rows_E))


@dataclass(frozen=True, slots=True)
class _Positives:
    """A user's every liked video once, at the last time they liked it, by user and time; and where each video is."""

    video_M: np.ndarray
    ts_ms_M: np.ndarray
    fresh_M: np.ndarray
    """What is left of a pair whose later event this is: 1 at the instant of counting, halved every half-life."""
    begin_M: np.ndarray
    """Where the event's user begins in these arrays, and"""
    end_M: np.ndarray
    """one past where they end."""
    by_video_M: np.ndarray
    """Positions in the arrays above, by video."""
    start_V: np.ndarray
    """(V+1,) offsets into `by_video_M`."""

    @classmethod
    def of(cls, history: HistoryLog, n_rows: int, config: CovisitConfig, before_ms: int | None) -> _Positives:
        taken = config.weight_of(np.asarray(history.signals)) > 0
        taken &= np.asarray(history.video_row) > 0
        if before_ms is not None:
            taken &= np.asarray(history.ts_ms) < before_ms
        at = np.flatnonzero(taken)
        video, user = history.video_row[at], np.searchsorted(history.user_start, at, side="right") - 1
        user_and_video = user * n_rows + video
        order = np.argsort(user_and_video, kind="stable")
        last_time = np.diff(user_and_video[order], append=-1) != 0
        once = np.sort(order[last_time])
        video, user, ts_ms = video[once], user[once], np.asarray(history.ts_ms[at[once]])
        return cls(
            video_M=video,
            ts_ms_M=ts_ms,
            fresh_M=_freshness(ts_ms, before_ms, config.half_life_h),
            begin_M=np.searchsorted(user, user, side="left"),
            end_M=np.searchsorted(user, user, side="right"),
            by_video_M=np.argsort(video, kind="stable"),
            start_V=np.concatenate([[0], np.cumsum(np.bincount(video, minlength=n_rows))]),
        )

    def blocks(self, config: CovisitConfig) -> Iterator[tuple[int, int]]:
        """Ranges of video rows that together cover all of them, each of about `pairs_at_once` pairs or one video."""
        step = max(config.pairs_at_once // (2 * config.window), 1)
        first, last_row = 0, len(self.start_V) - 1
        while first < last_row:
            last = int(np.searchsorted(self.start_V, self.start_V[first] + step, side="right")) - 1
            last = min(max(last, first + 1), last_row)
            yield first, last
            first = last

    def pairs(
        self, first: int, last: int, eligible_V: np.ndarray, config: CovisitConfig
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(video, eligible neighbour, summed weight) of videos first .. last-1, by video and neighbour, each once."""
        step = max(config.pairs_at_once // (2 * config.window), 1)
        n_rows = len(self.start_V) - 1
        key_P, sum_P = np.zeros(0, np.int64), np.zeros(0)
        for begin in range(self.start_V[first], self.start_V[last], step):
            at_N = self.by_video_M[begin : min(begin + step, self.start_V[last])]
            video_P, neighbour_P, weight_P = self._around(at_N, config)
            wanted = eligible_V[neighbour_P]
            key_P = np.concatenate([key_P, video_P[wanted] * n_rows + neighbour_P[wanted]])
            key_P, sum_P = _sum_by_key(key_P, np.concatenate([sum_P, weight_P[wanted]]))
        return key_P // n_rows, key_P % n_rows, sum_P

    def _around(self, at_N: np.ndarray, config: CovisitConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every pair of the events at these positions with the same user's events around them."""
        apart_W = np.concatenate([np.arange(-config.window, 0), np.arange(1, config.window + 1)])
        other_NW = at_N[:, None] + apart_W[None, :]
        same_user_NW = (other_NW >= self.begin_M[at_N][:, None]) & (other_NW < self.end_M[at_N][:, None])
        n_P, w_P = np.nonzero(same_user_NW)
        one_P, other_P = at_N[n_P], other_NW[n_P, w_P]
        earlier_ms = self.ts_ms_M[np.minimum(one_P, other_P)]
        later_ms = self.ts_ms_M[np.maximum(one_P, other_P)]
        near = (earlier_ms == UNDATED_TS_MS) | (earlier_ms >= later_ms - round(config.window_h * HOUR_MS))
        one_P, other_P, apart_P = one_P[near], other_P[near], np.abs(apart_W)[w_P[near]]
        weight_P = config.decay ** (apart_P - 1.0) * self.fresh_M[np.maximum(one_P, other_P)]
        return self.video_M[one_P], self.video_M[other_P], weight_P


def _freshness(ts_ms_M: np.ndarray, now_ms: int | None, half_life_h: float) -> np.ndarray:
    """2 ** (-age / half-life) (M,) float64; undated events are as old as the oldest dated one."""
    dated = ts_ms_M != UNDATED_TS_MS
    if not dated.any():
        return np.ones(len(ts_ms_M))
    now_ms = int(ts_ms_M.max()) if now_ms is None else now_ms
    age_h = (now_ms - np.maximum(ts_ms_M, ts_ms_M[dated].min())) / HOUR_MS
    return 0.5 ** (age_h / half_life_h)


def _sum_by_key(key_P: np.ndarray, weight_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and the sums of their weights; equal keys are added in the order they came."""
    if not len(key_P):
        return key_P, weight_P
    order = np.argsort(key_P, kind="stable")
    key_P = key_P[order]
    first = np.flatnonzero(np.concatenate([[True], key_P[1:] != key_P[:-1]]))
    return key_P[first], np.add.reduceat(weight_P[order], first)


def _divisor(users_a: np.ndarray, users_b: np.ndarray, config: CovisitConfig) -> np.ndarray:
    power = config.popularity_power
    return users_a ** (1.0 - power) * users_b.astype(np.float64) ** power + config.shrinkage


def _best_of_each(video_P: np.ndarray, score_P: np.ndarray, most: int) -> np.ndarray:
    """Positions of each video's best pairs, by video, best first, equal scores as they came; pairs come by video."""
    group_P = np.cumsum(np.diff(video_P, prepend=video_P[:1]) != 0)
    group_P = group_P.astype(np.min_scalar_type(group_P.max(initial=0)))  # 16 bits sort by radix
    order = np.argsort(-score_P, kind="stable")
    order = order[np.argsort(group_P[order], kind="stable")]
    place = np.arange(len(order)) - np.searchsorted(group_P, group_P)
    return order[place < most]
