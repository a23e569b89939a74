"""The benchmark corpus: videos of the world's own kind that training never saw, the same whoever makes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.corpus import BLOCK_ROWS, Generated, VideoMaker, claim, describe
from candidate_gen.train import TowersTask, features_at
from features.dataset import Dataset
from features.inputs import AGE_WIDTH
from pipelines.embed import embed, opened
from pipelines.recipes import recipe
from pipelines.workspace import Workspace
from pipelines.world import SCALES, generate

N = 1_200


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The tiny world, encoded, with towers as they begin."""
    ws = Workspace.create(tmp_path_factory.mktemp("run"), recipe("world-tiny"))
    raw = ws.root / "raw"
    generate(SCALES["tiny"], raw)
    days = {path.parent.name.removeprefix("date="): pq.read_table(path) for path in sorted(raw.glob("events/*/*"))}
    events = pa.concat_tables(
        [table.append_column("date", pa.array([date] * table.num_rows)) for date, table in days.items()]
    )
    dates = tuple(days)
    dataset = Dataset.build(
        ws.recipe.spec,
        users=pq.read_table(raw / "users.parquet"),
        videos=pq.read_table(raw / "videos.parquet"),
        events=events,
        undated=None,
        train_dates=ws.recipe.split.resolve(dates).train,
    )
    dataset.save(ws.dataset_dir)
    torch.manual_seed(0)
    task = TowersTask(dataset, ws.recipe.towers, dates[:-2], dates[-2:-1])
    task.export(task.build().state_dict(), ws.towers)
    return ws


@pytest.fixture(scope="module")
def maker(ws: Workspace) -> VideoMaker:
    return VideoMaker.of(ws, Generated.of(ws, N).config)


def test_no_generated_id_was_seen_before_or_comes_twice(ws, maker):
    first, second = maker.block(1, N)[0], maker.block(1 + N, N)[0]
    ids = np.concatenate([maker.dataset.videos.ids, first.ids, second.ids])
    assert len(np.unique(ids)) == len(ids)
    assert (first.sparse[1:, first.columns.slice("video_id")] == 0).all()  # 0: the learned unknown id


def test_generated_videos_are_encoded_like_the_worlds_own(ws, maker):
    own, made = maker.dataset.videos, maker.block(1, 20_000)[0]
    np.testing.assert_allclose(made.dense[1:].mean(axis=0), own.dense[1:].mean(axis=0), atol=0.15)
    np.testing.assert_allclose(made.dense[1:].std(axis=0), own.dense[1:].std(axis=0), rtol=0.25)
    tags = own.columns.slice("tags")
    assert set(np.unique(made.sparse[1:, tags])) == set(np.unique(own.sparse[1:, tags]))
    author = own.columns.slice("author_id")
    assert set(np.unique(own.sparse[1:, author])) <= set(np.unique(made.sparse[1:, author]))


def test_counters_and_age_are_those_of_a_video_of_the_same_author_at_the_indexs_instant(ws, maker):
    videos, made_NC = maker.block(1, N)
    own = maker.dataset.videos
    own_VC = features_at(maker.dataset, np.arange(1, len(own) + 1), maker.day, maker.now_ms)
    uploaded = own_VC[:, -AGE_WIDTH] > 0
    there = {tuple(row) for row in own_VC[:, :-AGE_WIDTH]}
    assert all(tuple(row) in there for row in made_NC[:, :-AGE_WIDTH])
    author = videos.columns.slice("author_id")
    author_counters = slice(4, 8)  # the video's four, the author's, the tags'
    for row in np.random.default_rng().integers(0, N, 50):
        same = own_VC[uploaded & (own.sparse[1:, author][:, 0] == videos.sparse[row + 1, author][0])]
        if len(same):
            np.testing.assert_array_equal(made_NC[row, author_counters], same[0, author_counters])
    made_age, own_age = made_NC[:, -AGE_WIDTH], own_VC[uploaded, -AGE_WIDTH]
    assert (made_age > 0).all()
    np.testing.assert_allclose(made_age.mean(), own_age.mean(), rtol=0.1)


def test_shards_are_the_towers_vectors_and_the_same_made_alone_or_again(ws, maker, tmp_path: Path):
    source = Generated.of(ws, BLOCK_ROWS + 500)
    (shard,) = embed(source, tmp_path)
    again = np.concatenate(list(source.blocks(0)))
    np.testing.assert_array_equal(shard.vectors(), again.astype(np.float16))
    videos, candidate_NC = maker.block(1 + BLOCK_ROWS, 500)
    wanted = opened(ws.towers, source.towers).video_vectors(videos, np.arange(1, 501), candidate_NC)
    np.testing.assert_allclose(again[BLOCK_ROWS:], wanted, atol=1e-6)


def test_a_folder_with_another_corpus_is_refused(ws, tmp_path: Path):
    described = describe(ws, Generated.of(ws, N))
    claim(tmp_path, described)
    claim(tmp_path, {**described, "videos": 10})  # part of what is there
    assert json.loads((tmp_path / "meta.json").read_text())["videos"] == N
    with pytest.raises(ValueError, match="towers_sha256 differ"):
        claim(tmp_path, {**described, "towers_sha256": "other"})
