"""Training that goes on from another run: the same state, other days, and rows that change hands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.trainer import TrainConfig, fit
from pipelines.training.warm_start import WarmStart

CONFIG = TrainConfig(epochs=1, batch_size=64, warmup_steps=5, lr_dense=0.01, lr_sparse=0.2)
VIDEO_IDS = "video_ebc.embedding_bags.video_id.weight"


def exported(folder):
    return torch.load(folder / "toy.pt", weights_only=True)


@pytest.fixture(scope="module")
def earlier(toy_task, tmp_path_factory):
    """(folder of a trained run, its checkpoint)"""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("earlier")
    fit(toy_task, CONFIG, out_dir=folder)
    return folder, Checkpoints(folder / "checkpoints").find("best")


def test_a_run_begins_where_the_earlier_one_ended(toy_task, earlier, tmp_path):
    """With learning rates of zero nothing moves, so that what is exported is what was begun with."""
    folder, checkpoint = earlier
    still = replace(CONFIG, lr_dense=0.0, lr_sparse=0.0, seed=5)
    fit(toy_task, still, out_dir=tmp_path, start=WarmStart(checkpoint=checkpoint))
    before, after = exported(folder), exported(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rows_a_part", [None, 13])
def test_rows_that_change_hands_begin_as_the_unknown_id(toy_task, tmp_path, rows_a_part):
    config = replace(CONFIG, rows_a_part=rows_a_part)
    fit(toy_task, config, out_dir=tmp_path / "earlier")
    checkpoint = Checkpoints(tmp_path / "earlier" / "checkpoints").find("best")
    renewed = np.array([3, 14, 40])
    still = replace(config, lr_dense=0.0, lr_sparse=0.0)
    start = WarmStart(checkpoint=checkpoint, renewed={"video.video_id": renewed, "video.not_read": renewed})
    fit(toy_task, still, out_dir=tmp_path / "later", start=start)
    before, after = exported(tmp_path / "earlier")[VIDEO_IDS], exported(tmp_path / "later")[VIDEO_IDS]
    assert torch.equal(after[renewed], before[:1].expand(len(renewed), -1))
    others = np.setdiff1d(np.arange(len(before)), renewed)
    assert torch.equal(after[others], before[others])
    assert not torch.equal(before[renewed], before[:1].expand(len(renewed), -1)), "or nothing was shown"


def test_renewed_rows_have_no_gradient_history(toy_task, earlier, tmp_path):
    """A row's first step under Adagrad is lr x g / |g| whatever its gradient: only an accumulator of 0 allows that."""
    _, checkpoint = earlier
    moved = {}
    for name, renewed in (("kept", {}), ("renewed", {"video.video_id": np.arange(81)})):
        config = replace(CONFIG, lr_dense=0.0, lr_sparse=1e-3, warmup_steps=1)
        fit(toy_task, config, out_dir=tmp_path / name, start=WarmStart(checkpoint=checkpoint, renewed=renewed))
        begun = fit_still(toy_task, tmp_path / f"{name}-begun", WarmStart(checkpoint=checkpoint, renewed=renewed))
        moved[name] = float((exported(tmp_path / name)[VIDEO_IDS] - begun[VIDEO_IDS]).abs().mean())
    assert moved["renewed"] > 2 * moved["kept"]


def fit_still(task, folder, start):
    fit(task, replace(CONFIG, lr_dense=0.0, lr_sparse=0.0), out_dir=folder, start=start)
    return exported(folder)


def test_a_warm_run_that_was_cut_resumes_from_its_own_checkpoint(toy_task, earlier, tmp_path):
    _, checkpoint = earlier
    config, start = replace(CONFIG, epochs=2, patience=2, seed=3), WarmStart(checkpoint=checkpoint)
    fit(toy_task, config, out_dir=tmp_path / "whole", start=start)
    fit(toy_task, replace(config, epochs=1), out_dir=tmp_path / "cut", start=start)
    resumed = fit(toy_task, config, out_dir=tmp_path / "cut", start=start)
    assert resumed.resumed_from_step > 0
    whole, cut = exported(tmp_path / "whole"), exported(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
