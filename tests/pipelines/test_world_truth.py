"""The oracle and the logged propensities are exact: what was drawn agrees with what was promised."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.schema import SIGNALS
from pipelines.world import World, WorldConfig, generate
from pipelines.world.logger import draw_page
from pipelines.world.responses import engagement_at, probabilities

TINY = WorldConfig(seed=11, n_users=600, n_authors=150, n_videos=2500, n_days=4, candidate_days=4)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    return generate(TINY, tmp_path_factory.mktemp("truth") / "tiny").out_dir


@pytest.fixture(scope="module")
def judged(world_dir) -> pl.DataFrame:
    """The events, with the oracle's answer for each in columns `p_SIGNAL` and `p_watch_ms`."""
    events = pl.concat([pl.read_parquet(path) for path in sorted(world_dir.glob("events/*/*.parquet"))])
    ids = [events[name].to_numpy() for name in ("user_id", "video_id", "ts_ms", "slot")]
    return events.with_columns(**{f"p_{name}": pl.Series(p) for name, p in World(TINY).oracle(*ids).items()})


def buckets(judged: pl.DataFrame) -> dict[str, pl.DataFrame]:
    cuts = judged.with_columns(bucket=pl.col("duration_ms").cut([9_000, 18_000, 30_000, 60_000]).cast(pl.String))
    by_slot = {f"slot {key[0]}": part for key, part in judged.group_by("slot", maintain_order=True)}
    by_duration = {f"duration {key[0]}": part for key, part in cuts.group_by("bucket", maintain_order=True)}
    assert (len(by_slot), len(by_duration)) == (TINY.page_size, 5)
    return by_slot | by_duration


@pytest.mark.parametrize("signal", SIGNALS)
def test_rates_match_the_oracle_by_slot_and_duration(judged, signal):
    for where, part in buckets(judged).items():
        p = part[f"p_{signal}"].to_numpy()
        error = np.sqrt((p * (1 - p)).sum())  # standard deviation of a sum of independent coins
        assert abs(part[signal].sum() - p.sum()) < 4 * error, where


def test_watch_time_matches_the_oracle_by_slot_and_duration(judged):
    for where, part in buckets(judged).items():
        gap_ms = (part["watch_ms"] - part["p_watch_ms"]).to_numpy()
        # Watch times are rounded down: half a millisecond less than promised, 1 at most.
        assert abs(gap_ms.mean()) < 4 * gap_ms.std() / np.sqrt(len(gap_ms)) + 1, where


def test_signals_follow_from_the_watch(judged):
    watch, duration = judged["watch_ms"], judged["duration_ms"]
    assert ((watch >= 2000) == (judged["click"] == 1)).all()
    rule = pl.select(pl.min_horizontal(duration, pl.lit(18_000)))["duration_ms"]
    assert ((watch >= rule) == (judged["long_view"] == 1)).all()
    assert (judged.filter(pl.col("like") == 1)["click"] == 1).all()


def test_slots_scale_every_signal_by_the_examination_curve(judged):
    pairs = [judged[name].to_numpy()[:50] for name in ("user_id", "video_id", "ts_ms")]
    world = World(TINY)
    plain, at_zero, at_three = world.oracle(*pairs), world.oracle(*pairs, slot=0), world.oracle(*pairs, slot=3)
    for signal in SIGNALS:
        assert np.array_equal(plain[signal], at_zero[signal])
        assert np.allclose(at_three[signal], plain[signal] * 4**-TINY.response.examination_decay)


def test_the_world_can_be_learned_but_not_known(judged):
    """Ranking by the oracle beats chance by far and never reaches certainty."""
    wins = judged.sample(4000, seed=0)
    positive, negative = (wins.filter(pl.col("long_view") == y)["p_long_view"].to_numpy() for y in (1, 0))
    auc = (positive[:, None] > negative[None, :]).mean()
    assert 0.72 < auc < 0.9


def test_longer_videos_get_more_seconds_and_less_completion_at_equal_affinity():
    duration_ms = np.array([5_000, 10_000, 20_000, 40_000, 80_000, 160_000])
    for affinity in (-1.0, 0.0, 1.0, 2.0):
        flat = np.zeros(len(duration_ms))
        e = engagement_at(TINY.response, flat + affinity, flat, duration_ms, flat.astype(bool), flat)
        watch_ms = probabilities(e, TINY.response)["watch_ms"]
        assert (np.diff(watch_ms) > 0).all()
        assert (np.diff(watch_ms / duration_ms) < 0).all()


def test_clickbait_raises_clicks_and_lowers_long_views_of_those_who_click():
    bait, flat = np.array([-1.0, 0.0, 1.0]), np.zeros(3)
    e = engagement_at(TINY.response, flat + 1, bait, flat + 20_000, flat.astype(bool), flat)
    p = probabilities(e, TINY.response)
    assert (np.diff(p["click"]) > 0).all()
    assert (np.diff(p["long_view"] / p["click"]) < 0).all()


def test_propensities_are_the_formula_written_out():
    scores, epsilon = np.array([1.0, 0.0, -1.0, 9.0]), 0.2
    valid = np.array([True, True, True, False])
    n = 60_000
    chosen, propensity = draw_page(
        np.tile(scores, (n, 1)), np.tile(valid, (n, 1)), 2, epsilon, np.random.default_rng(3)
    )
    w = np.exp(scores)
    total = 0.0
    for first, second in itertools.permutations(range(3), 2):
        left = [k for k in range(3) if k != first]
        p_first = 0.8 * w[first] / w[:3].sum() + 0.2 / 3
        p_second = 0.8 * w[second] / w[left].sum() + 0.2 / 2
        hit = (chosen[:, 0] == first) & (chosen[:, 1] == second)
        assert np.allclose(propensity[hit], [p_first, p_second])
        p = p_first * p_second
        assert abs(hit.mean() - p) < 4 * np.sqrt(p * (1 - p) / n)
        total += p
    assert total == pytest.approx(1.0)


def test_pages_are_drawn_from_their_candidates(world_dir, judged):
    candidates = pl.read_parquet(world_dir / "candidates.parquet")
    assert set(candidates["request_id"]) == set(judged["request_id"])
    assert candidates["request_id"].is_unique().all()
    assert (candidates["video_ids"].list.n_unique() == candidates["video_ids"].list.len()).all()
    assert candidates["video_ids"].list.len().max() == TINY.n_candidates
    joined = judged.join(candidates.select("request_id", "video_ids"), on="request_id")
    assert joined.height == judged.height
    assert joined.select(pl.col("video_ids").list.contains(pl.col("video_id"))).to_series().all()


def test_inverse_propensities_count_the_candidates_left(world_dir, judged):
    """E[1 / p(chosen)] at slot s is the number of videos that could be chosen: candidates minus s."""
    sizes = pl.read_parquet(world_dir / "candidates.parquet").select(
        "request_id", n=pl.col("video_ids").list.len().cast(pl.Int64)
    )
    joined = judged.join(sizes, on="request_id")
    assert joined["propensity"].is_between(0, 1, closed="right").all()
    for slot in range(TINY.page_size):
        part = joined.filter(pl.col("slot") == slot)
        gap = (1 / part["propensity"] - (part["n"] - slot)).to_numpy()
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap))
