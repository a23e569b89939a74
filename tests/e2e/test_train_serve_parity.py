"""What a model is trained on is what it is served with: the same impressions through both, equal to the bit.

A bundle is published after the first days of a world; the days after come to it as live events, through the real store.
At random instants, impressions that come next are hydrated as requests of their users, and compared with the examples
that the pipeline builds from the whole log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask
from features.dataset import Dataset
from features.inputs import Inputs
from features.schema import SIGNALS
from pipelines.ingest import event_parts, load_events, load_table
from pipelines.recipes import world_spec
from pipelines.world import WorldConfig, generate
from ranking.config import RankerConfig
from ranking.train import RankerTask
from serving.bundle import FeedBundle, write_bundle
from serving.config import FeedConfig
from serving.hydrate import hydrate, model_inputs
from serving.store import SqliteStore
from serving.wire import Event

SPEC = world_spec(user_rows=4096, video_rows=4096, author_rows=512)
BUNDLE_DAYS, DAYS = 2, 4


@dataclass(frozen=True)
class Both:
    """The pipeline's examples of all days, and a bundle of the first."""

    examples: Dataset
    bundle: FeedBundle
    events: pa.Table


def published(root: Path, n_users: int) -> Both:
    generate(WorldConfig(n_users=n_users, n_authors=80, n_videos=1200, n_days=DAYS), root / "world")
    parts = event_parts(root / "world")
    tables = {name: load_table(root / "world", name) for name in ("users", "videos", "follows")}
    users, videos, follows = tables["users"], tables["videos"], tables["follows"]
    assert users is not None
    assert videos is not None
    assert follows is not None
    train = tuple(part.date for part in parts[:BUNDLE_DAYS])
    built = {"users": users, "videos": videos, "undated": None, "train_dates": train}
    examples = Dataset.build(SPEC, events=parts, follows=follows, **built, folder=root / "examples", workers=2)
    cut_ms = int(load_events(root / "world", [train[-1]])["ts_ms"].to_numpy().max())
    known = follows.filter(pa.array(follows["ts_ms"].fill_null(0).to_numpy() <= cut_ms))
    base = Dataset.build(SPEC, events=parts[:BUNDLE_DAYS], follows=known, **built)
    return Both(examples, bundle_of(base, videos, root), load_events(root / "world"))


def bundle_of(dataset: Dataset, videos: pa.Table, root: Path) -> FeedBundle:
    """Untrained models: what is compared is what they would read."""
    torch.manual_seed(0)
    split = (dataset.dates[:1], dataset.dates[1:])
    tasks = (
        TowersTask(dataset, TowerConfig(dim=16, embedding_dim=8, hidden=32, layers=1), *split),
        RankerTask(dataset, RankerConfig(embedding_dim=8), *split),
    )
    for task in tasks:
        task.export(task.build().state_dict(), root / task.name)
    rows = np.flatnonzero(dataset.eligible)
    vectors = np.random.default_rng(0).normal(size=(len(rows), 16)).astype(np.float32)
    VideoIndex.build([(rows, vectors)], len(dataset.videos) + 1, IndexConfig(), root / "index")
    write_bundle(
        root / "bundle",
        dataset,
        videos=videos,
        towers_dir=root / "towers",
        ranker_dir=root / "ranker",
        index=VideoIndex(root / "index"),
        feed_config=FeedConfig(surfaces=("feed",)),
        metrics={},
    )
    return FeedBundle.open(root / "bundle", "v1")


def live_events(events: pa.Table) -> list[Event]:
    return [
        Event(
            request_id=row["request_id"],
            slot=row["slot"],
            user_id=row["user_id"],
            video_id=row["video_id"],
            author_id=row["author_id"],
            ts_ms=row["ts_ms"],
            watch_ms=row["watch_ms"],
            duration_ms=row["duration_ms"],
            signals={signal: bool(row[signal]) for signal in SIGNALS},
        )
        for row in events.to_pylist()
    ]


