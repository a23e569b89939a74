"""A small random log in the canonical tables, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from features.schema import EVENTS, LIMITS, SIGNALS, VIDEOS
from features.spec import Categorical, Content, FeatureSpec, MultiValued, Numeric

DAY_MS = 86_400_000
START_MS = 1_767_225_600_000
SPEC = FeatureSpec(
    user=(
        Categorical(name="user_id", column="user_id", rows=512, known_only=True),
        Categorical(name="region", column="region", rows=16),
        Numeric(name="register_days", column="register_days", log=True),
    ),
    video=(
        Categorical(name="video_id", column="video_id", rows=512, known_only=True),
        Categorical(name="author_id", column="author_id", rows=64),
        MultiValued(name="tags", column="tags", rows=32, max_values=3),
        Numeric(name="duration", column="duration_ms", log=True),
        Content(name="content", column="content", dim=4),
    ),
    history_length=8,
)


def tables(seed: int, *, users: int = 40, videos: int = 60, events: int = 900, days: int = 4) -> dict[str, pa.Table]:
    """users, videos, events (with `date`); ids beyond 2^53, times with ties."""
    rng = np.random.default_rng(seed)
    user_ids, video_ids = rng.permutation(users) * 7919 + 2**60, rng.permutation(videos) * 104_729 + 2**58
    ts_ms = np.sort(START_MS + rng.integers(0, days * 24, events) * 3_600_000)
    at = rng.integers(0, videos, events)
    video_table = pa.table(
        {
            "video_id": video_ids,
            "author_id": rng.integers(0, 9, videos),
            "upload_ts_ms": START_MS - rng.integers(0, 10 * DAY_MS, videos),
            "duration_ms": rng.integers(5_000, 60_000, videos),
            "music_id": rng.integers(0, 5, videos),
            "video_type": ["a"] * videos,
            "upload_type": ["b"] * videos,
            "tags": [rng.integers(0, 9, rng.integers(0, 5)).tolist() for _ in range(videos)],
            "content": list(rng.normal(size=(videos, 4)).astype(np.float32)),
            "eligible": rng.random(videos) < 0.9,
        }
    ).cast(pa.schema([field for field in VIDEOS if field not in LIMITS]))
    columns = {
        "request_id": [f"r{i}" for i in range(events)],
        "user_id": rng.choice(user_ids, events),
        "video_id": video_ids[at],
        "author_id": video_table["author_id"].to_numpy()[at],
        "ts_ms": ts_ms,
        "surface": rng.choice(["home", "search"], events),
        "slot": rng.integers(0, 6, events),
        "source": ["x"] * events,
        "connected": [False] * events,
        "policy_id": ["p"] * events,
        "propensity": [0.5] * events,
        "bundle_version": [None] * events,
        "watch_ms": rng.integers(0, 60_000, events),
        "duration_ms": video_table["duration_ms"].to_numpy()[at],
    } | {signal: rng.integers(0, 2, events) for signal in SIGNALS}
    event_table = pa.table({name: pa.array(columns[name], EVENTS.field(name).type) for name in EVENTS.names})
    dates = np.datetime_as_string(ts_ms.astype("datetime64[ms]"), unit="D")
    user_table = pa.table(
        {
            "user_id": user_ids,
            "region": rng.choice(["de", "fr", "it"], users),
            "register_days": rng.integers(0, 900, users),
        }
    )
    return {"users": user_table, "videos": video_table, "events": event_table.append_column("date", pa.array(dates))}
