"""Replay against the simulated world, whose truth is known; and that truth against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.log_world import LogWorld
from benchmarks.replay_truth import judge
from pipelines.replay import replay
from pipelines.replay.log import CanonicalLog, Window
from pipelines.replay.policies import LoggedRequests, Random
from pipelines.replay.sampling import Sampler, conditional
from pipelines.replay.slates import Slates
from pipelines.world import World, WorldConfig, generate
from pipelines.world.truth import true_values

TINY = WorldConfig(seed=3, n_users=500, n_authors=120, n_videos=1500, n_days=4, candidate_days=3)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    return generate(TINY, tmp_path_factory.mktemp("truth") / "w").out_dir


class Liked:
    """Values by the world's own chance of a long view."""

    name = "liked"

    def __init__(self) -> None:
        self._world = World(TINY)

    def values(self, requests: LoggedRequests):
        counts = np.diff(requests.offsets)
        user_C, ts_C = np.repeat(requests.user_id, counts), np.repeat(requests.ts_ms, counts)
        return self._world.oracle(user_C, requests.video_ids, ts_C)["long_view"]


def test_the_truth_of_one_slot_is_the_sum_over_candidates(world_dir):
    world, window = World(TINY), Window(slots=1)
    sampler = Sampler(temperature=0.5, epsilon=0.1)
    (shard,) = CanonicalLog(world_dir, ("long_view",), window).shards()
    requests, n = shard.requests, len(shard.requests.request_id)
    counts = np.diff(requests.offsets)
    ts_C = np.repeat(shard.rows["ts_ms"].to_numpy(), counts)
    chance_C = world.oracle(np.repeat(requests.user_id, counts), requests.video_ids, ts_C)["long_view"]
    expected = []
    for values_C in (Liked().values(requests), np.zeros(len(chance_C))):
        first = Slates(request=np.arange(n), slot=np.zeros(n, dtype=int), user=np.arange(n), logged=np.ones(n),
                       candidate=requests.offsets[:-1])  # fmt: skip
        mean = conditional(values_C, requests, first, sampler, {"p": chance_C, "p2": chance_C**2}).expected
        expected.append((mean["p"].mean(), np.sqrt((mean["p2"] - mean["p"] ** 2).sum()) / n))
    found = true_values(world, world_dir, [Liked(), Random()], "long_view", sampler=sampler, window=window, draws=8)
    for (truth, error), name in zip(expected, ("liked", "random"), strict=True):
        assert abs(found[name] - truth) < 5 * error / np.sqrt(8)
    assert found["liked"] > 1.5 * found["random"]


def test_common_random_numbers_make_equal_policies_equal(world_dir):
    class Again(Random):
        name = "again"

    found = true_values(World(TINY), world_dir, [Random(), Again()], "watch_s", draws=1)
    assert found["random"] == found["again"]


def test_replay_of_the_worlds_log_covers_the_truth(world_dir):
    sampler = Sampler(temperature=1.0, epsilon=0.1)
    report = replay(world_dir, [Liked(), "random"], sampler=sampler, slots=1, clip=float("inf"))
    truth = true_values(World(TINY), world_dir, [Liked(), Random()], "long_view", sampler=sampler,
                        window=Window(slots=1), draws=8)  # fmt: skip
    for result in report.policies[1:]:
        found = result.metrics["long_view"]
        assert found["snrips"].value.low < truth[result.policy] < found["snrips"].value.high
        assert found["dr"].value.low < truth[result.policy] < found["dr"].value.high
    assert report.refused == {}


def test_as_exploration_falls_the_effective_sample_shrinks_and_the_log_is_refused(tmp_path):
    effective, refused = [], []
    for i, epsilon in enumerate((0.5, 0.1, 0.02, 0.0)):
        kind = "epsilon_slot" if epsilon else "deterministic"
        config = replace(TINY, n_days=2, candidate_days=2, logger=replace(TINY.logger, kind=kind, epsilon=epsilon))
        generate(config, tmp_path / str(i))
        report = replay(tmp_path / str(i), ["random"], metrics=["long_view"], slots=1, resamples=50)
        effective.append(report.policies[1].diagnostics.effective_share)
        refused.append(bool(report.refused))
        assert report.exit_code == (3 if refused[-1] else 0)
    assert effective[:3] == sorted(effective[:3], reverse=True)
    assert refused == [False, refused[1], True, True]
    assert "no support in the log" in " ".join(report.refused["random"])  # the last logger is deterministic


def test_the_enumerable_worlds_truth_is_what_its_logs_earn_on_average():
    world = LogWorld()
    truth = world.true_value(world.logger_V(), world.logger_epsilon)
    means = np.array([world.log(seed).rewards["long_view"].mean() for seed in range(60)])
    assert abs(means.mean() - truth) < 5 * means.std(ddof=1) / np.sqrt(len(means))


def test_estimators_on_drawn_logs_stand_where_theory_puts_them():
    """A short version of `benchmarks.replay_truth`; bounds of 5 standard errors."""
    world = LogWorld()
    target_V = 0.9 * world.appeal_V()
    truth = world.true_value(target_V)
    found = [judge(world.log(seed), target_V, resamples=1) for seed in range(40)]
    error = {name: np.array([f[name][0] for f in found]) - truth for name in ("rips", "sips", "dr", "snrips", "replay")}
    for name in ("rips", "sips", "dr"):
        assert abs(error[name].mean()) < 5 * error[name].std(ddof=1) / np.sqrt(len(found)), name
    assert error["replay"].mean() > 5 * error["replay"].std(ddof=1) / np.sqrt(len(found))  # logging was not uniform


def test_rows_of_one_user_are_alike_so_resampling_rows_promises_too_much():
    world = LogWorld()
    target_V = 0.9 * world.appeal_V()
    shard = world.log(0)
    spread = [judge(shard, target_V, 200, rows_as_users=rows)["snrips"][1:].std() for rows in (False, True)]
    assert spread[0] > 1.5 * spread[1]
