"""Which days are trained on, and on top of what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.training.incremental import Increment, IncrementalConfig, new_dates, require_same_model
from pipelines.training.states import StateError, TrainedState
from pipelines.training.trainer import TrainConfig

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")


def state(tmp_path: Path, dates: tuple[str, ...]) -> TrainedState:
    return TrainedState(folder=tmp_path, version="v1", dates=dates)


def test_new_days_are_those_from_the_date_on(tmp_path: Path):
    assert new_dates("2026-01-03", DAYS, state(tmp_path, DAYS[:2])) == DAYS[2:]
    assert new_dates("2026-01-04", DAYS, state(tmp_path, DAYS[:2])) == DAYS[3:]


def test_no_day_is_trained_on_twice_and_the_message_says_from_when(tmp_path: Path):
    with pytest.raises(StateError, match=r"2026-01-02 already: give --since 2026-01-03"):
        new_dates("2026-01-02", DAYS, state(tmp_path, DAYS[:2]))
    with pytest.raises(StateError, match="no later training day in the log yet"):
        new_dates("2026-01-04", DAYS, state(tmp_path, DAYS))


def test_days_that_are_held_out_are_named_as_the_reason(tmp_path: Path):
    with pytest.raises(StateError, match="the log's end at 2026-01-04, later days are held out"):
        new_dates("2026-01-05", DAYS, state(tmp_path, DAYS[:2]))


def test_an_increment_travels_with_its_examples(tmp_path: Path):
    renewed = {"video.video_id": np.array([3, 5]), "user.user_id": np.zeros(0, np.int64)}
    increment = Increment(base="v1", dates=DAYS[2:], dates_before=DAYS[:2], renewed=renewed)
    assert Increment.load(tmp_path) is None
    increment.save(tmp_path)
    loaded = Increment.load(tmp_path)
    assert loaded is not None
    assert (loaded.base, loaded.dates, loaded.dates_before) == ("v1", DAYS[2:], DAYS[:2])
    assert {name: rows.tolist() for name, rows in loaded.renewed.items()} == {
        "video.video_id": [3, 5],
        "user.user_id": [],
    }


def test_another_model_is_refused_by_the_fields_that_differ(tmp_path: Path):
    (tmp_path / "ranker").mkdir()
    (tmp_path / "ranker" / "ranker.json").write_text(json.dumps({"config": {"dim": 16, "widths": [8, 4]}}))
    require_same_model(state(tmp_path, DAYS), "ranker", {"dim": 16, "widths": (8, 4)})
    with pytest.raises(StateError, match="differ from those of bundle v1 in dim"):
        require_same_model(state(tmp_path, DAYS), "ranker", {"dim": 32, "widths": (8, 4)})


def test_an_increment_learns_at_a_share_of_the_full_rates():
    full = TrainConfig(epochs=5, lr_dense=1e-2, lr_sparse=0.2, lr_final=0.1, warmup_steps=50, batch_size=64)
    how = IncrementalConfig(epochs=1, lr_share=0.25).trained_on(full)
    assert (how.epochs, how.lr_dense, how.lr_sparse, how.lr_final, how.warmup_steps) == (1, 0.0025, 0.05, 1.0, 0)
    assert how.batch_size == 64
