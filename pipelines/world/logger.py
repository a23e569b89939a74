"""The world's logging policy: a mediocre recommender that knows, and records, the odds of everything it shows.

Candidates come from five sources; a page is drawn from them slot by slot. B requests, C draws or candidates, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.world.config import DAY_MS, HOUR_MS, START_MS, WorldConfig
from pipelines.world.population import Population, stream
from pipelines.world.responses import contains

_DECK = 64
"""Cards in a user's deck of topics: drawing a card draws a topic by the logger's view of the user's taste."""

_TIME_SPAN_MS = 1 << 42
"""Wider than any time since 1970 for a century, so that `group * _TIME_SPAN_MS + ts_ms` sorts by group, then time."""


def draw_page(
    scores_BC: np.ndarray,
    valid_BC: np.ndarray,
    n_slots: int,
    epsilon: float,
    rng: np.random.Generator,
    greedy: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Columns chosen (B, S) and the exact probability of each choice given the slots before it.

    At every slot: with probability epsilon uniform over the candidates left, otherwise softmax(scores) over them, or
    the best of them if `greedy` (the first among equals).
    """
    weight_BC = np.exp(scores_BC - np.where(valid_BC, scores_BC, -np.inf).max(axis=1, keepdims=True)) * valid_BC
    left_BC = valid_BC.astype(np.float64)
    rows_B = np.arange(len(scores_BC))
    chosen_BS = np.empty((len(scores_BC), n_slots), dtype=np.int64)
    propensity_BS = np.empty((len(scores_BC), n_slots))
    for slot in range(n_slots):
        if greedy:
            best_B = np.where(left_BC > 0, scores_BC, -np.inf).argmax(axis=1)
            weight_BC[:] = 0.0
            weight_BC[rows_B, best_B] = 1.0
        odds_BC = weight_BC * ((1 - epsilon) / weight_BC.sum(axis=1, keepdims=True))
        odds_BC += left_BC * (epsilon / left_BC.sum(axis=1, keepdims=True))
        reach_BC = np.cumsum(odds_BC, axis=1)
        # side="right" over a row: a column of zero width can never be hit.
        pick_B = (reach_BC <= rng.random((len(rows_B), 1)) * reach_BC[:, -1:]).sum(axis=1)
        chosen_BS[:, slot], propensity_BS[:, slot] = pick_B, odds_BC[rows_B, pick_B]
        weight_BC[rows_B, pick_B] = 0.0
        left_BC[rows_B, pick_B] = 0.0
    return chosen_BS, propensity_BS


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    video_BC: np.ndarray
    """Video rows; -1 where `valid_BC` is false."""
    source_BC: np.ndarray
    """Index into the config's source_shares."""
    valid_BC: np.ndarray


class Logger:
    """The state the policy keeps between requests: follows, counters, and who has seen what."""

    def __init__(self, config: WorldConfig, world: Population) -> None:
        self._config, self._world, self._l = config, world, config.logger
        self.source_names = tuple(self._l.source_shares)
        rng = stream(config, 6)
        view_UK = world.users.taste_UK + rng.normal(0, self._l.view_noise, world.users.taste_UK.shape)
        self._view_UK = np.clip(view_UK, 0.01, None).astype(np.float32)
        self._deck_UD = _decks(self._view_UK)
        counts = [int(np.ceil(s * config.n_candidates * self._l.oversample)) for s in self._l.source_shares.values()]
        self._counts = dict(zip(self.source_names, counts, strict=True))
        self._shuffle_C = rng.permutation(sum(counts))
        self._source_C = np.repeat(np.arange(len(counts), dtype=np.int8), counts)[self._shuffle_C]
        self._bucket_V = rng.integers(0, self._l.seen_buckets, config.n_videos)
        self._seen = np.zeros(config.n_users * self._l.seen_buckets // 8, dtype=np.uint8)
        videos = world.videos
        self._prior_V = world.authors.fame_A[videos.author_V]
        self._shown_V, self._long_V = np.zeros(config.n_videos), np.zeros(config.n_videos)
        self._eligible = np.flatnonzero(videos.eligible_V)
        self._eligible_ts_ms = videos.upload_ts_ms_V[self._eligible]
        self._by_author = _Grouped(self._eligible, videos.author_V, videos.upload_ts_ms_V)
        self._by_topic = _Grouped(self._eligible, videos.topic_V, videos.upload_ts_ms_V)
        self.follow_keys = world.fan_keys

    def start_day(self, day: int) -> None:
        """What a nightly job would prepare: exposure weights from the counters so far, and the follow graph."""
        now_ms, videos, knobs = START_MS + day * DAY_MS, self._world.videos, self._l
        self._shown_V *= knobs.memory
        self._long_V *= knobs.memory
        self._rate_V = np.log((self._long_V + 2.0) / (self._shown_V + 8.0)).astype(np.float32)
        n_pool = np.searchsorted(self._eligible_ts_ms, now_ms)
        pool = self._eligible[:n_pool]
        age_days = (now_ms - videos.upload_ts_ms_V[pool]) / DAY_MS
        weight = (self._prior_V[pool] + self._long_V[pool]) ** knobs.pool_power
        weight *= knobs.pool_age_floor + np.exp(-age_days / knobs.pool_age_days)
        order = np.argsort(videos.topic_V[pool], kind="stable")
        self._pool, self._pool_reach = pool[order], np.cumsum(weight[order])
        edges = np.searchsorted(videos.topic_V[self._pool], np.arange(self._config.topics + 1))
        self._pool_edges = np.concatenate([[0.0], self._pool_reach])[edges]
        A = self._config.n_authors
        self._followee = self.follow_keys % A
        self._follow_start_U = np.searchsorted(self.follow_keys, np.arange(self._config.n_users + 1) * A)

    def is_connected(self, user_B: np.ndarray, video_B: np.ndarray) -> np.ndarray:
        """Did the user follow the video's author when the day began?"""
        return contains(self.follow_keys, user_B * self._config.n_authors + self._world.videos.author_V[video_B])

    def candidates(self, user_B: np.ndarray, ts_ms_B: np.ndarray, rng: np.random.Generator) -> Candidates:
        """Up to n_candidates distinct, eligible, uploaded, unseen videos a request."""
        parts = [getattr(self, f"_{name}")(user_B, ts_ms_B, count, rng) for name, count in self._counts.items()]
        drawn_BC = np.concatenate(parts, axis=1)[:, self._shuffle_C]
        fine_BC = (drawn_BC >= 0) & ~_repeats(drawn_BC)
        byte_BC, bit_BC = self._seen_place(user_B[:, None], drawn_BC)
        fine_BC &= (self._seen[byte_BC] & bit_BC) == 0
        rank_BC = np.cumsum(fine_BC, axis=1)
        row, column = np.nonzero(fine_BC & (rank_BC <= self._config.n_candidates))
        place = rank_BC[row, column] - 1
        video_BC = np.full((len(user_B), self._config.n_candidates), -1, dtype=np.int64)
        source_BC = np.zeros(video_BC.shape, dtype=np.int8)
        video_BC[row, place] = drawn_BC[row, column]
        source_BC[row, place] = self._source_C[column]
        return Candidates(video_BC=video_BC, source_BC=source_BC, valid_BC=video_BC >= 0)

    def scores(self, user_B: np.ndarray, c: Candidates) -> np.ndarray:
        """The policy's logits (B, C): the believed appeal, and a hand for followed authors; or popularity alone."""
        if self._l.kind == "popularity":
            return self._rate_V[c.video_BC] / self._l.temperature
        followed_BC = c.source_BC == self.source_names.index("followed")
        appeal_BC = self._appeal(user_B[:, None], c.video_BC) + self._l.followed_weight * followed_BC
        return appeal_BC / self._l.temperature

    def show(self, user_BS: np.ndarray, video_BS: np.ndarray) -> None:
        byte, bit = self._seen_place(user_BS.ravel(), video_BS.ravel())
        np.bitwise_or.at(self._seen, byte, bit)

    def learn(self, video_N: np.ndarray, long_view_N: np.ndarray, follow_keys: np.ndarray) -> None:
        """A day's feedback: counters, and follows that count from the next day."""
        n = self._config.n_videos
        self._shown_V += np.bincount(video_N, minlength=n)
        self._long_V += np.bincount(video_N, weights=long_view_N, minlength=n)
        self.follow_keys = np.union1d(self.follow_keys, follow_keys)

    def _appeal(self, user_B1: np.ndarray, video_BC: np.ndarray) -> np.ndarray:
        """What the policy believes a user would like: topic match by its noisy view, and long-view rates so far."""
        videos = self._world.videos
        match_BC = self._view_UK[user_B1, videos.topic_V[video_BC]] * videos.topic_weight_V[video_BC]
        match_BC += self._view_UK[user_B1, videos.second_topic_V[video_BC]] * videos.second_weight_V[video_BC]
        return self._l.match_weight * match_BC + self._l.rate_weight * self._rate_V[video_BC]

    def _seen_place(self, user: np.ndarray, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = user * self._l.seen_buckets + self._bucket_V[video]
        return place >> 3, np.left_shift(np.uint8(1), (place & 7).astype(np.uint8))

    def _followed(self, user_B: np.ndarray, ts_ms_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        start_B1, end_B1 = self._follow_start_U[user_B, None], self._follow_start_U[user_B + 1, None]
        place_BC = start_B1 + np.floor(rng.random((len(user_B), n)) * (end_B1 - start_B1)).astype(np.int64)
        if not len(self._followee):
            return np.full(place_BC.shape, -1)
        author_BC = self._followee[np.minimum(place_BC, len(self._followee) - 1)]
        window_ms = int(self._l.followed_days * DAY_MS)
        video_BC = self._by_author.draw(author_BC, ts_ms_B[:, None], window_ms, rng)
        return np.where(end_B1 > start_B1, video_BC, -1)

    def _personal(self, user_B: np.ndarray, ts_ms_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        tries = self._l.personal_tries
        topic_BC = self._topics(user_B, n * tries, rng)
        low_BC, high_BC = self._pool_edges[topic_BC], self._pool_edges[topic_BC + 1]
        video_BC = self._from_pool(low_BC + rng.random(topic_BC.shape) * (high_BC - low_BC))
        video_BNT = video_BC.reshape(len(user_B), n, tries)
        best_BN = self._appeal(user_B[:, None], video_BC).reshape(video_BNT.shape).argmax(axis=2)
        return np.take_along_axis(video_BNT, best_BN[:, :, None], axis=2)[:, :, 0]

    def _popular(self, user_B: np.ndarray, ts_ms_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        return self._from_pool(rng.random((len(user_B), n)) * self._pool_edges[-1])

    def _fresh(self, user_B: np.ndarray, ts_ms_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        window_ms = int(self._l.fresh_hours * HOUR_MS)
        return self._by_topic.draw(self._topics(user_B, n, rng), ts_ms_B[:, None], window_ms, rng)

    def _uniform(self, user_B: np.ndarray, ts_ms_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        n_uploaded_B1 = np.searchsorted(self._eligible_ts_ms, ts_ms_B)[:, None]
        return self._eligible[np.floor(rng.random((len(user_B), n)) * n_uploaded_B1).astype(np.int64)]

    def _topics(self, user_B: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        return self._deck_UD[user_B[:, None], rng.integers(0, _DECK, (len(user_B), n))].astype(np.int64)

    def _from_pool(self, reach_BC: np.ndarray) -> np.ndarray:
        return self._pool[np.minimum(np.searchsorted(self._pool_reach, reach_BC), len(self._pool) - 1)]


class _Grouped:
    """Videos by group and upload time: draws one uniformly from a group's recent uploads."""

    def __init__(self, rows: np.ndarray, group_V: np.ndarray, upload_ts_ms_V: np.ndarray) -> None:
        keys = group_V[rows] * _TIME_SPAN_MS + upload_ts_ms_V[rows]
        order = np.argsort(keys, kind="stable")
        self._rows, self._keys = rows[order], keys[order]

    def draw(self, group_BC: np.ndarray, ts_ms_B1: np.ndarray, window_ms: int, rng: np.random.Generator) -> np.ndarray:
        """A row uploaded in [ts - window, ts) for each entry, -1 where the group has none."""
        until_BC = group_BC * _TIME_SPAN_MS + ts_ms_B1
        start_BC, end_BC = np.searchsorted(self._keys, until_BC - window_ms), np.searchsorted(self._keys, until_BC)
        place_BC = start_BC + np.floor(rng.random(group_BC.shape) * (end_BC - start_BC)).astype(np.int64)
        return np.where(end_BC > start_BC, self._rows[np.minimum(place_BC, len(self._rows) - 1)], -1)


def _decks(view_UK: np.ndarray) -> np.ndarray:
    """int8 (U, _DECK): each topic on about as many cards as its share of the squared view."""
    reach_UK = np.cumsum(view_UK.astype(np.float64) ** 2, axis=1)
    reach_UK *= _DECK / reach_UK[:, -1:]
    deck_UD = np.zeros((len(view_UK), _DECK), dtype=np.int8)
    for card in range(_DECK):
        deck_UD[:, card] = (reach_UK < card + 0.5).sum(axis=1)
    return deck_UD


def _repeats(drawn_BC: np.ndarray) -> np.ndarray:
    """True at the second and later places of a value in its row."""
    order_BC = np.argsort(drawn_BC, axis=1, kind="stable")
    sorted_BC = np.take_along_axis(drawn_BC, order_BC, axis=1)
    again_BC = np.zeros(drawn_BC.shape, dtype=bool)
    again_BC[:, 1:] = sorted_BC[:, 1:] == sorted_BC[:, :-1]
    result_BC = np.empty_like(again_BC)
    np.put_along_axis(result_BC, order_BC, again_BC, axis=1)
    return result_BC
