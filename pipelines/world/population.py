"""Who lives in the world: users with tastes, authors, videos with topics, and who followed whom at the start.

U users, A authors, V videos, K topics. Everything is drawn from the seed alone; only `generate` writes tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.world.config import DAY_MS, START_MS, WorldConfig
from pipelines.world.ids import opaque_ids
from pipelines.world.life import day_of, tastes_by_day

REGIONS = ("north", "south", "east", "west", "islands")
AGE_BUCKETS = ("13-17", "18-24", "25-34", "35-44", "45+")
DEVICES = ("phone-low", "phone-mid", "phone-high", "tablet")
UPLOAD_TYPES = ("camera", "import", "web")
DURATION_MODES_MS = (10_000.0, 25_000.0, 60_000.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Users:
    ids: np.ndarray
    taste_UK: np.ndarray
    """Unit length; one to three topics dominate."""
    log_duration_U: np.ndarray
    """Log of the favourite duration in ms."""
    requests_per_day_U: np.ndarray
    region_U: np.ndarray
    age_U: np.ndarray
    device_U: np.ndarray
    declared_topic_U: np.ndarray
    """What they said they like; three in ten say anything."""
    register_days_U: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Authors:
    ids: np.ndarray
    topic_A: np.ndarray
    second_topic_A: np.ndarray
    quality_A: np.ndarray
    clickbait_A: np.ndarray
    fame_A: np.ndarray
    """Long-tailed; who is good is more often famous."""
    mode_A: np.ndarray
    """Favourite duration mode."""
    upload_share_A: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Videos:
    """Rows in order of upload."""

    ids: np.ndarray
    author_V: np.ndarray
    upload_ts_ms_V: np.ndarray
    duration_ms_V: np.ndarray
    topic_V: np.ndarray
    second_topic_V: np.ndarray
    topic_weight_V: np.ndarray
    """With `second_weight_V` a vector of unit length over the two topics."""
    second_weight_V: np.ndarray
    quality_V: np.ndarray
    clickbait_V: np.ndarray
    music_V: np.ndarray
    upload_type_V: np.ndarray
    eligible_V: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    users: Users
    authors: Authors
    videos: Videos
    fan_keys: np.ndarray
    """Sorted `user_row * n_authors + author_row` of the follows made before the log began."""
    taste_DUK: np.ndarray | None = None
    """Each day's tastes, and those of the day after the log; None where tastes do not drift."""

    def taste(self, user_B: np.ndarray, topic_B: np.ndarray, ts_ms_B: np.ndarray) -> np.ndarray:
        """What users (rows) think of topics at an instant."""
        if self.taste_DUK is None:
            return self.users.taste_UK[user_B, topic_B]
        return self.taste_DUK[day_of(ts_ms_B, len(self.taste_DUK)), user_B, topic_B]


def stream(config: WorldConfig, *place: int) -> np.random.Generator:
    """An independent generator for each part of the world, so that one part's draws never shift another's."""
    return np.random.default_rng([config.seed, *place])


def populate(config: WorldConfig) -> Population:
    users = draw_users(config, stream(config, 1))
    authors = draw_authors(config, stream(config, 2))
    videos = draw_videos(config, authors, stream(config, 3))
    fan_keys, drifting = draw_fans(config, users, authors, stream(config, 4)), None
    if config.life.drift:
        drifting = tastes_by_day(users.taste_UK, config.n_days + 1, config.life, stream(config, 8))
    return Population(users=users, authors=authors, videos=videos, fan_keys=fan_keys, taste_DUK=drifting)


def draw_users(config: WorldConfig, rng: np.random.Generator) -> Users:
    U, K = config.n_users, config.topics
    age_U = rng.choice(len(AGE_BUCKETS), U, p=[0.12, 0.3, 0.28, 0.18, 0.12])
    region_U = rng.choice(len(REGIONS), U, p=[0.3, 0.25, 0.2, 0.2, 0.05])
    # Ages and regions lean towards topics, so that a user without history is not a blank.
    lean_UK = rng.normal(0, 0.7, (len(AGE_BUCKETS), K))[age_U] + rng.normal(0, 0.4, (len(REGIONS), K))[region_U]
    order_UK = np.argsort(-(lean_UK + rng.gumbel(size=(U, K))), axis=1)
    share_U3 = rng.gamma(4.0, size=(U, 3)) * (np.arange(3) < rng.choice(3, U, p=[0.35, 0.4, 0.25])[:, None] + 1)
    share_U3 /= share_U3.sum(axis=1, keepdims=True)
    taste_UK = np.full((U, K), 0.02) + rng.gamma(0.5, 0.04, (U, K))
    np.put_along_axis(taste_UK, order_UK[:, :3], np.take_along_axis(taste_UK, order_UK[:, :3], 1) + share_U3, axis=1)
    taste_UK /= np.linalg.norm(taste_UK, axis=1, keepdims=True)
    declared_U = np.where(rng.random(U) < 0.7, taste_UK.argmax(axis=1), rng.integers(0, K, U))
    activity_U = rng.gamma(1.6, size=U) + 0.25
    return Users(
        ids=opaque_ids(U, config.seed * 3 + 1),
        taste_UK=taste_UK.astype(np.float32),
        log_duration_U=np.log(24_000.0) + 0.15 * (age_U - 2) + rng.normal(0, 0.45, U),
        requests_per_day_U=activity_U * config.requests_per_user_day / activity_U.mean(),
        region_U=region_U,
        age_U=age_U,
        device_U=rng.choice(len(DEVICES), U, p=[0.25, 0.45, 0.25, 0.05]),
        declared_topic_U=declared_U,
        register_days_U=np.floor(rng.gamma(1.5, 300.0, U)).astype(np.int64),
    )