def resolved(inputs: Inputs, context: int, candidate: int) -> dict[str, np.ndarray]:
    """What the models read of one context and one of its candidates, positions in U replaced by what stands there."""
    history, video = inputs.history_BL[context], inputs.candidate_N[candidate]
    assert inputs.owner_N[candidate] == context
    return {
        "user_sparse": inputs.user_sparse_BW[context],
        "user_dense": inputs.user_dense_BD[context],
        "surface": inputs.surface_B[context],
        "now_ms": inputs.now_ms_B[context],
        "history_row": inputs.video_row_U[history],
        "history_sparse": inputs.video_sparse_UW[history],
        "history_dense": inputs.video_dense_UD[history],
        "history_signals": inputs.history_signals_BLS[context],
        "history_watch": inputs.history_watch_BL[context],
        "history_ts_ms": inputs.history_ts_ms_BL[context],
        "history_gap": inputs.history_gap_BL[context],
        "history_length": inputs.history_length_B[context],
        "video_row": inputs.video_row_U[video],
        "video_sparse": inputs.video_sparse_UW[video],
        "video_dense": inputs.video_dense_UD[video],
        "candidate_dense": inputs.candidate_dense_NC[candidate],
        "slot": inputs.slot_N[candidate],
    }


def compare(root: Path, n_users: int, *, instants: int, rows_each: int) -> int:
    """Impressions compared; every one of them bit for bit. Of each user the first that comes after an instant."""
    both = published(root, n_users)
    rng, data = np.random.default_rng(3), both.examples
    e, user_ids = data.examples, both.events["user_id"].to_numpy()
    live_from = int(np.searchsorted(e.day, BUNDLE_DAYS))
    begins = np.sort(rng.choice(np.unique(e.ts_ms[live_from:])[:-200], instants, replace=False))
    logged, compared, sqlite = live_from, 0, SqliteStore(root / "store.sqlite")
    for begin_ms, end_ms in zip(begins, [*begins[1:], np.inf], strict=True):
        until = int(np.searchsorted(e.ts_ms, begin_ms))
        sqlite.log_events(live_events(both.events.slice(logged, until - logged))).result()
        logged = until
        at = np.flatnonzero((e.ts_ms >= begin_ms) & (e.ts_ms < end_ms))
        # Until a user's next impression the store knows all that they have done.
        _, first = np.unique(e.user_row[at], return_index=True)
        first_ms = np.zeros(len(data.users) + 1, np.int64)
        first_ms[e.user_row[at[first]]] = e.ts_ms[at[first]]
        at = at[e.ts_ms[at] == first_ms[e.user_row[at]]]
        rows = rng.choice(at, min(rows_each, len(at)), replace=False)
        batch = data.inputs(rows, with_slot=False, counters_day=BUNDLE_DAYS)
        for number, row in enumerate(rows):
            user_id, video_row = int(user_ids[row]), int(e.video_row[row])
            others = rng.integers(1, len(data.videos) + 1, 3)
            query = hydrate(
                both.bundle, sqlite.user(user_id), user_id=user_id, now_ms=int(e.ts_ms[row]), surface="feed"
            )
            served = resolved(model_inputs(both.bundle, query, np.array([*others, video_row])), 0, 3)
            for name, trained in resolved(batch, number, number).items():
                assert trained.tobytes() == np.asarray(served[name], trained.dtype).tobytes(), (name, row)
        compared += len(rows)
    sqlite.close()
    return compared


def test_a_thousand_impressions_are_served_as_they_are_trained_on(tmp_path: Path) -> None:
    assert compare(tmp_path, 1000, instants=2, rows_each=500) == 1000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_impressions_are_served_as_they_are_trained_on(tmp_path: Path) -> None:
    assert compare(tmp_path, 4000, instants=16, rows_each=1000) >= 10_000
