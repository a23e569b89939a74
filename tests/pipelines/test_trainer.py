"""The training loop on a small real model: learning, exact resumption, refusal of NaN, whole export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from features.dataset import Dataset
from pipelines.training.batches import ahead, training_steps, validation_steps
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.cursor import read_cursor
from pipelines.training.learner import NonFiniteLossError, NonFiniteStateError
from pipelines.training.sharding import plan_table
from pipelines.training.trainer import TrainConfig, fit
from pipelines.training.whole_state import read_unsharded

CONFIG = TrainConfig(epochs=3, batch_size=64, warmup_steps=5, lr_dense=0.01, lr_sparse=0.2, patience=3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "toy.pt", weights_only=True)


def test_one_process_learns(toy_task, tmp_path):
    result = fit(toy_task, CONFIG, out_dir=tmp_path)
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert losses[0] > losses[-1]
    assert losses[-1] < 0.2, "the label is the parity of the video's row, which an embedding can hold"
    assert result.best_validation_loss == min(losses)
    assert result.best_epoch == int(np.argmin(losses))


def test_export_is_the_whole_unsharded_state(toy_task, tmp_path):
    fit(toy_task, replace(CONFIG, epochs=1), out_dir=tmp_path)
    fresh, state = toy_task.build().state_dict(), exported(tmp_path)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in fresh.items()}
    assert all(type(t) is torch.Tensor for t in state.values())


def test_a_checkpoint_in_many_files_holds_the_same_state(toy_task, tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=1)
    fit(toy_task, config, out_dir=tmp_path / "one")
    monkeypatch.setattr("pipelines.training.checkpoint.ONE_FILE_BYTES", 0)
    fit(toy_task, config, out_dir=tmp_path / "many")
    one, many = ({p.name for p in (tmp_path / side).rglob("*.distcp")} for side in ("one", "many"))
    assert len(one) == 1 < len(many)
    left, right = exported(tmp_path / "one"), exported(tmp_path / "many")
    assert all(torch.equal(left[name], right[name]) for name in left)


class InterruptedRunError(Exception):
    pass


@dataclass
class StopsAfter:
    """A task whose data ends in an exception after so many training batches, like a worker that dies."""

    task: object
    batches: int

    def __getattr__(self, name):
        return getattr(self.task, name)

    def collate(self, units, *, seed, seed_of_all):
        self.batches -= 1
        if self.batches < 0:
            raise InterruptedRunError
        return self.task.collate(units, seed=seed, seed_of_all=seed_of_all)


def test_interrupted_and_resumed_run_ends_bit_equal(toy_task, tmp_path):
    config = replace(CONFIG, epochs=2, checkpoint_every_steps=4)
    whole = fit(toy_task, config, out_dir=tmp_path / "whole")
    steps_an_epoch = whole.steps // 2
    with pytest.raises(InterruptedRunError):
        fit(StopsAfter(toy_task, batches=7), config, out_dir=tmp_path / "cut")
    resumed = fit(toy_task, config, out_dir=tmp_path / "cut")
    assert 0 < resumed.resumed_from_step < steps_an_epoch, "inside the first epoch"
    assert [e.validation_loss for e in resumed.epochs] == [e.validation_loss for e in whole.epochs]
    assert [e.train_loss for e in resumed.epochs] == pytest.approx([e.train_loss for e in whole.epochs], abs=1e-12)
    left, right = exported(tmp_path / "whole"), exported(tmp_path / "cut")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_finished_run_resumes_to_its_result_without_training(toy_task, tmp_path):
    first = fit(toy_task, replace(CONFIG, epochs=1), out_dir=tmp_path)
    looked_at = StopsAfter(toy_task, batches=1)  # by the planner
    again = fit(looked_at, replace(CONFIG, epochs=1), out_dir=tmp_path)
    assert (again.steps, again.epochs) == (first.steps, first.epochs)


def test_resuming_another_recipe_is_refused_with_the_cure(toy_task, tmp_path):
    fit(toy_task, replace(CONFIG, epochs=1), out_dir=tmp_path)
    with pytest.raises(ValueError, match="resume=False"):
        fit(toy_task, replace(CONFIG, epochs=1, seed=2), out_dir=tmp_path)


def test_nan_loss_stops_before_any_parameter_moves(toy_task, tmp_path):
    """The bad unit comes in the step after a checkpoint: dying there must leave exactly that checkpoint's state."""
    config = replace(CONFIG, epochs=1, checkpoint_every_steps=1)
    steps = training_steps(
        toy_task.train_units(), seed=config.seed, epoch=0, batch_size=config.batch_size, rank=0, world=1
    )
    bad_unit = int(steps[3].units[10])
    module = {}

    @dataclass
    class Poisoned(StopsAfter):
        def build(self, tables_on):
            module["model"] = self.task.build(tables_on)
            return module["model"]

        def collate(self, units, *, seed, seed_of_all):
            collated = self.task.collate(units, seed=seed, seed_of_all=seed_of_all)
            collated.targets["label_B"][units == bad_unit] = np.nan
            return collated

    with pytest.raises(NonFiniteLossError, match=rf"epoch 0, step 3.*{bad_unit}.*[Nn]o parameter moved"):
        fit(Poisoned(toy_task, 0), config, out_dir=tmp_path)
    last = Checkpoints(tmp_path / "checkpoints").find("last")
    assert last is not None
    assert read_cursor(last).steps_done == 3
    now = {
        f"model/{name}": getattr(t, "local_tensor", lambda t=t: t)() for name, t in module["model"].state_dict().items()
    }
    stored = read_unsharded(last, now, {}, tmp_path / "scratch")
    assert sum("ebc" in name for name in now) == 5
    assert all(torch.equal(stored[name], now[name]) for name in now)


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_checkpoint_before_intact(toy_task, tmp_path):
    class Steep(type(toy_task)):
        """Adds a root at 0 to the loss, which is 0, and whose slope is infinite."""

        def build(self, tables_on=None):
            module = super().build(tables_on)

            class SteepModel(type(module)):
                def forward(self, batch, targets):
                    scalars = super().forward(batch, targets)
                    return {**scalars, "loss": scalars["loss"] + (self.video.bias.sum() * 0).sqrt()}

            module.__class__ = SteepModel
            return module

    fit(toy_task, replace(CONFIG, epochs=1), out_dir=tmp_path)
    with pytest.raises(NonFiniteStateError, match=r"epoch 1, step 0: the gradient.*norm nan.*start over"):
        fit(Steep(toy_task.folder), replace(CONFIG, epochs=2), out_dir=tmp_path)
    last = Checkpoints(tmp_path / "checkpoints").find("last")
    assert last is not None
    assert (read_cursor(last).epoch, len(read_cursor(last).epochs)) == (1, 1)
    assert fit(toy_task, replace(CONFIG, epochs=2), out_dir=tmp_path).best_validation_loss < 0.5


