"""What changes with time and with what was shown: exact by arithmetic, and drawn as promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.schema import SIGNALS
from pipelines.replay import replay
from pipelines.replay.log import Window
from pipelines.replay.policies import LoggedRequests, Random
from pipelines.replay.sampling import Sampler
from pipelines.world import LIVES, LifeConfig, World, WorldConfig, generate, read_config
from pipelines.world.config import DAY_MS, START_MS
from pipelines.world.life import Returning, day_of, leaving, reach, satiation, tastes_by_day
from pipelines.world.truth import true_values

RESTLESS = WorldConfig(
    seed=5, n_users=600, n_authors=120, n_videos=2000, n_days=3, candidate_days=3, requests_per_user_day=4.0,
    life=LIVES["restless"],
)  # fmt: skip


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    return generate(RESTLESS, tmp_path_factory.mktemp("life") / "w").out_dir


@pytest.fixture(scope="module")
def events(world_dir) -> pl.DataFrame:
    files = sorted(world_dir.glob("events/*/*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in files]).sort("request_id", "slot")


def test_a_topic_tires_with_each_video_of_it_above_and_recovers_down_the_page():
    life = LifeConfig(satiation=1.0, satiation_kept=0.5)
    #                                        of topic 1: the one above 1, two above 0.5, three above 0.25
    assert satiation(np.array([[1, 2, 1, 1]]), life).tolist() == [[0, 0, 0.5, 1 + 0.25]]
    assert satiation(np.array([[1, 1, 1]]), LifeConfig()).tolist() == [[0, 0, 0]]


def test_the_chance_to_get_to_a_slot_is_the_product_of_going_on_above_it():
    life = LifeConfig(leave_after_skip=0.4, leave_after_stay=0.1)
    assert leaving(np.array([0, 1, 0.5]), life) == pytest.approx([0.4, 0.1, 0.25])
    assert reach(np.array([[0.5, 1.0, 0.0]]), life)[0] == pytest.approx([1, 0.75, 0.75 * 0.9])


def test_tastes_drift_away_day_by_day_and_stay_of_unit_length():
    taste = np.abs(np.random.default_rng(0).normal(0, 1, (400, 8)))
    taste /= np.linalg.norm(taste, axis=1, keepdims=True)
    days = tastes_by_day(taste, 6, LifeConfig(drift=0.1), np.random.default_rng(1))
    np.testing.assert_allclose(np.linalg.norm(days, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(days[0], np.maximum(taste, 0.01), atol=0.01)
    likeness = [(days[0] * day).sum(axis=1).mean() for day in days]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[-1] < 0.97
    assert day_of(START_MS + np.array([-1, 0, DAY_MS - 1, DAY_MS, 99 * DAY_MS]), 6).tolist() == [0, 0, 0, 1, 5]


def test_who_was_pleased_comes_back_more_often_and_a_hated_video_costs_visits():
    life = LifeConfig(return_gain=2.0, return_usual=0.3, return_hate=5.0, return_memory=0.5)
    returning = Returning(3, life)
    assert returning.pull_U.tolist() == [1, 1, 1]
    # user 0 stayed for 4 of 5; user 1 for 1 of 2, and hated the other; user 2 did not come
    returning.learn(np.array([0] * 5 + [1] * 2), np.array([1, 1, 1, 1, 0, 1, 0]), np.array([0] * 6 + [1]))
    moods = np.array([0.5 * (4 / 5 - 0.3), 0.5 * ((1 - 5) / 2 - 0.3), 0])
    assert returning.pull_U == pytest.approx(np.exp(2 * moods))
    returning.learn(np.array([], int), np.array([]), np.array([]))
    assert returning.pull_U == pytest.approx(np.exp(moods)), "what is not renewed is half forgotten"


def test_pages_end_where_people_leave_and_no_earlier(events):
    life, last = RESTLESS.life, RESTLESS.page_size - 1
    slots = events["slot"].to_numpy()
    goes_on = np.append(slots[1:] == slots[:-1] + 1, False)
    above = slots < last
    for stayed, leaves in ((0, life.leave_after_skip), (1, life.leave_after_stay)):
        mine = above & (events["click"].to_numpy() == stayed)
        error = np.sqrt(leaves * (1 - leaves) / mine.sum())
        assert abs((~goes_on[mine]).mean() - leaves) < 5 * error, stayed
    pages = events.group_by("request_id").agg(n=pl.len(), top=pl.col("slot").max())
    assert (pages["n"] == pages["top"] + 1).all()


def test_what_is_drawn_is_what_the_page_oracle_promises(events):
    """By slot: every signal among those who got there, and how many did."""
    pages = events.group_by("request_id", maintain_order=True).agg("user_id", "video_id", "ts_ms")
    S, lengths = RESTLESS.page_size, pages["video_id"].list.len().to_numpy()

    def padded(column: str) -> np.ndarray:  # what lies below changes nothing above
        return np.array([[*row, *[row[-1]] * (S - len(row))] for row in pages[column].to_list()])

    there = np.arange(S) < lengths[:, None]
    chances, reached = World(RESTLESS).page_oracle(padded("user_id")[:, 0], padded("video_id"), padded("ts_ms"))
    for signal in SIGNALS:
        for slot in range(S):
            p = chances[signal][there[:, slot], slot]
            found = events.filter(pl.col("slot") == slot)[signal].sum()
            assert abs(found - p.sum()) < 5 * np.sqrt((p * (1 - p)).sum()) + 1e-9, (signal, slot)
    second = reached[:, 1]
    assert abs(there[:, 1].sum() - second.sum()) < 5 * np.sqrt((second * (1 - second)).sum())


def test_tiring_costs_what_it_says(world_dir):
    """The same page shown to the same people, with a topic repeated and without the memory of it."""
    world, still = World(RESTLESS), World(replace(RESTLESS, life=replace(RESTLESS.life, satiation=0.0)))
    videos = world.population.videos
    same = np.flatnonzero(videos.topic_V == videos.topic_V[0])[:3]
    user, page = world.population.users.ids[:50], np.tile(videos.ids[same], (50, 1))
    ts_ms = np.full(page.shape, START_MS + DAY_MS)
    tired, fresh = (w.page_oracle(user, page, ts_ms)[0]["click"] for w in (world, still))
    np.testing.assert_array_equal(tired[:, 0], fresh[:, 0])
    assert (tired[:, 1] < fresh[:, 1]).all()
    assert ((tired / fresh)[:, 2] < (tired / fresh)[:, 1]).all()


def test_a_restless_world_is_written_and_read_back_and_is_the_same_each_time(world_dir, tmp_path):
    assert read_config(world_dir / "world.json") == RESTLESS
    again = generate(read_config(world_dir / "world.json"), tmp_path / "w").out_dir
    files = sorted(path.relative_to(world_dir) for path in world_dir.rglob("*.parquet"))
    assert files
    assert all((world_dir / file).read_bytes() == (again / file).read_bytes() for file in files)


class Liked:
    """Values by the world's own chance of a long view, tired by nothing."""

    name = "liked"

    def values(self, requests: LoggedRequests):
        counts = np.diff(requests.offsets)
        user_C, ts_C = np.repeat(requests.user_id, counts), np.repeat(requests.ts_ms, counts)
        return World(RESTLESS).oracle(user_C, requests.video_ids, ts_C)["long_view"]


def test_replay_covers_the_truth_where_topics_tire_and_people_leave(world_dir):
    sampler = Sampler(temperature=1.0, epsilon=0.1)
    report = replay(world_dir, [Liked(), "random"], metrics=["long_view"], sampler=sampler, resamples=200, slots=2)
    truth = true_values(
        World(RESTLESS), world_dir, [Liked(), Random()], "long_view", sampler=sampler, window=Window(slots=2), draws=8
    )
    for result in report.policies[1:]:
        found = result.metrics["long_view"]["snrips"].value
        assert found.low < truth[result.policy] < found.high
    assert truth["liked"] > 1.3 * truth["random"]
