"""Calibration and the watch-time quantiles: known answers and round trips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ranking.calibrate import Calibration
from ranking.watch import DurationColumn, WatchQuantiles


def draw(slope: float, intercept: float, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=n)
    return logit, (rng.random(n) < 1 / (1 + np.exp(-(slope * logit + intercept)))).astype(np.float32)


def test_platt_finds_the_planted_slope_and_intercept_and_the_mean() -> None:
    logit, label = draw(0.6, -1.5, 40_000)
    found = Calibration.fit(("click",), logit[:, None], label[:, None])
    assert found.slope_T[0] == pytest.approx(0.6, abs=0.05)
    assert found.intercept_T[0] == pytest.approx(-1.5, abs=0.05)
    fresh_logit, fresh_label = draw(0.6, -1.5, 40_000, seed=1)
    assert found.apply(fresh_logit[:, None]).mean() / fresh_label.mean() == pytest.approx(1.0, abs=0.03)


def test_few_positives_change_little_and_none_logged_change_nothing() -> None:
    logit, label = draw(1.0, -2.0, 300)
    few = np.where(np.cumsum(label) <= 5, label, 0.0).astype(np.float32)
    unlogged = np.full(300, np.nan, np.float32)
    found = Calibration.fit(("like", "share"), np.stack([logit, logit], 1), np.stack([few, unlogged], 1))
    assert found.slope_T.tolist() == [1.0, 1.0]
    assert -6.0 < found.intercept_T[0] < 0.0
    assert found.intercept_T[1] == 0.0


def test_a_slope_never_turns_the_order_around() -> None:
    logit, label = draw(-0.8, 0.0, 5_000)
    found = Calibration.fit(("click",), logit[:, None], label[:, None])
    assert found.slope_T[0] > 0
    assert found.apply(logit[:, None]).mean() == pytest.approx(label.mean(), abs=0.01)


def test_calibration_survives_a_file(tmp_path: Path) -> None:
    saved = Calibration(("click", "like"), np.array([0.9, 1.1]), np.array([-0.2, 0.3]))
    saved.save(tmp_path / "calibration.json")
    loaded = Calibration.load(tmp_path / "calibration.json")
    logits = np.array([[-50.0, 800.0], [0.1, -900.0]])
    assert loaded.tasks == saved.tasks
    np.testing.assert_array_equal(loaded.apply(logits), saved.apply(logits))


def quantiles() -> tuple[WatchQuantiles, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    duration = np.exp(rng.uniform(np.log(5_000), np.log(200_000), 8_000))
    watch = duration * rng.random(8_000)
    column = DurationColumn(index=1, mean=10.0, deviation=0.8, log=True)
    return WatchQuantiles.fit(watch, duration, column), watch, duration


def test_watch_time_comes_back_from_its_quantile() -> None:
    tables, watch, duration = quantiles()
    quantile = tables.quantile(watch, duration)
    assert 0.0 <= quantile.min() <= quantile.max() <= 1.0
    np.testing.assert_allclose(tables.watch_ms(quantile, duration), watch, rtol=1e-3, atol=1.0)


def test_quantiles_are_uniform_within_short_and_long_videos_alike() -> None:
    tables, watch, duration = quantiles()
    quantile = tables.quantile(watch, duration)
    for part in (duration < 20_000, duration > 60_000):
        assert quantile[part].mean() == pytest.approx(0.5, abs=0.02)
    raised = tables.watch_ms(np.array([0.2, 0.5, 0.9]), np.full(3, 30_000.0))
    assert (np.diff(raised) > 0).all()


def test_ties_get_their_middle_and_missing_watch_time_stays_missing() -> None:
    watch = np.concatenate([np.zeros(500), np.linspace(1, 1000, 500), [np.nan]])
    tables = WatchQuantiles.fit(watch, np.zeros(1001), None)
    quantile = tables.quantile(watch, np.zeros(1001))
    assert quantile[0] == pytest.approx(0.25, abs=0.01)  # half of the rows are 0: the middle of 0 .. 0.5
    assert np.isnan(quantile[-1])
    assert not np.isnan(quantile[:-1]).any()


def test_a_log_without_watch_time_predicts_zero() -> None:
    tables = WatchQuantiles.fit(np.full(10, np.nan), np.ones(10), None)
    assert tables.watch_ms(np.array([0.1, 0.9]), np.ones(2)).tolist() == [0.0, 0.0]


def test_the_tables_and_the_duration_column_survive_json() -> None:
    tables, _, _ = quantiles()
    loaded = WatchQuantiles.from_json(tables.to_json())
    dense = np.array([[0.0, (np.log1p(30_000.0) - 10.0) / 0.8]])
    assert loaded.durations_of(dense)[0] == pytest.approx(30_000.0, rel=1e-9)
    np.testing.assert_array_equal(
        loaded.watch_ms(np.array([0.37]), np.array([3e4])), tables.watch_ms(np.array([0.37]), np.array([3e4]))
    )
