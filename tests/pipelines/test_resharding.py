"""A checkpoint is read by another number of workers: two, then one, then two, the same command each time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from pipelines.training.checkpoint import Checkpoints
from pipelines.training.cursor import read_cursor
from pipelines.training.trainer import Run, Task, TrainConfig, TrainResult, fit
from pipelines.training.whole_state import read_unsharded
from pipelines.training.workers import process_group
from tests.pipelines.gloo import fit_in_two, in_two

TWO = TrainConfig(epochs=1, batch_size=32, warmup_steps=5, lr_dense=0.01, lr_sparse=0.2, num_workers=2)
ONE = replace(TWO, batch_size=64, num_workers=1)


def evaluate_resumed(task: Task, config: TrainConfig, out_dir: Path) -> None:
    """By every worker: go on from out_dir's last checkpoint, validate, and save what was loaded once more, beside."""
    with process_group(), Checkpoints(out_dir / "checkpoints") as read, Checkpoints(out_dir / "again") as again:
        run = Run(task, config, out_dir, read, lambda _: None)
        run.resume()
        again.save(run.learner.tensors(), run.cursor)
        validation = run.validate()
    if run.rank == 0:
        (out_dir / "validation.json").write_text(json.dumps(validation))


def evaluate_and_go_on(task: Task, looked_at: Path, out_dir: Path) -> None:
    """By two workers: what one had trained, and another epoch."""
    evaluate_resumed(task, TWO, looked_at)
    fit(task, replace(TWO, epochs=3), out_dir=out_dir)


def state(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole: tables by row, accumulators, dense parameters, Adam's moments."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    like = {name: torch.empty(of.size, dtype=of.properties.dtype, device="meta") for name, of in stored.items()}
    return read_unsharded(checkpoint, like, {}, scratch)


def assert_same_model(task: Task, out_dir: Path) -> None:
    last, again = Checkpoints(out_dir / "checkpoints").find("last"), Checkpoints(out_dir / "again").find("last")
    assert last is not None
    assert again is not None
    written, loaded = state(last, out_dir / "written"), state(again, out_dir / "loaded")
    assert written.keys() == loaded.keys()
    tables = [name for name in written if "ebc" in name and name.startswith("model/")]
    assert len(tables) == 5
    assert {f"model/{name}" for name in task.build(torch.device("meta")).state_dict()} <= written.keys()
    assert any(name.startswith("fused/") for name in written)
    assert all(torch.equal(written[name], loaded[name]) for name in written), "every row of every table, by id"
    found = json.loads((out_dir / "validation.json").read_text())
    closed = read_cursor(last).epochs[-1]
    assert found.pop("loss") == pytest.approx(closed.validation_loss, abs=1e-5)
    assert found == pytest.approx(closed.metrics, abs=1e-5)


def test_saved_on_two_read_by_one_and_the_reverse(toy_task, tmp_path):
    fit_in_two(type(toy_task), (toy_task.folder,), TWO, tmp_path / "run")
    evaluate_resumed(toy_task, ONE, tmp_path / "run")
    assert_same_model(toy_task, tmp_path / "run")

    alone = fit(toy_task, replace(ONE, epochs=2), out_dir=tmp_path / "run")
    assert (alone.workers, len(alone.epochs)) == (1, 2)
    shutil.copytree(tmp_path / "run", tmp_path / "looked-at")
    in_two(partial(evaluate_and_go_on, toy_task, tmp_path / "looked-at", tmp_path / "run"), tmp_path / "meet")
    assert_same_model(toy_task, tmp_path / "looked-at")
    both = TrainResult.from_json((tmp_path / "run" / "training.json").read_text())
    assert (both.workers, len(both.epochs), both.resumed_from_step) == (2, 3, alone.steps)
    assert both.epochs[2].validation_loss < both.epochs[0].validation_loss
