"""Checkpoints: written while training goes on, kept as asked, never half there, and loud when a disk refuses them."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.training import checkpoint as checkpoint_module
from pipelines.training.checkpoint import CheckpointError, Checkpoints
from pipelines.training.cursor import Cursor, EpochReport, read_cursor
from pipelines.training.learner import NonFiniteStateError
from pipelines.training.ledger import read_ledger
from pipelines.training.snapshot import Snapshot
from pipelines.training.trainer import TrainConfig, fit
from pipelines.training.whole_state import read_unsharded
from pipelines.training.workers import process_group

CONFIG = TrainConfig(
    epochs=2, batch_size=64, warmup_steps=5, lr_dense=0.01, lr_sparse=0.2, checkpoint_every_steps=4, patience=3
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def closed(epoch: int, validation_loss: float) -> Cursor:
    """A run that has just closed an epoch."""
    report = EpochReport(
        epoch=epoch,
        train_loss=1.0,
        validation_loss=validation_loss,
        metrics={},
        samples_per_s=1.0,
        input_wait_share=0.0,
        checkpoint_wait_share=0.0,
    )
    return Cursor(recipe={}, epoch=epoch + 1, steps_done=10 * (epoch + 1), epochs=(report,))


def number(value: float, size: int = 4) -> dict[str, torch.Tensor]:
    return {"x": torch.full((size,), value)}


def read(path: Path | None, scratch: Path, size: int = 4) -> float:
    assert path is not None
    return float(read_unsharded(path, number(0.0, size), {}, scratch)["x"][0])


def test_the_k_best_and_the_last_are_kept_and_nothing_else(tmp_path):
    losses = [0.5, 0.3, 0.4, 0.9, 0.3, 0.8]
    with process_group(), Checkpoints(tmp_path, keep_best=2) as checkpoints:
        for epoch, loss in enumerate(losses):
            checkpoints.save(number(loss), closed(epoch, loss))
        checkpoints.wait()
        kept = checkpoints.kept()
        assert kept is not None
        assert [loss for _, loss in kept.best] == [0.3, 0.3]
        assert kept.best[0][0] == "step-000000020-end", (
            "of equals the earlier one, as the trainer counts its best epoch"
        )
        assert sorted(p.name for p in tmp_path.glob("step-*")) == sorted({kept.last, *(name for name, _ in kept.best)})
        assert read(checkpoints.find("best"), tmp_path / "s") == np.float32(0.3)
        assert read(checkpoints.find("last"), tmp_path / "s") == np.float32(0.8)
        assert not list(tmp_path.glob(".*partial"))


def test_a_background_checkpoint_holds_the_state_of_its_moment(tmp_path, monkeypatch):
    """The writer is held up until training has moved on; what it writes then is still the state it was given."""
    moved, write = threading.Event(), checkpoint_module.save

    def held_up(*args, **kwargs):
        assert moved.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint_module, "save", held_up)
    tensors = number(1.0)
    with process_group(), Checkpoints(tmp_path, background=True) as checkpoints:
        checkpoints.save(tensors, closed(0, 1.0))
        assert checkpoints.find("last") is None, "save returns before anything is written"
        tensors["x"].fill_(2.0)
        moved.set()
        checkpoints.wait()
        assert read(checkpoints.find("last"), tmp_path / "s") == 1.0


def test_background_and_waiting_runs_write_the_same(toy_task, tmp_path):
    for name, background in (("background", True), ("waiting", False)):
        config = replace(CONFIG, epochs=1, background_checkpoints=background)
        fit(toy_task, config, out_dir=tmp_path / name)
    left, right = (torch.load(tmp_path / name / "toy.pt", weights_only=True) for name in ("background", "waiting"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_snapshot_takes_the_state_once_more_and_no_more(tmp_path):
    with process_group():
        snapshot, tensors = Snapshot(), number(1.0, size=1000)
        first = snapshot.take(tensors)["x"]
        second = snapshot.take(number(3.0, size=1000))["x"]
        assert first.data_ptr() == second.data_ptr() != tensors["x"].data_ptr()
        assert float(second[0]) == 3.0


class CrashError(BaseException):
    """Stands for a SIGKILL at one operation: nothing after it happens."""


@pytest.mark.parametrize("operation", ["mkdir", "save", "fsync", "rename", "replace"])
def test_a_crash_at_any_operation_leaves_the_last_checkpoint(tmp_path, monkeypatch, operation):
    def crash(*_args, **_kwargs):
        raise CrashError

    with process_group(), Checkpoints(tmp_path, background=False) as checkpoints:
        checkpoints.save(number(1.0), closed(0, 0.5))
        owner = {"save": checkpoint_module, "fsync": os, "replace": os, "mkdir": Path, "rename": Path}[operation]
        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, crash)
            with pytest.raises(BaseException):  # noqa: B017, PT011 (torch wraps it)
                checkpoints.save(number(2.0), closed(1, 0.4))
        assert read(checkpoints.find("last"), tmp_path / "s") == 1.0
        assert read_cursor(checkpoints.find("last") or tmp_path).steps_done == 10
        checkpoints.save(number(3.0), closed(1, 0.4))
        assert read(checkpoints.find("last"), tmp_path / "s") == 3.0
        assert len(list(tmp_path.glob("step-*"))) == 1, "what the crash left is gone"
        assert not list(tmp_path.glob(".*partial"))


def test_numbers_that_are_not_finite_are_never_checkpointed(tmp_path):
    with process_group(), Checkpoints(tmp_path, background=True) as checkpoints:
        checkpoints.save(number(1.0), closed(0, 0.5))
        checkpoints.save({"x": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, closed(1, 0.4))
        with pytest.raises(NonFiniteStateError, match=r"x \(1 tensors\) hold NaN.*not checkpointed"):
            checkpoints.wait()
        assert read(checkpoints.find("last"), tmp_path / "s") == 1.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Eight mebibytes of memory mounted as a disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_training_with_the_checkpoint_before_intact(toy_task, small_disk):
    """The disk fills up after the first checkpoint; with room again the same call ends as if nothing had been."""
    ballast = small_disk / "ballast"
    written: list[str] = []

    def fill(progress):
        last = Checkpoints(small_disk / "run" / "checkpoints").find("last")
        if progress.epoch == 0 and progress.validation_loss is not None and last is not None:
            written.append(last.name)
            with suppress(OSError), ballast.open("wb", buffering=0) as out:
                while out.write(bytes(1 << 12)):
                    pass

    config = replace(CONFIG, checkpoint_every_steps=None, background_checkpoints=False)
    with pytest.raises(
        CheckpointError, match=r"checkpoint step-000000032-end could not be written to .*disk/run.*free"
    ):
        fit(toy_task, config, out_dir=small_disk / "run", on_progress=fill)
    checkpoints = Checkpoints(small_disk / "run" / "checkpoints")
    last = checkpoints.find("last")
    assert last is not None
    assert [last.name] == written
    assert not list(checkpoints.folder.glob(".*partial")), "what did not fit is removed"
    ballast.unlink()
    resumed = fit(toy_task, config, out_dir=small_disk / "run")
    assert resumed.resumed_from_step == 16
    undisturbed = fit(toy_task, config, out_dir=small_disk / "other")
    assert [e.validation_loss for e in resumed.epochs] == [e.validation_loss for e in undisturbed.epochs]


def test_a_background_write_that_fails_ends_the_run_not_in_silence(toy_task, small_disk):
    """Read-only after the first checkpoint: only the writer's thread meets it, and training must not go on for long."""
    epochs = []

    def lock(progress):
        if progress.validation_loss is not None:
            epochs.append(progress.epoch)
        if epochs == [0]:
            for _ in range(600):
                if (small_disk / "run" / "checkpoints" / "kept.json").exists():
                    break
                time.sleep(0.1)
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    config = replace(CONFIG, epochs=50, checkpoint_every_steps=None, background_checkpoints=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*step-000000016-end, is intact"):
        fit(toy_task, config, out_dir=small_disk / "run", on_progress=lock)
    assert len(epochs) <= 3, "found when the next step or checkpoint comes"
    last = Checkpoints(small_disk / "run" / "checkpoints").find("last")
    assert last is not None
    assert read_cursor(last).steps_done == 16


def test_the_ledger_counts_each_row_once_an_epoch_also_after_a_crash(toy_task, tmp_path):
    class Crashes(type(toy_task)):
        batches = 0

        def collate(self, units, **seeds):
            Crashes.batches += 1
            if Crashes.batches == 12:
                raise CrashError
            return super().collate(units, **seeds)

    config = replace(CONFIG, ledger=True)
    with pytest.raises(CrashError):
        fit(Crashes(toy_task.folder), config, out_dir=tmp_path)
    before = [line.position for line in read_ledger(tmp_path / "ledger")]
    result = fit(toy_task, config, out_dir=tmp_path)
    assert max(before) >= result.resumed_from_step, "steps that the checkpoint does not hold were written down, and cut"
    lines = list(read_ledger(tmp_path / "ledger"))
    assert [line.position for line in lines] == list(range(result.steps))
    for epoch in (0, 1):
        taken = np.concatenate([line.units for line in lines if line.epoch == epoch])
        assert np.array_equal(np.sort(taken), toy_task.train_units())
