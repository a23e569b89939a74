"""Baselines learn what they should from data whose right answer is obvious, and nothing from the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipelines.baselines import (
    DAY_MS,
    FactorisationMachine,
    FactorisationMachineConfig,
    Popularity,
    RandomOrder,
    popular_videos,
)
from pipelines.metrics import gauc, kuairand_primary

KUAIRAND = Path(__file__).resolve().parents[2].parent / "shared/data/kuairand-pure"


def tastes(rows: int = 12_000, users: int = 60, videos: int = 80, seed: int = 0):
    """Half of the users like the first tag and half the second: no video is better than another on the whole."""
    rng = np.random.default_rng(seed)
    user, video = rng.integers(0, users, rows), rng.integers(0, videos, rows)
    chance = np.where(user % 2 == video % 2, 0.8, 0.2)
    events = pl.DataFrame(
        {
            "user_id": user,
            "video_id": video + 2**40,  # beyond 32 bits on purpose
            "ts_ms": np.sort(rng.integers(0, 4 * DAY_MS, rows)),
            "long_view": (rng.random(rows) < chance).astype(np.int8),
        }
    )
    catalogue = pl.DataFrame(
        {
            "video_id": np.arange(videos) + 2**40,
            "author_id": np.arange(videos) // 4,
            "duration_ms": np.arange(videos) * 1000,
            "tags": [[v % 2] for v in range(videos)],
        }
    )
    return events, catalogue


def test_the_factorisation_machine_finds_tastes_that_popularity_cannot():
    events, videos = tastes()
    train, test = events.head(9000), events.tail(3000)
    config = FactorisationMachineConfig(max_epochs=8, batch_size=128, learning_rate=0.1)
    machine = FactorisationMachine(videos, config, progress=lambda _: None).fit(train, "long_view")
    labels, users = test["long_view"].to_numpy(), test["user_id"].to_numpy()
    assert gauc(labels, machine.score(test), users) > 0.75
    assert gauc(labels, Popularity().fit(train, "long_view").score(test), users) < 0.6


def test_the_same_seed_gives_the_same_machine_and_unseen_ids_get_a_score():
    events, videos = tastes(rows=2000)
    config = FactorisationMachineConfig(max_epochs=2)
    first, second = (FactorisationMachine(videos, config, progress=lambda _: None) for _ in range(2))
    strangers = pl.DataFrame({"user_id": [-5, 0], "video_id": [2**40, 999]})
    scored = first.fit(events, "long_view").score(strangers)
    assert np.isfinite(scored).all()
    assert scored.tolist() == second.fit(events, "long_view").score(strangers).tolist()


def test_popularity_by_hand():
    rows = pl.DataFrame({"user_id": [1, 2, 3, 4], "video_id": [7, 7, 8, 8], "long_view": [1, 1, 0, None]})
    found = Popularity(strength=1.0).fit(rows, "long_view").score(pl.DataFrame({"video_id": [8, 7, 9]}))
    rate = 2 / 3  # the null row is not counted
    assert found.tolist() == pytest.approx([(0 + rate) / (1 + 1), (2 + rate) / (2 + 1), rate])


def test_random_order_is_half_right_and_repeatable():
    events, _ = tastes()
    baseline = RandomOrder(seed=4).fit(events, "long_view")
    scores = baseline.score(events)
    assert scores.tolist() == baseline.score(events).tolist()
    assert gauc(events["long_view"].to_numpy(), scores, events["user_id"].to_numpy()) == pytest.approx(0.5, abs=0.02)


def test_popular_videos_count_only_the_window():
    rows = pl.DataFrame(
        {
            "video_id": [1, 1, 1, 2, 2, 3, 4],
            "ts_ms": [0, 0, 0, 2 * DAY_MS, 2 * DAY_MS, 2 * DAY_MS, 5 * DAY_MS],
            "click": [1, 1, 1, 1, 1, 1, 1],
        }
    )
    assert popular_videos(rows, "click", 2).tolist() == [1, 2]
    assert popular_videos(rows, "click", 5, now_ms=3 * DAY_MS, days=1).tolist() == [2, 3]  # 1 is old, 4 is the future
    assert popular_videos(rows.with_columns(click=0), "click", 5).tolist() == []


@pytest.mark.skipif(not KUAIRAND.exists(), reason=f"KuaiRand-Pure is not at {KUAIRAND}")
def test_popularity_on_kuairand_pure_scores_what_was_measured_before():
    """The design page's .566 for popularity, on train days up to 04-28 and the undated impressions before them."""
    log = pl.read_csv(KUAIRAND / "data/log_standard_4_22_to_5_08_pure.csv")
    columns = [pl.col("user_id", "video_id", "long_view").cast(pl.Int64)]
    undated = pl.read_parquet(KUAIRAND / "reconstructed/train_impressions_last50.parquet").select(columns)
    train = pl.concat([undated, log.filter(pl.col("date") <= 20220428).select(columns)])
    test = log.filter(pl.col("date") >= 20220429)
    assert len(test) == 113_930
    scores = Popularity().fit(train, "long_view").score(test)
    primary = kuairand_primary(test["long_view"].to_numpy(), scores, test["user_id"].to_numpy())[2]
    assert primary == pytest.approx(0.566, abs=0.001)
