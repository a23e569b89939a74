"""The world's users, videos and follows as canonical tables (see features/schema.py).

The latent state (tastes, qualities) stays out of them. U users, V videos.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from features.schema import FOLLOWS, LIMITS, USERS, VIDEOS
from pipelines.world.config import WorldConfig
from pipelines.world.ids import opaque_ids
from pipelines.world.population import (
    AGE_BUCKETS,
    DEVICES,
    REGIONS,
    UPLOAD_TYPES,
    Population,
    Users,
    content_embeddings,
)


def users_table(users: Users) -> pa.Table:
    schema = pa.schema(
        [
            *USERS,
            pa.field("region", pa.string()),
            pa.field("age_bucket", pa.string()),
            pa.field("device", pa.string()),
            pa.field("declared_topic", pa.int64()),
            pa.field("register_days", pa.int64()),
        ]
    )
    columns = {
        "user_id": users.ids,
        "region": np.array(REGIONS)[users.region_U],
        "age_bucket": np.array(AGE_BUCKETS)[users.age_U],
        "device": np.array(DEVICES)[users.device_U],
        "declared_topic": users.declared_topic_U,
        "register_days": users.register_days_U,
    }
    return pa.table(columns, schema=schema)


def videos_table(config: WorldConfig, world: Population, noise: np.random.Generator | None = None) -> pa.Table:
    """Tags are the main topic, and the second where it has at least a quarter of the main one's weight. `noise` as in
    `content_embeddings`."""
    videos = world.videos
    V = len(videos.ids)
    second_V = videos.second_weight_V >= 0.25 * videos.topic_weight_V
    both_V2 = np.stack([videos.topic_V, videos.second_topic_V], axis=1)
    content = content_embeddings(config, videos, noise)
    columns = {
        "video_id": videos.ids,
        "author_id": world.authors.ids[videos.author_V],
        "upload_ts_ms": videos.upload_ts_ms_V,
        "duration_ms": videos.duration_ms_V,
        "music_id": opaque_ids(config.topics * 64, config.seed * 3 + 5)[videos.music_V],
        "video_type": pa.repeat("normal", V),
        "upload_type": np.array(UPLOAD_TYPES)[videos.upload_type_V],
        "tags": list_column(both_V2[np.stack([np.ones(V, dtype=bool), second_V], axis=1)], 1 + second_V),
        "content": list_column(content.ravel(), np.full(V, config.content_dim)),
        "eligible": videos.eligible_V,
    }
    # Every video of the world may be shown to everybody.
    columns |= {field.name: pa.nulls(V, field.type) for field in LIMITS}
    return pa.table(columns, schema=VIDEOS)


def follows_table(config: WorldConfig, world: Population, made: np.ndarray) -> pa.Table:
    """The follows from before the log, without a time, then those made in it (rows: key, ts_ms), the first of each."""
    key, first = np.unique(made[0], return_index=True)
    fresh = ~np.isin(key, world.fan_keys)
    order = np.argsort(first[fresh], kind="stable")
    keys = np.concatenate([world.fan_keys, key[fresh][order]])
    times = pa.concat_arrays(
        [pa.nulls(len(world.fan_keys), pa.int64()), pa.array(made[1][first[fresh][order]], pa.int64())]
    )
    columns = {
        "user_id": world.users.ids[keys // config.n_authors],
        "author_id": world.authors.ids[keys % config.n_authors],
        "ts_ms": times,
    }
    return pa.table(columns, schema=FOLLOWS)


def list_column(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """A list column from its flat values and the length of each row."""
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)
