"""A planted world small enough to train on in seconds: a user long-views the videos of one topic, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask
from features.batch import to_batch
from features.dataset import Dataset
from features.schema import EVENTS, LIMITS, SIGNALS, UNDATED, VIDEOS
from features.spec import Categorical, Content, FeatureSpec, MultiValued, Numeric

TOPICS, USERS, VIDEOS_N, EVENTS_PER_USER, DAY_MS = 5, 150, 300, 24, 86_400_000
START_MS = 1_767_225_600_000
DATES = ("2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")
CONFIG = TowerConfig(
    dim=18, embedding_dim=8, hidden=32, layers=1, heads=2, dropout=0.0, full_softmax_up_to=0, window_stride=8
)


def planted_spec() -> FeatureSpec:
    return FeatureSpec(
        user=(Categorical(name="user_id", column="user_id", rows=400, known_only=True),),
        video=(
            Categorical(name="video_id", column="video_id", rows=800, known_only=True),
            Categorical(name="author_id", column="author_id", rows=64),
            MultiValued(name="tags", column="tags", rows=32, max_values=2),
            Numeric(name="duration", column="duration_ms", log=True),
            Content(name="content", column="content", dim=8),
        ),
        history_length=12,
    )


def planted_dataset() -> tuple[Dataset, np.ndarray, np.ndarray]:
    """(dataset, topic by user row, topic by video row); the last 30 videos occur in no event."""
    rng = np.random.default_rng(5)
    user_topic, video_topic = rng.integers(0, TOPICS, USERS), rng.integers(0, TOPICS, VIDEOS_N)
    n = USERS * EVENTS_PER_USER
    user, video = np.repeat(np.arange(USERS), EVENTS_PER_USER), rng.integers(0, VIDEOS_N - 30, n)
    ts_ms = START_MS + np.tile(np.arange(EVENTS_PER_USER) * (4 * DAY_MS // EVENTS_PER_USER), USERS)
    ts_ms[1::EVENTS_PER_USER] = ts_ms[0::EVENTS_PER_USER]  # the first two events of a user share their time
    dataset = dataset_of(
        content=np.eye(TOPICS, 8)[video_topic] + 0.2 * rng.normal(size=(VIDEOS_N, 8)),
        upload_ts_ms=np.full(VIDEOS_N, START_MS - DAY_MS),
        events=(user, video, ts_ms, user_topic[user] == video_topic[video]),
    )
    return dataset, np.concatenate([[-1], user_topic]), np.concatenate([[-1], video_topic])


def planted_uploads() -> tuple[Dataset, np.ndarray]:
    """(dataset, hit by video row): all users long-view what is younger than a day, and one video in five, the hits,
    at any age; content says nothing. Half of the videos are there before the log, the others come while it runs."""
    rng = np.random.default_rng(6)
    hit = rng.random(VIDEOS_N) < 0.2
    upload_ts_ms = START_MS + rng.integers(-4 * DAY_MS, 4 * DAY_MS, VIDEOS_N)
    user = np.repeat(np.arange(USERS), EVENTS_PER_USER)
    ts_ms = START_MS + np.sort(rng.integers(0, 4 * DAY_MS, (USERS, EVENTS_PER_USER)), axis=1).ravel()
    by_upload = np.argsort(upload_ts_ms)
    video = by_upload[rng.integers(0, np.searchsorted(upload_ts_ms[by_upload], ts_ms))]
    fresh = ts_ms - upload_ts_ms[video] < DAY_MS
    dataset = dataset_of(
        content=rng.normal(size=(VIDEOS_N, 8)),
        upload_ts_ms=upload_ts_ms,
        events=(user, video, ts_ms, fresh | hit[video]),
    )
    return dataset, np.concatenate([[False], hit])


def dataset_of(
    *,
    content: np.ndarray,
    upload_ts_ms: np.ndarray,
    events: tuple[np.ndarray, ...],
    undated: tuple[np.ndarray, ...] | None = None,
) -> Dataset:
    """Events are (user, video, ts_ms, long_view) columns, undated ones (user, video, position, long_view), users and
    videos by number; every 50th video is not eligible."""
    rng = np.random.default_rng(7)
    user, video, ts_ms, long_view = events
    user_ids, video_ids, n = np.arange(USERS) * 7 + 2**61, np.arange(VIDEOS_N) * 3 + 2**60, len(user)
    videos = pa.table(
        {
            "video_id": video_ids,
            "author_id": rng.integers(1, 20, VIDEOS_N),
            "upload_ts_ms": upload_ts_ms,
            "duration_ms": rng.integers(5_000, 60_000, VIDEOS_N),
            "music_id": np.ones(VIDEOS_N, np.int64),
            "video_type": ["x"] * VIDEOS_N,
            "upload_type": ["y"] * VIDEOS_N,
            "tags": [[int(t)] for t in rng.integers(0, 30, VIDEOS_N)],
            "content": list(content.astype(np.float32)),
            "eligible": np.arange(VIDEOS_N) % 50 != 0,
        }
    ).cast(pa.schema([field for field in VIDEOS if field not in LIMITS]))
    columns: dict[str, object] = {name: pa.nulls(n, EVENTS.field(name).type) for name in EVENTS.names}
    columns |= {"request_id": [str(i) for i in range(n)], "user_id": user_ids[user], "video_id": video_ids[video]}
    columns |= {"ts_ms": ts_ms, "surface": ["feed"] * n}
    columns |= {signal: np.zeros(n, np.int8) for signal in SIGNALS}
    columns["long_view"] = long_view.astype(np.int8)
    table = pa.table(columns).cast(EVENTS)
    before = None
    if undated is not None:
        user, video, position, undated_long_view = undated
        before = {signal: np.zeros(len(user), np.int8) for signal in SIGNALS}
        before |= {"user_id": user_ids[user], "video_id": video_ids[video], "position": position}
        before = pa.table(before | {"long_view": undated_long_view.astype(np.int8)}).select(UNDATED.names).cast(UNDATED)
    return Dataset.build(
        planted_spec(),
        users=pa.table({"user_id": user_ids}),
        videos=videos,
        events=table.append_column("date", pa.array([DATES[day] for day in (ts_ms - START_MS) // DAY_MS])),
        undated=before,
        train_dates=DATES[:3],
    )


def train(task: TowersTask, steps: int, lr: float = 0.01) -> torch.nn.Module:
    """The least loop that trains: one batch after another, Adam on everything."""
    torch.manual_seed(0)
    model = task.build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    units, rng = task.train_units(), np.random.default_rng(0)
    for step in range(steps):
        collated = task.collate(rng.choice(units, 48, replace=False), seed=step)
        targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
        optimizer.zero_grad()
        model(to_batch(collated.inputs), targets)["loss"].backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """dataset, topics, and towers trained on it: in memory (`model`), exported (`folder`), loaded (`towers`)."""
    torch.set_num_threads(1)
    dataset, user_topic, video_topic = planted_dataset()
    task = TowersTask(dataset, CONFIG, DATES[:3], DATES[3:])
    model = train(task, steps=200)
    folder: Path = tmp_path_factory.mktemp("towers")
    task.export(model.state_dict(), folder)
    return SimpleNamespace(
        dataset=dataset,
        user_topic=user_topic,
        video_topic=video_topic,
        task=task,
        model=model,
        folder=folder,
        towers=Towers.load(folder),
    )


@pytest.fixture(scope="session")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """dataset, hit, task and loaded towers of the world where age and counters decide."""
    torch.set_num_threads(1)
    dataset, hit = planted_uploads()
    task = TowersTask(dataset, CONFIG, DATES[:3], DATES[3:])
    folder: Path = tmp_path_factory.mktemp("uploads")
    task.export(train(task, steps=120).state_dict(), folder)
    return SimpleNamespace(dataset=dataset, hit=hit, task=task, towers=Towers.load(folder))