def test_early_stopping_keeps_the_best_epoch(toy_task, tmp_path):
    config = replace(CONFIG, epochs=50, patience=1, lr_dense=0.3, lr_sparse=3.0)
    result = fit(toy_task, config, out_dir=tmp_path)
    losses = [e.validation_loss for e in result.epochs]
    assert len(losses) < 50
    assert result.best_epoch == len(losses) - 2 == int(np.argmin(losses))


def test_plan_lists_every_table(toy_task, tmp_path):
    result = fit(toy_task, replace(CONFIG, epochs=1), out_dir=tmp_path)
    text = plan_table(result.plan)
    module = toy_task.build()
    names = [c.name for ebc in (module.user_ebc, module.video_ebc) for c in ebc.embedding_bag_configs()]
    assert len(names) == len(result.plan) == len(text.splitlines()) - 1
    assert all(name in text for name in names)


def test_workers_share_out_the_same_global_batches():
    units = np.arange(1000, 1103)
    one = training_steps(units, seed=1, epoch=0, batch_size=20, rank=0, world=1)
    two = [training_steps(units, seed=1, epoch=0, batch_size=10, rank=r, world=2) for r in (0, 1)]
    assert [len(step.units) for step in one] == [20, 20, 20, 20, 20, 3]
    assert [len(step.units) for step in two[0]] == [10, 10, 10, 10, 10, 1] == [len(step.units) for step in two[1]]
    for whole, left, right in list(zip(one, *two, strict=True))[:-1]:
        assert np.array_equal(whole.units, np.concatenate([left.units, right.units]))
        assert whole.share == left.share == right.share == 1
    assert (one[-1].share, two[0][-1].share) == (3 / 20, 2 / 20), "a unit weighs in the last step as in all others"


def test_an_epoch_takes_every_unit_once_whatever_is_left_for_the_last_step():
    units = np.arange(1000, 1103)
    taken = np.concatenate([s.units for s in training_steps(units, seed=1, epoch=3, batch_size=20, rank=0, world=1)])
    assert np.array_equal(np.sort(taken), units)
    left_out = []
    for epoch in (0, 1):
        both = [training_steps(units, seed=1, epoch=epoch, batch_size=10, rank=r, world=2) for r in (0, 1)]
        taken = np.concatenate([step.units for share in both for step in share])
        assert len(taken) == len(set(taken)) == 102, "two workers take equally many"
        left_out += set(units) - set(taken)
    assert left_out[0] != left_out[1]


def test_validation_takes_every_unit_once():
    units = np.arange(50)
    shares = [validation_steps(units, seed=1, batch_size=8, rank=r, world=2) for r in (0, 1)]
    taken = np.concatenate([s.units for share in shares for s in share])
    assert np.array_equal(np.sort(taken), units)
    assert [len(s.units) for s in shares[0]] == [8, 8, 8, 1] == [len(s.units) for s in shares[1]]


def test_collation_ahead_keeps_order_and_raises_where_it_failed():
    assert list(ahead(lambda i: i * i, range(5), depth=2)) == [(i, i * i) for i in range(5)]
    made = ahead(lambda i: 1 // (2 - i), range(5), depth=2)
    assert next(made) == (0, 0)
    assert next(made) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_dataset_fixture_is_memory_mapped(toy_task):
    assert isinstance(Dataset.load(toy_task.folder).examples.ts_ms.base, np.memmap)
