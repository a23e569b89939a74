"""Logs that have little to teach: nothing positive, one watch time, a held-out day without a case, ids nobody knows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from features.batch import to_batch
from features.dataset import Dataset
from features.schema import SIGNALS
from ranking.calibrate import Calibration
from ranking.config import RankerConfig
from ranking.infer import Ranker
from ranking.tasks import TASKS
from ranking.train import RankerTask
from ranking.watch import WatchQuantiles

sys.path.insert(0, str(Path(__file__).parent))
from test_ranking_model import DAYS, planted

SMALL = RankerConfig(embedding_dim=4, bottom_widths=(8,), cross_rank=4, attention_width=4, expert_widths=(8, 4))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    torch.set_num_threads(1)
    return planted()[0]


def with_examples(dataset: Dataset, **changes: np.ndarray) -> Dataset:
    return replace(dataset, examples=replace(dataset.examples, **changes))


def loss_of(task: RankerTask, rows: int = 64) -> torch.Tensor:
    collated = task.collate(task.train_units()[:rows], seed=0)
    targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
    return task.build()(to_batch(collated.inputs), targets)["loss"]


def test_a_log_without_a_positive_is_refused_with_its_dates(dataset: Dataset) -> None:
    nothing = with_examples(
        dataset,
        signals=np.zeros_like(dataset.examples.signals),
        watch_ms=np.full(len(dataset.examples), 9_000.0, np.float32),
    )
    with pytest.raises(ValueError, match=r"no positive of any task on the training dates \('2026-01-01'"):
        RankerTask(nothing, SMALL, DAYS[:2], DAYS[2:])


def test_one_watch_time_for_all_teaches_nothing_and_breaks_nothing(dataset: Dataset, tmp_path: Path) -> None:
    constant = with_examples(dataset, watch_ms=np.full(len(dataset.examples), 5_000.0, np.float32))
    task = RankerTask(constant, SMALL, DAYS[:2], DAYS[2:])
    quantiles = task.collate(task.train_units()[:64], seed=0).targets["watch_quantile_N"]
    np.testing.assert_allclose(quantiles, 0.5, atol=1e-6)
    assert torch.isfinite(loss_of(task))
    task.export(task.build().state_dict(), tmp_path)
    scores = Ranker.load(tmp_path).score(constant.inputs(np.arange(20), with_slot=False))
    np.testing.assert_allclose(scores.watch_ms_N, 5_000.0)


def test_a_single_watch_time_in_a_bucket_survives_the_round_trip() -> None:
    tables = WatchQuantiles.fit(np.array([4_000.0]), np.array([9_000.0]), None)
    assert tables.quantile(np.array([4_000.0, 1.0, 1e9]), np.full(3, 9e3)).tolist() == [0.5, 0.5, 0.5]
    assert tables.watch_ms(np.array([0.0, 1.0]), np.full(2, 9e3)).tolist() == [4_000.0, 4_000.0]


@pytest.mark.parametrize("label", [0.0, 1.0, np.nan])
def test_a_held_out_day_with_one_outcome_or_none_leaves_finite_probabilities(label: float) -> None:
    logits = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    found = Calibration.fit(("click",), logits, np.full((500, 1), label, np.float32))
    probability = found.apply(np.array([[-80.0], [0.0], [80.0]], np.float32))
    assert np.isfinite(probability).all()
    assert (np.diff(probability[:, 0]) >= 0).all()
    if not np.isnan(label):
        assert abs(found.apply(logits).mean() - label) < 0.02


def test_tasks_that_are_not_logged_everywhere_train_on_the_rows_that_have_them(dataset: Dataset) -> None:
    signals = np.array(dataset.examples.signals)
    signals[::2, SIGNALS.index("long_view")] = np.nan
    task = RankerTask(with_examples(dataset, signals=signals), SMALL, DAYS[:2], DAYS[2:])
    rows = dataset.rows_on(DAYS[:2])
    assert task.base_rates["long_view"] == pytest.approx(np.nanmean(signals[rows, SIGNALS.index("long_view")]))
    assert torch.isfinite(loss_of(task))


def test_dropped_ids_train_the_row_of_the_unknown_and_validation_keeps_its_ids(dataset: Dataset) -> None:
    task = RankerTask(dataset, replace(SMALL, id_dropout=0.3, embedding_dropout=0.0), DAYS[:2], DAYS[2:])
    model = task.build()
    collated = task.collate(task.train_units()[:200], seed=4)
    users, videos = collated.inputs.user_sparse_BW[:, 0], collated.inputs.video_sparse_UW[1:, 0]
    for rows in (users, videos):  # five standard deviations of a binomial's share
        assert abs((rows == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(rows))
    assert (collated.inputs.video_sparse_UW[1:, 1] > 0).all(), "authors stay"
    targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
    model(to_batch(collated.inputs), targets)["loss"].backward()
    for name, table in (("user_id", model.user_ebc), ("video_id", model.video_ebc)):
        gradient = table.embedding_bags[name].weight.grad
        assert gradient is not None
        assert float(gradient[0].abs().sum()) > 0, name
    kept = task.collate(task.validation_units()[:200], seed=4).inputs
    whole = dataset.inputs(task.validation_units()[:200])
    np.testing.assert_array_equal(kept.video_sparse_UW, whole.video_sparse_UW)
    np.testing.assert_array_equal(kept.user_sparse_BW, whole.user_sparse_BW)


def test_a_keep_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_negatives is 0"):
        RankerConfig(keep_negatives=0.0)


def test_task_weights_take_derived_tasks_and_refuse_unknown_ones() -> None:
    assert RankerConfig(task_weights=((TASKS[-1], 2.0),)).task_weights == (("quick_skip", 2.0),)
    with pytest.raises(ValueError, match="quick_skips"):
        RankerConfig(task_weights=(("quick_skips", 2.0),))
