"""The simulated world keeps its promises: canonical tables, valid pages, and a reproducible past."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from features import schema
from pipelines.world import SCALES, World, WorldConfig, generate, read_config
from pipelines.world.config import DAY_MS, START_MS
from pipelines.world.ids import opaque_ids

TINY = WorldConfig(n_users=300, n_authors=80, n_videos=900, n_days=4, candidate_days=2)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    return generate(TINY, tmp_path_factory.mktemp("world") / "tiny").out_dir


@pytest.fixture(scope="module")
def events(world_dir) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(world_dir.glob("events/*/*.parquet"))])


@pytest.fixture(scope="module")
def videos(world_dir) -> pl.DataFrame:
    return pl.read_parquet(world_dir / "videos.parquet")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_gives_the_same_bytes_in_two_processes(world_dir, tmp_path):
    program = (
        "import sys, json; from pathlib import Path; from dataclasses import asdict;"
        "from pipelines.world import generate, read_config;"
        "generate(read_config(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(world_dir / "world.json"), str(tmp_path / "again")],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "2"},
    )
    first, again = digests(world_dir), digests(tmp_path / "again")
    assert len(first) == 4 + 1 + TINY.n_days  # four tables, world.json, a file a day
    assert first == again


def test_the_world_is_still_the_one_that_figures_were_measured_on(world_dir, events):
    """Ids, times and watch times of the default logger, as they were before the world knew others."""
    digest = hashlib.sha256()
    for name in ("user_id", "video_id", "ts_ms", "slot", "watch_ms"):
        digest.update(np.ascontiguousarray(events[name].to_numpy()).tobytes())
    assert digest.hexdigest() == "db384c037aef4c3445be854cc872b80ab68ac341087809a0cef552b442e6116c"
    assert "kind" not in json.loads((world_dir / "world.json").read_text())["config"]["logger"]


@pytest.mark.parametrize("kind", ["epsilon_slot", "popularity", "deterministic"])
def test_other_loggers_record_the_odds_they_draw_by(tmp_path, kind):
    config = replace(TINY, n_days=2, logger=replace(TINY.logger, kind=kind))
    generate(config, tmp_path / "w")
    assert read_config(tmp_path / "w" / "world.json") == config
    events = pl.concat([pl.read_parquet(p) for p in sorted((tmp_path / "w").glob("events/*/*.parquet"))])
    sets = pl.read_parquet(tmp_path / "w" / "candidates.parquet")
    sizes = sets.select("request_id", n=pl.col("video_ids").list.len())
    joined = events.join(sizes, on="request_id").with_columns(left=pl.col("n").cast(pl.Float64) - pl.col("slot"))
    p, left = joined["propensity"].to_numpy(), joined["left"].to_numpy()
    if kind == "deterministic":
        assert (p == 1).all()
        return
    epsilon = config.logger.epsilon
    if kind == "epsilon_slot":  # the best left, or anything
        assert np.isclose(p, 1 - epsilon + epsilon / left).mean() == pytest.approx(1 - epsilon, abs=0.05)
        assert (np.isclose(p, 1 - epsilon + epsilon / left) | np.isclose(p, epsilon / left)).all()
    gap = (1 / p - left)[joined["slot"].to_numpy() == 0]  # inverse propensities count what could have been shown
    assert abs(gap.mean()) < 5 * gap.std() / np.sqrt(len(gap))


def test_another_seed_gives_another_world(world_dir, tmp_path):
    generate(replace(TINY, seed=TINY.seed + 1), tmp_path)
    other = digests(tmp_path)
    assert all(other[name] != digest for name, digest in digests(world_dir).items())


def test_tables_have_the_canonical_schemas(world_dir):
    for path in world_dir.glob("events/*/*.parquet"):
        assert pq.read_schema(path).equals(schema.EVENTS)
    for name, wanted in (("videos", schema.VIDEOS), ("follows", schema.FOLLOWS), ("candidates", schema.CANDIDATES)):
        assert pq.read_schema(world_dir / f"{name}.parquet").equals(wanted)
    users = pq.read_schema(world_dir / "users.parquet")
    assert users.field("user_id").equals(schema.USERS.field("user_id"))
    assert {"region", "age_bucket", "declared_topic", "register_days"} <= set(users.names)


def test_events_lie_in_the_partition_of_their_day(world_dir):
    paths = sorted(world_dir.glob("events/*/*.parquet"))
    assert [path.parent.name for path in paths] == [f"date=2026-01-0{day}" for day in (1, 2, 3, 4)]
    for day, path in enumerate(paths):
        ts_ms = pl.read_parquet(path)["ts_ms"].to_numpy()
        assert (np.diff(ts_ms) >= 0).all()
        assert ts_ms.min() >= START_MS + day * DAY_MS
        assert ts_ms.max() < START_MS + (day + 1) * DAY_MS


def test_ids_beyond_2_to_53_survive_a_parquet_round_trip(world_dir, events, videos):
    ids = opaque_ids(TINY.n_videos, TINY.seed * 3 + 3)
    assert np.array_equal(videos["video_id"].to_numpy(), ids)
    assert len(np.unique(ids)) == TINY.n_videos
    assert (ids > 2**53).mean() > 0.8
    assert ((ids > 2**31) & (ids < 2**53)).mean() > 0.1
    assert (ids.astype(np.float64).astype(np.int64) != ids).any(), "a cast to float64 must be seen"
    assert set(events["video_id"]) <= set(ids.tolist())
    assert set(events["author_id"]) <= set(videos["author_id"])


def test_opaque_ids_do_not_depend_on_where_a_block_starts():
    assert np.array_equal(opaque_ids(20, 5)[12:], opaque_ids(8, 5, start=12))


def test_nothing_ineligible_or_not_yet_uploaded_is_shown_or_a_candidate(world_dir, events, videos):
    bad = set(videos.filter(~pl.col("eligible"))["video_id"])
    assert 0 < len(bad) < 0.1 * TINY.n_videos
    candidates = pl.read_parquet(world_dir / "candidates.parquet").explode("video_ids")
    shown = events.select("video_id", "ts_ms")
    offered = candidates.select(pl.col("video_ids").alias("video_id"), "ts_ms")
    for table in (shown, offered):
        assert not bad & set(table["video_id"])
        joined = table.join(videos.select("video_id", "upload_ts_ms"), on="video_id")
        assert joined.height == table.height
        assert (joined["upload_ts_ms"] < joined["ts_ms"]).all()


def test_a_user_never_sees_a_video_twice(events):
    assert not events.select("user_id", "video_id").is_duplicated().any()


def test_pages_fill_their_slots_in_time_and_never_overlap(events):
    e = events.sort("user_id", "ts_ms")
    page = e.group_by("request_id").agg(pl.col("slot"), pl.col("user_id").n_unique().alias("users"))
    assert set(map(tuple, page["slot"].to_list())) == {tuple(range(TINY.page_size))}
    assert (page["users"] == 1).all()
    following = e.with_columns(pl.col("ts_ms").shift(-1).over("user_id").alias("next_ts_ms")).drop_nulls("next_ts_ms")
    assert (following["ts_ms"] + following["watch_ms"] < following["next_ts_ms"]).all()
    changes = (e["request_id"] != e["request_id"].shift(1)).sum() + 1
    assert changes == page.height, "a user's page is never interrupted by another"


def test_follows_made_in_the_log_connect_from_the_next_day(world_dir, events):
    follows = pl.read_parquet(world_dir / "follows.parquet")
    made = follows.filter(pl.col("ts_ms").is_not_null())
    assert made.height > 0
    assert not follows.select("user_id", "author_id").is_duplicated().any()
    first = events.filter(pl.col("follow") == 1).group_by("user_id", "author_id").agg(pl.col("ts_ms").min())
    assert set(made.iter_rows()) == set(first.select("user_id", "author_id", "ts_ms").iter_rows())
    day = (pl.col("ts_ms") - START_MS) // DAY_MS
    pairs = events.with_columns(day=day).join(
        follows.with_columns(since=pl.when(pl.col("ts_ms").is_null()).then(-1).otherwise(day)).drop("ts_ms"),
        on=["user_id", "author_id"],
        how="left",
    )
    expected = (pairs["since"] < pairs["day"]).fill_null(value=False)
    assert (expected == pairs["connected"]).all()
    assert 0.02 < pairs["connected"].mean() < 0.6


def test_world_json_tells_the_truth(world_dir, events):
    truth = json.loads((world_dir / "world.json").read_text())
    assert read_config(world_dir / "world.json") == TINY
    assert truth["counts"]["events"] == events.height
    assert truth["rates"]["click"] == pytest.approx(events["click"].mean())
    assert truth["examination_by_slot"][0] == 1.0
    assert sorted(truth["examination_by_slot"], reverse=True) == truth["examination_by_slot"]


def test_a_folder_with_events_is_not_overwritten(world_dir):
    with pytest.raises(FileExistsError, match="remove it"):
        generate(TINY, world_dir)


def test_an_unknown_id_is_named(events):
    with pytest.raises(KeyError, match=r"1 user ids .* 12345"):
        World(TINY).oracle(np.array([12345]), events["video_id"].to_numpy()[:1], np.array([START_MS]))


def test_scales_grow():
    sizes = [SCALES[name].n_users * SCALES[name].n_videos for name in ("smoke", "small", "full")]
    assert sizes == sorted(sizes)
