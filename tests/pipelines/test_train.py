"""Ray Train around the loop: one and two processes, the same recipe; lost workers and errors."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.cluster import ClusterConfig, cluster
from pipelines.training.batches import derived_seed
from pipelines.training.ledger import read_ledger
from pipelines.training.progress import Progress, TrainResult
from pipelines.training.train import Job, TrainingError, train, train_all
from pipelines.training.trainer import TrainConfig, fit
from tests.pipelines.events import curve

CONFIG = TrainConfig(
    epochs=2,
    batch_size=32,
    warmup_steps=5,
    lr_dense=0.01,
    lr_sparse=0.2,
    num_workers=2,
    threads=1,
    checkpoint_every_steps=4,
    ledger=True,
)
"""16 steps an epoch."""


@pytest.fixture(scope="module", autouse=True)
def ray_here(toy_task):
    with cluster(ClusterConfig(cpus=2)):
        import ray

        for module in (sys.modules[type(toy_task).__module__], sys.modules[__name__]):
            ray.cloudpickle.register_pickle_by_value(module)
        yield


@dataclass(frozen=True)
class Wrapped:
    """A task that differs from another in what its subclass says."""

    task: object

    def __getattr__(self, name):
        if name == "task" or name.startswith("__"):  # asked for while unpickling
            raise AttributeError(name)
        return getattr(self.task, name)


@dataclass(frozen=True)
class Deadly(Wrapped):
    """Collating a step that has one of these seeds kills its worker, once each."""

    seeds: frozenset[int]
    done: Path

    def collate(self, units, *, seed, seed_of_all):
        if seed in self.seeds and not (self.done / str(seed)).exists():
            (self.done / str(seed)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.task.collate(units, seed=seed, seed_of_all=seed_of_all)


@dataclass(frozen=True)
class Faulty(Wrapped):
    """Unit 7 cannot be collated."""

    def collate(self, units, *, seed, seed_of_all):
        if 7 in units:
            raise KeyError("unit 7 has no video")
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


@pytest.fixture(scope="module")
def undisturbed(toy_task, tmp_path_factory) -> tuple[Path, TrainResult, list[Progress]]:
    """Two workers whom nothing happens to."""
    out, seen = tmp_path_factory.mktemp("undisturbed"), []
    task = without_dropout(toy_task)
    return out, train(lambda: task, (), CONFIG, out_dir=out, on_progress=seen.append), seen


def test_two_workers_follow_one_process_and_export_the_same_shapes(toy_task, undisturbed, tmp_path):
    task, (folder, two, seen) = without_dropout(toy_task), undisturbed
    one = fit(task, replace(CONFIG, batch_size=64, num_workers=1), out_dir=tmp_path / "one")
    assert (two.workers, two.steps) == (2, one.steps)
    assert {rank for table in two.plan for rank in table.ranks} == {0, 1}, "both workers hold tables"
    for of_one, of_two in zip(one.epochs, two.epochs, strict=True):
        assert of_two.train_loss == pytest.approx(of_one.train_loss, rel=1e-4)
        assert of_two.validation_loss == pytest.approx(of_one.validation_loss, rel=1e-4)
    left, right = (torch.load(side / "toy.pt", weights_only=True) for side in (tmp_path / "one", folder))
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    assert all(torch.allclose(left[name], right[name], atol=1e-3) for name in left)
    told = [p.validation_loss for p in seen if p.validation_loss is not None]
    assert told == [epoch.validation_loss for epoch in two.epochs]
    assert curve(folder / "tensorboard", "validation/loss") == pytest.approx({16: told[0], 32: told[1]}, rel=1e-6), (
        "curves lie beside the model, by default"
    )


def assert_trained_as_if_nothing_had_been(folder: Path, undisturbed_folder: Path, units: np.ndarray) -> None:
    """Parameters and metrics to the bit; each row once an epoch."""
    left, right = (torch.load(side / "toy.pt", weights_only=True) for side in (folder, undisturbed_folder))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    found, expected = (
        [
            (e.train_loss, e.validation_loss, e.metrics)
            for e in TrainResult.from_json((side / "training.json").read_text()).epochs
        ]
        for side in (folder, undisturbed_folder)
    )
    assert found == expected
    lines = list(read_ledger(folder / "ledger"))
    for epoch in range(len(found)):
        taken = np.concatenate([line.units for line in lines if line.epoch == epoch])
        assert np.array_equal(np.sort(taken), units), f"epoch {epoch} reads each row once"


def test_a_worker_killed_inside_an_epoch_changes_nothing(toy_task, undisturbed, tmp_path):
    death = derived_seed(CONFIG.seed, 1, 9, 1)  # the second worker, in the tenth step of the second epoch
    task = Deadly(without_dropout(toy_task), frozenset([death]), tmp_path)
    result = train(lambda: task, (), CONFIG, out_dir=tmp_path / "run")
    assert (tmp_path / str(death)).exists()
    assert 16 < result.resumed_from_step < result.steps, "from inside the epoch"
    assert_trained_as_if_nothing_had_been(tmp_path / "run", undisturbed[0], toy_task.train_units())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_workers_killed_at_ten_random_steps_change_nothing(toy_task, undisturbed, tmp_path):
    rng = np.random.default_rng(20)
    places = [(epoch, step, rank) for epoch in (0, 1) for step in range(16) for rank in (0, 1)]
    chosen = [places[n] for n in rng.choice(len(places), 10, replace=False)]
    deaths = frozenset(derived_seed(CONFIG.seed, *place) for place in chosen)
    task = Deadly(without_dropout(toy_task), deaths, tmp_path)
    train_all([Job(make_task=lambda: task, args=(), config=CONFIG, out_dir=tmp_path / "run")], restarts=10)
    assert {int(path.name) for path in tmp_path.iterdir() if path.is_file()} == deaths
    assert_trained_as_if_nothing_had_been(tmp_path / "run", undisturbed[0], toy_task.train_units())


def test_error_in_the_data_is_told_once_with_its_cause(toy_task, tmp_path):
    task = Faulty(toy_task)
    with pytest.raises(TrainingError, match=r"worker \d failed: KeyError.*unit 7 has no video") as caught:
        train(lambda: task, (), CONFIG, out_dir=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 200


def test_more_workers_than_cpus_is_refused_at_once(toy_task, tmp_path):
    config = replace(CONFIG, num_workers=64)
    with pytest.raises(ValueError, match="num_workers=64 needs 64 CPUs; the cluster has 2"):
        train(lambda: toy_task, (), config, out_dir=tmp_path)
