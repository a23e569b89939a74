"""Public logs are read as they are published; what is broken in them is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.schema import SIGNALS
from pipelines.replay import ReplayInputError, replay
from pipelines.replay.formats import KUAIRAND_SIGNALS
from pipelines.replay.sampling import Sampler

OPEN_BANDIT = Path(__file__).resolve().parents[2].parent / "shared/data/open-bandit"
has_open_bandit = pytest.mark.skipif(not OPEN_BANDIT.exists(), reason=f"the Open Bandit sample is not at {OPEN_BANDIT}")


@has_open_bandit
def test_the_uniform_policy_is_estimated_from_the_thompson_sampling_log_of_open_bandit():
    """Real propensities: the random bucket's own click rate, .0046, is the truth to be covered."""
    truth = pl.read_csv(OPEN_BANDIT / "random/men/men.csv")["click"].to_numpy().mean()
    assert truth == pytest.approx(0.0046)
    report = replay(OPEN_BANDIT / "bts/men", ["random"], clip=float("inf"))
    found = report.policies[1]
    assert report.exit_code == 0
    assert found.diagnostics.effective_sample_size == pytest.approx(656, abs=1)
    assert found.diagnostics.mean_weight == pytest.approx(0.943, abs=0.001)
    estimate = found.metrics["click"]["snips"].value
    assert estimate.estimate == pytest.approx(0.0032, abs=5e-5)
    for name in ("snips", "snrips", "snips@100"):
        value = found.metrics["click"][name].value
        assert value.low < truth < value.high, name


@has_open_bandit
def test_from_the_random_bucket_every_policy_can_be_judged_and_random_is_the_logger():
    report = replay(OPEN_BANDIT / "random/men", ["random"], resamples=50)
    found = report.policies[1]
    assert found.diagnostics.effective_share == pytest.approx(1, abs=1e-6)
    assert found.metrics["click"]["snips"].difference.estimate == pytest.approx(0, abs=1e-6)


def test_a_broken_row_of_open_bandit_is_named(tmp_path):
    table = pl.DataFrame(
        {
            "timestamp": ["2019-11-24 00:01:03.979311+00:00"] * 3,
            "item_id": [0, 1, 2],
            "position": [1, 2, 3],
            "click": [0, 1, 0],
            "propensity_score": [0.5, 0.0, 0.2],
        }
    )
    folder = tmp_path / "shop"
    folder.mkdir()
    table.write_csv(folder / "shop.csv")
    with pytest.raises(ReplayInputError, match=r"shop.csv: row 1 .*propensity 0.0 lies outside \(0, 1\]; 1 such rows"):
        replay(folder, ["random"], resamples=2)
    table.drop("propensity_score").write_csv(folder / "shop.csv")
    with pytest.raises(ReplayInputError, match="no column propensity_score"):
        replay(folder, ["random"], resamples=2)


def kuairand(folder: Path) -> pl.DataFrame:
    """A random log in KuaiRand's columns: 30 users, 12 distinct videos each, liked by the parity of the video."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(30), 12)
    video = np.concatenate([rng.permutation(40)[:12] for _ in range(30)])
    n = len(user)
    columns = {"user_id": user, "video_id": video, "date": [20220423] * n, "hourmin": [1400] * n}
    columns |= {"time_ms": 1_650_700_000_000 + np.arange(n) * 1000} | dict.fromkeys(KUAIRAND_SIGNALS, [0] * n)
    columns |= {"long_view": (video % 2).astype(int), "play_time_ms": 1000 * video, "duration_ms": [9000] * n}
    table = pl.DataFrame(columns | {"is_rand": [1] * n, "tab": [1] * n})
    table.write_csv(folder / "log_random_4_22_to_5_08_pure.csv")
    return table


def test_kuairands_random_log_is_a_choice_among_what_a_user_was_shown_for_no_reason(tmp_path):
    table = kuairand(tmp_path)

    class Odd:
        name = "odd"

        def values(self, requests):
            return (requests.video_ids % 2).astype(float)

    sampler = Sampler(temperature=1.0, epsilon=0.0, standardise=False)
    report = replay(tmp_path, ["random", Odd()], sampler=sampler, resamples=50)
    assert (report.rows, report.users) == (360, 30)
    random, odd = report.policies[1:]
    assert random.diagnostics.effective_sample_size == pytest.approx(360)
    assert random.metrics["long_view"]["ips"].value.estimate == pytest.approx(table["long_view"].to_numpy().mean())
    # A user with k odd videos of 12: their share under exp(1) against 1, every reward known.
    k = table.group_by("user_id").agg(pl.col("long_view").sum())["long_view"].to_numpy()
    expected = np.mean(k * np.e / (k * np.e + (12 - k)))
    assert odd.metrics["long_view"]["ips"].value.estimate == pytest.approx(expected, rel=1e-9)
    assert set(KUAIRAND_SIGNALS.values()) == set(SIGNALS)


def test_a_video_shown_twice_to_a_user_is_one_candidate(tmp_path):
    table = kuairand(tmp_path)
    pl.concat([table, table.head(5)]).write_csv(tmp_path / "log_random_4_22_to_5_08_pure.csv")
    assert replay(tmp_path, ["random"], resamples=2).rows == 360
