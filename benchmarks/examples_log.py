"""A log of any length in the simulated world's shape, for measuring what examples cost: drawn, not lived through.

Users, authors, videos, their content and the first follows are the world's own population at that size. Impressions
are drawn by day, without running the logger: who comes by the users' activity, what is shown by a popularity that fades
with a video's age, outcomes by chance at the world's rates. N impressions of a day.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import EVENTS
from pipelines.world.config import DAY_MS, START_MS, WorldConfig
from pipelines.world.population import Population, populate
from pipelines.world.tables import follows_table, users_table, videos_table

DAYS, PAGE = 14, 6
ROWS_A_USER, ROWS_A_VIDEO, VIDEOS_AN_AUTHOR = 250, 40, 14
"""As in the world `full`: 25 million impressions of 100,000 users, a million videos, 60,000 authors."""
RATES = {"click": 0.36, "long_view": 0.2, "like": 0.02, "follow": 0.004, "comment": 0.005, "share": 0.004,
         "profile_enter": 0.02, "hate": 0.002}  # fmt: skip
_PARQUET = {"compression": "zstd", "write_page_checksum": True}


def write_log(folder: Path, rows: int, seed: int = 7) -> None:
    """Canonical tables with `rows` impressions over DAYS days."""
    config = WorldConfig(
        seed=seed,
        n_users=max(rows // ROWS_A_USER, 10),
        n_videos=max(rows // ROWS_A_VIDEO, 100),
        n_authors=max(rows // ROWS_A_VIDEO // VIDEOS_AN_AUTHOR, 10),
        n_days=DAYS,
        page_size=PAGE,
        mean_follows=15.0,
    )
    world = populate(config)
    folder.mkdir(parents=True)
    pq.write_table(users_table(world.users), folder / "users.parquet", **_PARQUET)
    pq.write_table(videos_table(config, world), folder / "videos.parquet", **_PARQUET)
    nobody = np.zeros((2, 0), np.int64)
    pq.write_table(follows_table(config, world, nobody), folder / "follows.parquet", **_PARQUET)
    rng = np.random.default_rng(seed)
    appeal_V = rng.pareto(1.2, config.n_videos) + 0.05
    for day in range(DAYS):
        n = rows * (day + 1) // DAYS - rows * day // DAYS
        date = str(np.datetime64(START_MS + day * DAY_MS, "ms").astype("datetime64[D]"))
        (folder / "events" / f"date={date}").mkdir(parents=True)
        events = _day(world, appeal_V, day, n, rng)
        pq.write_table(events, folder / "events" / f"date={date}" / "part-00000.parquet", **_PARQUET)


def _day(world: Population, appeal_V: np.ndarray, day: int, n: int, rng: np.random.Generator) -> pa.Table:
    """One day's impressions in order of time, a page at an instant."""
    users, videos = world.users, world.videos
    pages = -(-n // PAGE)
    begin_ms = START_MS + day * DAY_MS
    user_P = rng.choice(len(users.ids), pages, p=users.requests_per_day_U / users.requests_per_day_U.sum())
    ts_ms_P = begin_ms + np.sort(rng.integers(0, DAY_MS, pages))
    age_days_V = (begin_ms - videos.upload_ts_ms_V) / DAY_MS
    weight_V = np.where(age_days_V >= 0, appeal_V * np.exp(-np.maximum(age_days_V, 0) / 3), 0)
    shown_N = rng.choice(len(videos.ids), n, p=weight_V / weight_V.sum())
    page_N, slot_N = np.arange(n) // PAGE, np.arange(n) % PAGE
    clicked_N = rng.random(n) < RATES["click"]
    duration_ms_N = videos.duration_ms_V[shown_N]
    columns = {
        "request_id": pa.array(np.char.mod("w%016x", day * 10**9 + np.arange(pages))).take(pa.array(page_N)),
        "user_id": users.ids[user_P[page_N]],
        "video_id": videos.ids[shown_N],
        "author_id": world.authors.ids[videos.author_V[shown_N]],
        "ts_ms": ts_ms_P[page_N],
        "surface": pa.repeat("feed", n),
        "slot": slot_N.astype(np.int32),
        "source": pa.repeat("explore", n),
        "connected": rng.random(n) < 0.1,
        "policy_id": pa.repeat("drawn", n),
        "propensity": rng.random(n),
        "bundle_version": pa.nulls(n, pa.string()),
        "watch_ms": np.where(clicked_N, duration_ms_N * rng.random(n), rng.exponential(900, n)).astype(np.int64),
        "duration_ms": duration_ms_N,
        "click": clicked_N.astype(np.int8),
    }
    for signal, rate in RATES.items():
        if signal != "click":
            columns[signal] = (clicked_N & (rng.random(n) < rate / RATES["click"])).astype(np.int8)
    return pa.table({field.name: columns[field.name] for field in EVENTS}, schema=EVENTS)
