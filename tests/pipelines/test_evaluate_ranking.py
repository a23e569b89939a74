"""Figures of the ranker on known answers: gaps with their errors, watch time by duration, calibration by slice."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluate_ranking import auc_gap, watch_by_duration, watch_figures
from pipelines.metrics import auc, expected_calibration_error
from pipelines.slices import ECE_BINS, Slicing, _between, _rows, chance_calibration_error
from ranking.tasks import TASKS


def test_the_gap_between_two_scores_is_the_difference_of_their_areas() -> None:
    labels, good, bad = np.array([1, 1, 0, 0]), np.array([4.0, 3, 2, 1]), np.array([4.0, 1, 2, 3])
    gap, error = auc_gap(labels, good, bad)
    assert gap == pytest.approx(1.0 - 0.5)
    # Positives' shares differ by 0 and 1, negatives' by .5 and .5: sd of the first is .7071, over two rows .5.
    assert error == pytest.approx(np.sqrt(0.5 / 2 + 0.0 / 2))


def test_the_error_of_a_gap_is_its_spread_over_fresh_samples() -> None:
    def sample(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=1500)
        labels = rng.random(1500) < 1 / (1 + np.exp(1.5 - truth))
        return auc_gap(labels, truth, truth + rng.normal(0, 0.7, 1500))

    gaps, errors = zip(*(sample(seed) for seed in range(300)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.15)  # the spread of 300 is known to 4%


def test_watch_time_is_told_apart_by_duration() -> None:
    actual, predicted = np.array([1.0, 3.0, 10.0, 30.0, 20.0]), np.array([2.0, 2.0, 20.0, 20.0, 10.0])
    rows = watch_by_duration(actual, predicted, np.array([5.0, 6.0, 50.0, 60.0, 70.0]))
    assert sum(row["rows"] for row in rows) == 5
    assert sum(row["rows"] * row["mae_s"] for row in rows) == pytest.approx(1 + 1 + 10 + 10 + 10)
    assert watch_figures(actual, predicted)["mae_s"] == pytest.approx(32 / 5)
    assert watch_by_duration(np.zeros(0), np.zeros(0), np.zeros(0)) == []
    constant = watch_by_duration(actual, predicted, np.full(5, 8.0))
    assert [(row["rows"], row["duration_s"]) for row in constant] == [(5, "8 to 8")]


def test_the_error_that_chance_gives_is_what_exact_predictions_get() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(1, 8, 4000)
    found = [expected_calibration_error(rng.random(4000) < p, p, ECE_BINS) for _ in range(200)]
    assert chance_calibration_error(p) == pytest.approx(np.mean(found), rel=0.1)


def test_a_slice_that_is_wrong_shows_where_the_average_is_right() -> None:
    rng = np.random.default_rng(4)
    labels = np.full((4000, len(TASKS)), np.nan, np.float32)
    at, half = TASKS.index("click"), np.arange(4000) < 2000
    labels[:, at] = rng.random(4000) < np.where(half, 0.2, 0.4)
    flat = np.full((4000, 1), 0.3) + rng.normal(0, 1e-3, (4000, 1))
    rows = list(_rows(Slicing("surface", ("a", "b"), (~half).astype(int)), ("click",), flat, labels))
    assert [row["value"] for row in rows] == ["a", "b"]
    for row, rate in zip(rows, (0.2, 0.4), strict=True):
        assert row["calibration"] == pytest.approx(0.3 / rate, rel=5 * 0.5 * row["two_se"])
        assert abs(row["calibration"] - 1) > row["two_se"]
        assert row["ece"] > 3 * row["ece_by_chance"]
        assert row["positives"] == labels[(half if rate == 0.2 else ~half), at].sum()


def test_slices_of_a_number_have_edges_and_leave_the_unknown_out() -> None:
    parts = _between("age", np.array([np.nan, 0.0, 24.0, 100.0, 168.0]), (24, 168))
    assert parts.labels == ("< 24", "24 to 168", ">= 168")
    assert parts.code_N.tolist() == [-1, 0, 1, 1, 2]


def test_areas_agree_with_the_metric_on_ties() -> None:
    rng = np.random.default_rng(5)
    labels, score = rng.integers(0, 2, 300), rng.integers(0, 5, 300).astype(float)
    assert auc_gap(labels, score, np.zeros(300))[0] == pytest.approx(auc(labels, score) - 0.5)
