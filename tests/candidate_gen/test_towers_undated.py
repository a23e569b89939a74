"""Positives that precede the log: targets like others, that see what stood before them and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from candidate_gen.train import TowersTask
from features.batch import to_batch
from features.dataset import Dataset
from features.history import UNDATED_TS_MS
from tests.candidate_gen.conftest import CONFIG, DATES, DAY_MS, START_MS, USERS, VIDEOS_N, dataset_of

BEFORE, AFTER = 9, 6


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Every user has 9 undated events, then 6 dated ones; half of all are long views."""
    rng = np.random.default_rng(8)
    user, position = np.repeat(np.arange(USERS), BEFORE), np.tile(np.arange(BEFORE), USERS)
    undated = (user, rng.integers(0, VIDEOS_N, len(user)), position, rng.random(len(user)) < 0.5)
    user = np.repeat(np.arange(USERS), AFTER)
    ts_ms = START_MS + np.sort(rng.integers(0, 4 * DAY_MS, (USERS, AFTER)), axis=1).ravel()
    return dataset_of(
        content=rng.normal(size=(VIDEOS_N, 8)),
        upload_ts_ms=np.full(VIDEOS_N, START_MS - DAY_MS),
        events=(user, rng.integers(0, VIDEOS_N, len(user)), ts_ms, rng.random(len(user)) < 0.5),
        undated=undated,
    )


def vectors(task: TowersTask) -> np.ndarray:
    """Of every training target by untrained towers, and their losses are finite."""
    torch.manual_seed(4)
    model, collated = task.build().eval(), task.collate(task.train_units(), seed=0)
    batch, t = to_batch(collated.inputs), {name: torch.from_numpy(a) for name, a in collated.targets.items()}
    with torch.inference_mode():
        assert np.isfinite(float(model(batch, t)["loss"]))
        videos = model.encode_videos(batch.video, batch.video_dense_UD)
        return model.encode_users(batch, videos, batch.owner_N, t["position_N"], t["surface_N"]).numpy()


@pytest.mark.parametrize("exact", [0, VIDEOS_N])
def test_all_of_them_are_targets_and_see_the_events_before_them(dataset: Dataset, exact: int) -> None:
    task = TowersTask(dataset, replace(CONFIG, full_softmax_up_to=exact), DATES[:3], DATES[3:])
    t, log = task._train.targets, dataset.history
    before = t.day == -1
    undated = np.asarray(log.ts_ms) == UNDATED_TS_MS
    assert undated.sum() == USERS * BEFORE
    assert before.sum() == (undated & (np.asarray(log.signals) > 0)).sum()
    assert (task._validation.targets.day == 3).all()
    assert np.array_equal(log.video_row[t.history_end[before]], t.video_row[before])
    owner = np.searchsorted(log.user_start, np.arange(len(log.ts_ms)), side="right") - 1
    later = np.arange(len(log.ts_ms)) - log.user_start[owner] >= 4
    changed = replace(log, video_row=np.where(later, 1 + (log.video_row * 7) % VIDEOS_N, log.video_row))
    other = TowersTask(replace(dataset, history=changed), task.config, DATES[:3], DATES[3:])
    sees_4 = t.history_end - log.user_start[t.user_row] <= 4
    here, there = vectors(task), vectors(other)
    assert before[sees_4].all()
    assert np.allclose(here[sees_4], there[sees_4], atol=1e-6)
    assert not np.allclose(here[~sees_4], there[~sees_4], atol=1e-3)
