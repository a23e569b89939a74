"""The whole funnel on a tiny world: logs in, feeds out over gRPC; and both models on two worker processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from candidate_gen.index import VideoIndex
from features.artifacts import Registry
from pipelines.cluster import ClusterConfig, cluster
from pipelines.console import Stage
from pipelines.recipes import recipe
from pipelines.stages import train_model
from pipelines.workspace import Workspace
from pipelines.world import SCALES
from pipelines.world.responses import examination
from serving.bundle import FeedBundle
from serving.golden import check


def test_the_demo_goes_from_nothing_to_served_feeds_a_replay_and_a_report(demo: Path):
    run = json.loads((demo / "run.json").read_text())
    names = [stage["name"] for stage in run["stages"]]
    assert names == [
        "generate", "ingest", "examples", "train-towers", "train-ranker", "index", "evaluate", "publish",
        "serve and fetch", "replay",
    ]  # fmt: skip
    assert [len(feed["items"]) for feed in run["feeds"]] == [10, 10, 10]
    assert [feed["cold"] for feed in run["feeds"]] == [False, False, True]
    for item in (item for feed in run["feeds"] for item in feed["items"]):
        assert 0 < item["propensity"] <= 1
        assert sum(item["terms"].values()) == pytest.approx(item["value"], abs=1e-6)
        assert item["source"] in ("ann", "covisit", "followed", "popular", "fresh")
        assert 0 < item["scores"]["long_view"] < 1
    logged = next(p for p in run["replay"]["policies"] if p["policy"] == "logged")
    assert logged["diagnostics"]["mean_weight"] == pytest.approx(1.0)


def test_the_report_is_one_file_that_needs_no_network(demo: Path):
    page = (demo / "report.html").read_text()
    assert "<html" in page
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|data:)([^"'>\\s]+)""", page) == []
    assert "@import" not in page


def test_the_side_tower_finds_where_the_worlds_viewers_look(demo: Path):
    metrics = json.loads((demo / "metrics.json").read_text())
    slots = np.array([row["slot"] for row in metrics["slots"]])
    looked = np.log(examination(slots, SCALES["tiny"].response))
    assert len(slots) == SCALES["tiny"].page_size
    for task, sign in (("click", 1.0), ("quick_skip", -1.0)):
        assert np.corrcoef(sign * looked, [row[task] for row in metrics["slots"]])[0, 1] > 0.95, task


def test_the_ranker_is_measured_by_slice_by_duration_and_for_collisions(demo: Path):
    metrics = json.loads((demo / "metrics.json").read_text())
    followed = [row for row in metrics["slices"] if row["slice"] == "author" and row["task"] == "click"]
    assert [row["value"] for row in followed] == ["not followed", "followed"]
    assert sum(row["rows"] for row in followed) == metrics["ranking"][0]["rows"]
    assert sum(bucket["rows"] for bucket in metrics["watch"]["buckets"]) == metrics["watch"]["rows"]
    assert {row["table"] for row in metrics["collisions"]} == {"user_id", "video_id", "author_id"}
    assert all(0 <= row["collision_rate"] < 0.2 for row in metrics["collisions"])


def test_the_published_bundle_verifies_and_answers_its_golden_requests(demo: Path):
    bundle = Registry(demo / "registry").open(None)
    assert check(FeedBundle.load(bundle), bundle.path("golden.json")) == 100
    assert json.loads(bundle.path("metrics.json").read_text())["fingerprint"] == bundle.meta["data"]


def test_the_published_index_knows_the_whole_log_and_the_evaluated_one_does_not(demo: Path):
    indexes = VideoIndex(Registry(demo / "registry").open(None).folder / "index"), VideoIndex.open(demo / "index")
    published, evaluated = (index.vectors[np.arange(index.n_rows)] for index in indexes)
    prior = -2  # the coordinate before the last carries age and counters
    assert published.shape == evaluated.shape
    assert np.abs(published[1:, prior] - evaluated[1:, prior]).mean() > 0.001
    cosine = (published[1:, :prior] * evaluated[1:, :prior]).sum(axis=1)
    lengths = np.linalg.norm(published[1:, :prior], axis=1)
    np.testing.assert_allclose(cosine, lengths**2, rtol=0.01)  # content and taste are the same


def test_models_learnt_something(demo: Path):
    metrics = json.loads((demo / "metrics.json").read_text())
    recall = {row["name"]: row["recall@100"] for row in metrics["retrieval"]["rows"]}
    assert recall["two towers, exact"] > 1.5 * recall["chance"]
    long_view = next(row for row in metrics["ranking"] if row["task"] == "long_view")
    assert 0.6 < long_view["auc"] <= long_view["oracle_auc"] + 0.02


def test_two_workers_train_both_models_by_the_same_recipe(demo: Path, tmp_path: Path):
    changes = (
        "towers_train.num_workers=2", "towers_train.batch_size=16", "towers_train.epochs=1",
        "ranker_train.num_workers=2", "ranker_train.batch_size=128", "ranker_train.epochs=1",
    )  # fmt: skip
    ws = Workspace.create(tmp_path / "two", recipe("world-tiny", changes), changes)
    ws.dataset_dir.symlink_to(demo / "dataset")
    with cluster(ClusterConfig()):
        for name in ("towers", "ranker"):
            train_model(ws, name, Stage(name), key="two workers")
    for name in ("towers", "ranker"):
        result = json.loads((ws.training / name / "training.json").read_text())
        assert result["workers"] == 2
        assert {rank for table in result["plan"] for rank in table["ranks"]} == {0, 1}
        assert np.isfinite(result["best_validation_loss"])
        one, two = (load_file(root / name / f"{name}.safetensors") for root in (demo, ws.root))
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
        assert all(np.isfinite(values).all() for values in two.values())
