"""Ray Train around the loop: one and two processes, the same recipe; lost workers and errors."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pipelines.cluster import ClusterConfig, cluster
from pipelines.train import TrainingError, train
from pipelines.trainer import TrainConfig, fit

CONFIG = TrainConfig(epochs=2, batch_size=32, warmup_steps=5, lr_dense=0.01, lr_sparse=0.2, num_workers=2, threads=1)


@pytest.fixture(scope="module", autouse=True)
def ray_here(toy_task):
    with cluster(ClusterConfig(cpus=2)):
        import ray

        for module in (sys.modules[type(toy_task).__module__], sys.modules[__name__]):
            ray.cloudpickle.register_pickle_by_value(module)
        yield


@dataclass(frozen=True)
class TaskWithFate:
    """The toy task, but collating `unit` ends the worker once (`how="die"`) or raises (`how="raise"`)."""

    task: object
    unit: int
    how: str
    done: Path

    def __getattr__(self, name):
        if name == "task" or name.startswith("__"):  # asked for while unpickling
            raise AttributeError(name)
        return getattr(self.task, name)

    def collate(self, units, *, seed, seed_of_all):
        if self.unit in units:
            if self.how == "raise":
                raise KeyError(f"unit {self.unit} has no video")
            if not self.done.exists():
                self.done.write_text("once")
                os.kill(os.getpid(), signal.SIGKILL)
        return self.task.collate(units, seed=seed, seed_of_all=seed_of_all)


def without_dropout(task):
    """Dropout masks depend on the worker; without them two workers must follow one process closely."""
    build = type(task).build

    class NoDropout(type(task)):
        def build(self, tables_on):
            module = build(self, tables_on)
            for part in module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
            return module

    return NoDropout(task.folder)


def test_two_workers_follow_one_process_and_export_the_same_shapes(toy_task, tmp_path):
    task, seen = without_dropout(toy_task), []
    one = fit(task, replace(CONFIG, batch_size=64, num_workers=1), out_dir=tmp_path / "one")
    two = train(lambda: task, (), CONFIG, out_dir=tmp_path / "two", on_progress=seen.append)
    assert (two.workers, two.steps) == (2, one.steps)
    assert {rank for table in two.plan for rank in table.ranks} == {0, 1}, "both workers hold tables"
    for of_one, of_two in zip(one.epochs, two.epochs, strict=True):
        assert of_two.train_loss == pytest.approx(of_one.train_loss, rel=1e-4)
        assert of_two.validation_loss == pytest.approx(of_one.validation_loss, rel=1e-4)
    left, right = (torch.load(tmp_path / side / "toy.pt", weights_only=True) for side in ("one", "two"))
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    assert all(torch.allclose(left[name], right[name], atol=1e-3) for name in left)
    told = [p.validation_loss for p in seen if p.validation_loss is not None]
    assert told == [epoch.validation_loss for epoch in two.epochs]

    # the two workers' checkpoint is read by one: the last epoch's state goes on, tables and accumulators resharded
    more = fit(task, replace(CONFIG, epochs=3, batch_size=64, num_workers=1), out_dir=tmp_path / "two")
    straight = fit(task, replace(CONFIG, epochs=3, batch_size=64, num_workers=1), out_dir=tmp_path / "one")
    assert (more.resumed_from_step, more.workers, len(more.epochs)) == (two.steps, 1, 3)
    assert more.epochs[2].validation_loss == pytest.approx(straight.epochs[2].validation_loss, rel=1e-3)


def test_killed_worker_is_replaced_and_the_run_goes_on_from_its_checkpoint(toy_task, tmp_path):
    config = replace(CONFIG, epochs=1, checkpoint_every_steps=2)
    first_validated = int(toy_task.validation_units()[0])  # met after all training steps of the epoch
    task = TaskWithFate(toy_task, first_validated, "die", tmp_path / "done")
    result = train(lambda: task, (), config, out_dir=tmp_path / "run")
    assert (tmp_path / "done").exists()
    assert 0 < result.resumed_from_step < result.steps
    assert result.epochs[0].validation_loss < 0.4, "the steps before the loss count: untrained is 0.69"


def test_error_in_the_data_is_told_once_with_its_cause(toy_task, tmp_path):
    task = TaskWithFate(toy_task, 7, "raise", tmp_path / "done")
    with pytest.raises(TrainingError, match=r"worker \d failed: KeyError.*unit 7 has no video") as caught:
        train(lambda: task, (), CONFIG, out_dir=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 200


def test_more_workers_than_cpus_is_refused_at_once(toy_task, tmp_path):
    config = replace(CONFIG, num_workers=64)
    with pytest.raises(ValueError, match="num_workers=64 needs 64 CPUs; the cluster has 2"):
        train(lambda: toy_task, (), config, out_dir=tmp_path)