def draw_authors(config: WorldConfig, rng: np.random.Generator) -> Authors:
    A, K = config.n_authors, config.topics
    quality_A = rng.normal(0, 0.45, A)
    rate_A = rng.lognormal(0, 0.9, A)
    topic_A = rng.permutation(np.arange(A) % K)
    return Authors(
        ids=opaque_ids(A, config.seed * 3 + 2),
        topic_A=topic_A,
        second_topic_A=(topic_A + rng.integers(1, K, A)) % K,
        quality_A=quality_A,
        clickbait_A=rng.normal(0, 0.4, A),
        fame_A=np.exp(rng.normal(0, 0.6, A) + 1.2 * quality_A),
        mode_A=rng.choice(len(DURATION_MODES_MS), A, p=[0.4, 0.4, 0.2]),
        upload_share_A=rate_A / rate_A.sum(),
    )


def draw_videos(config: WorldConfig, authors: Authors, rng: np.random.Generator) -> Videos:
    V, K = config.n_videos, config.topics
    author_V = rng.choice(config.n_authors, V, p=authors.upload_share_A)
    upload_V = START_MS + rng.integers(-config.stock_days * DAY_MS, config.n_days * DAY_MS, V)
    topic_V = np.where(rng.random(V) < 0.85, authors.topic_A[author_V], rng.integers(0, K, V))
    second_V = np.where(rng.random(V) < 0.7, authors.second_topic_A[author_V], rng.integers(0, K, V))
    second_V = np.where(second_V == topic_V, (topic_V + 1) % K, second_V)
    main_V = rng.uniform(0.55, 0.95, V)
    length_V = np.hypot(main_V, 1 - main_V)
    mode_V = np.where(rng.random(V) < 0.7, authors.mode_A[author_V], rng.integers(0, len(DURATION_MODES_MS), V))
    duration_V = np.asarray(DURATION_MODES_MS)[mode_V] * rng.lognormal(0, 0.3, V)
    quality_V = authors.quality_A[author_V] + rng.normal(0, 0.3, V)
    studio_V = quality_V + rng.normal(0, 0.4, V)
    return Videos(
        ids=opaque_ids(V, config.seed * 3 + 3),
        author_V=author_V,
        upload_ts_ms_V=np.sort(upload_V),
        duration_ms_V=np.clip(duration_V, 5_000, 180_000).astype(np.int64),
        topic_V=topic_V,
        second_topic_V=second_V,
        topic_weight_V=main_V / length_V,
        second_weight_V=(1 - main_V) / length_V,
        quality_V=quality_V,
        clickbait_V=authors.clickbait_A[author_V] + rng.normal(0, 0.3, V),
        music_V=(topic_V * 64 + np.floor(64 * rng.random(V) ** 2)).astype(np.int64),
        upload_type_V=np.digitize(studio_V, [0.0, 0.5]),
        eligible_V=rng.random(V) >= config.ineligible_share,
    )


def draw_fans(config: WorldConfig, users: Users, authors: Authors, rng: np.random.Generator) -> np.ndarray:
    """Users follow famous authors of the topics they like: a power law by preferential choice."""
    count_U = rng.poisson(rng.gamma(1.5, config.mean_follows / 1.5, config.n_users))
    user_F = np.repeat(np.arange(config.n_users), count_U)
    cumulative_UK = np.cumsum(users.taste_UK.astype(np.float64) ** 2, axis=1)
    topic_F = (rng.random((len(user_F), 1)) * cumulative_UK[user_F, -1:] > cumulative_UK[user_F]).sum(axis=1)
    by_topic_A = np.argsort(authors.topic_A, kind="stable")
    reach_A = np.cumsum(authors.fame_A[by_topic_A])
    edges = np.searchsorted(authors.topic_A[by_topic_A], np.arange(config.topics + 1))
    edge_reach = np.concatenate([[0.0], reach_A])[edges]
    low_F, high_F = edge_reach[topic_F], edge_reach[topic_F + 1]
    place_F = np.searchsorted(reach_A, low_F + rng.random(len(user_F)) * (high_F - low_F))
    author_F = by_topic_A[np.minimum(place_F, config.n_authors - 1)]
    return np.unique(user_F * config.n_authors + author_F)


def content_embeddings(config: WorldConfig, videos: Videos, noise: np.random.Generator | None = None) -> np.ndarray:
    """float32 (V, content_dim): topics, quality and clickbait through one random matrix, plus noise; videos beyond the
    world's own bring a generator for theirs."""
    rng = stream(config, 5)
    V, K = len(videos.ids), config.topics
    mixing = rng.normal(0, config.content_dim**-0.5, (K + 2, config.content_dim)).astype(np.float32)
    content = (noise or rng).normal(0, 1, (V, config.content_dim)).astype(np.float32) * np.float32(config.content_noise)
    content += videos.topic_weight_V[:, None].astype(np.float32) * mixing[videos.topic_V]
    content += videos.second_weight_V[:, None].astype(np.float32) * mixing[videos.second_topic_V]
    content += videos.quality_V[:, None].astype(np.float32) * mixing[K]
    content += videos.clickbait_V[:, None].astype(np.float32) * mixing[K + 1]
    return content
