"""A tiny random log, untrained models exported by their own tasks, and two published bundles made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask, features_at, index_instant
from features.artifacts import Registry
from features.dataset import Dataset
from features.schema import EVENTS, FOLLOWS, LIMITS, SIGNALS, VIDEOS
from features.spec import Categorical, Content, FeatureSpec, MultiValued, Numeric
from ranking.config import RankerConfig
from ranking.train import RankerTask
from serving.bundle import FeedBundle, write_bundle
from serving.config import FeedConfig
from serving.golden import record

DAY_MS, START_MS = 86_400_000, 1_767_225_600_000
USERS, VIDEO_COUNT, AUTHORS, EVENT_COUNT, DAYS = 40, 300, 30, 1_500, 4
USER_0, VIDEO_0 = 2**60, 2**58
SPEC = FeatureSpec(
    user=(
        Categorical(name="user_id", column="user_id", rows=128, known_only=True),
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


@dataclass(frozen=True)
class World:
    """The log, what was built from it, and the registry with versions v1 (live) and v2 (another feed.json)."""

    tables: dict[str, pa.Table]
    dataset: Dataset
    registry: Path
    models: Path
    now_ms: int

    def stage(self, config: FeedConfig, **options) -> Path:
        """A staged bundle without golden answers."""
        staged = Registry(self.registry).stage()
        write_bundle(
            staged,
            self.dataset,
            videos=self.tables["videos"],
            towers_dir=self.models / "towers",
            ranker_dir=self.models / "ranker",
            index=VideoIndex(self.models / "index"),
            feed_config=config,
            metrics={},
            **options,
        )
        return staged

    def publish(self, version: str, config: FeedConfig, **options) -> str:
        """Stage, record a few golden answers, publish; LIVE stays as it is."""
        staged = self.stage(config, **options)
        record(staged, n=4)
        return Registry(self.registry).publish(staged, version=version, meta={})

    def bundle(self, version: str = "v1") -> FeedBundle:
        return FeedBundle.load(Registry(self.registry).open(version))


def random_tables() -> dict[str, pa.Table]:
    rng = np.random.default_rng(7)
    user_ids, video_ids = USER_0 + np.arange(USERS), VIDEO_0 + rng.permutation(VIDEO_COUNT)
    authors = rng.integers(0, AUTHORS, VIDEO_COUNT)
    authors = np.where(authors < 10, USER_0 + authors, 2**59 + authors)  # the first ten users also upload
    videos = {
        "video_id": video_ids,
        "author_id": authors,
        "upload_ts_ms": START_MS + rng.integers(-20 * DAY_MS, DAYS * DAY_MS, VIDEO_COUNT),
        "duration_ms": rng.integers(5_000, 60_000, VIDEO_COUNT),
        "music_id": [1] * VIDEO_COUNT,
        "video_type": ["a"] * VIDEO_COUNT,
        "upload_type": ["b"] * VIDEO_COUNT,
        "tags": [rng.integers(0, 9, rng.integers(0, 5)).tolist() for _ in range(VIDEO_COUNT)],
        "content": list(rng.normal(size=(VIDEO_COUNT, 4)).astype(np.float32)),
        "eligible": rng.random(VIDEO_COUNT) < 0.9,
    }
    at = rng.integers(0, VIDEO_COUNT, EVENT_COUNT)
    ts_ms = np.sort(START_MS + rng.integers(0, DAYS * DAY_MS, EVENT_COUNT))
    events = {
        "request_id": [f"r{i}" for i in range(EVENT_COUNT)],
        "user_id": rng.choice(user_ids, EVENT_COUNT),
        "video_id": video_ids[at],
        "author_id": authors[at],
        "ts_ms": ts_ms,
        "surface": rng.choice(["main", "search"], EVENT_COUNT),
        "slot": rng.integers(0, 6, EVENT_COUNT),
        "source": ["x"] * EVENT_COUNT,
        "connected": [False] * EVENT_COUNT,
        "policy_id": ["p"] * EVENT_COUNT,
        "propensity": [0.1] * EVENT_COUNT,
        "bundle_version": ["v"] * EVENT_COUNT,
        "watch_ms": rng.integers(0, 60_000, EVENT_COUNT),
        "duration_ms": np.array(videos["duration_ms"])[at],
        **{signal: (rng.random(EVENT_COUNT) < 0.3).astype(np.int8) for signal in SIGNALS},
    }
    dates = [str(np.datetime64(int(t), "ms").astype("datetime64[D]")) for t in ts_ms]
    follows = {
        "user_id": np.repeat(user_ids, 3),
        "author_id": rng.choice(authors, 3 * USERS),
        "ts_ms": pa.nulls(3 * USERS, pa.int64()),
    }
    users = {"user_id": user_ids, "region": rng.choice(["a", "b"], USERS), "register_days": np.arange(USERS)}
    return {
        "users": pa.table(users),
        "videos": pa.table(videos).cast(pa.schema([field for field in VIDEOS if field not in LIMITS])),
        "events": pa.table(events).cast(EVENTS).append_column("date", pa.array(dates)),
        "follows": pa.table(follows).cast(FOLLOWS),
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    root, tables = tmp_path_factory.mktemp("world"), random_tables()
    dates = tuple(sorted(set(tables["events"]["date"].to_pylist())))
    split = (dates[:-1], dates[-1:])
    named = {name: tables[name] for name in ("users", "videos", "events", "follows")}
    dataset = Dataset.build(SPEC, **named, undated=None, train_dates=split[0])
    towers = TowersTask(dataset, TowerConfig(dim=16, embedding_dim=8, hidden=32, layers=1), *split)
    ranker = RankerTask(dataset, RankerConfig(embedding_dim=8), *split)
    for task in (towers, ranker):
        task.export(task.build().state_dict(), root / task.name)
    rows = np.flatnonzero(dataset.eligible)
    day, now_ms = index_instant(dataset, split[1])
    at_instant = features_at(dataset, rows, day, now_ms)
    vectors = Towers.load(root / "towers").video_vectors(dataset.videos, rows, at_instant)
    VideoIndex.build([(rows, vectors)], len(dataset.videos) + 1, IndexConfig(), root / "index")
    made = World(tables, dataset, root / "registry", root, START_MS + (DAYS + 1) * DAY_MS)
    config = FeedConfig(surfaces=("main", "search"))
    made.publish("v1", config)
    made.publish("v2", replace(config, name="another"))
    Registry(made.registry).set_live("v1")
    return made
