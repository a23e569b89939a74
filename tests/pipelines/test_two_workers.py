"""The world's ranker, dropout and all, on one worker and on two: the same model, also with tables split by rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from features.dataset import Dataset
from pipelines.metrics import normalised_entropy
from pipelines.recipes import Recipe, Split, recipe
from pipelines.stages import _ranker_task
from pipelines.training.trainer import TrainConfig, fit
from pipelines.world import SCALES, generate
from ranking.config import RankerConfig
from ranking.infer import Ranker
from ranking.loss import task_losses
from ranking.tasks import TASKS, task_labels
from tests.pipelines.gloo import fit_in_two

CONFIG = TrainConfig(epochs=2, batch_size=256, lr_dense=3e-3, warmup_steps=10)
ROWS_A_PART = 1000
"""Splits user_id (4,096 rows) and video_id (4,096) into five and author_id (1,024) into two."""


@dataclass(frozen=True)
class World:
    recipe: Recipe
    folder: Path
    split: Split

    @property
    def arguments(self) -> tuple:
        return self.folder, self.recipe.ranker, self.split.train[-1:], self.split.validation


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root, chosen = tmp_path_factory.mktemp("tiny"), recipe("world-tiny")
    generate(SCALES["tiny"], root / "raw")
    days = {path.parent.name.removeprefix("date="): pq.read_table(path) for path in sorted(root.glob("raw/events/*/*"))}
    split = chosen.split.resolve(tuple(days))
    events = [table.append_column("date", pa.array([date] * len(table))) for date, table in days.items()]
    users, videos = (pq.read_table(root / "raw" / f"{name}.parquet") for name in ("users", "videos"))
    dataset = Dataset.build(
        chosen.spec,
        users=users,
        videos=videos,
        events=pa.concat_tables(events),
        undated=None,
        train_dates=split.train,
    )
    dataset.save(root / "dataset")
    return World(chosen, root / "dataset", split)


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by one worker."""
    folder = tmp_path_factory.mktemp("alone")
    fit(_ranker_task(*world.arguments), CONFIG, out_dir=folder)
    return folder


def entropies(world: World, folder: Path) -> np.ndarray:
    """Normalised entropy of each task on the validation day, before calibration."""
    dataset, ranker = Dataset.load(world.folder), Ranker.load(folder)
    rows = dataset.rows_on(world.split.validation)
    logits_NT, _ = ranker.logits(dataset.inputs(rows, with_slot=False))
    labels_NT = task_labels(dataset.examples.take(rows))
    columns = [TASKS.index(task) for task in ranker.tasks]
    return np.array(
        [
            normalised_entropy(labels_NT[:, column], 1 / (1 + np.exp(-logits_NT[:, t].astype(np.float64))))
            for t, column in enumerate(columns)
        ]
    )


def test_normalised_entropy_of_the_best_constant_is_one(world):
    """Cross-entropy of always saying the rate of positives is the entropy of that rate, logged or not."""
    task, dataset = _ranker_task(*world.arguments), Dataset.load(world.folder)
    labels_NT = torch.from_numpy(task_labels(dataset.examples.take(task.validation_units())))
    labels_NT = labels_NT[:, [TASKS.index(name) for name in task.tasks]]
    rate_T = labels_NT.nanmean(0)
    losses_T = task_losses(torch.logit(rate_T).expand_as(labels_NT), labels_NT, torch.ones(len(labels_NT)))
    both_kinds = [t for t, rate in enumerate(rate_T) if 0 < rate < 1]
    assert len(both_kinds) > 3
    found = task.metrics({f"loss_{name}": float(losses_T[t]) for t, name in enumerate(task.tasks)})
    for t in both_kinds:
        assert found[f"normalised_entropy_{task.tasks[t]}"] == pytest.approx(1, abs=1e-4)
    assert found["normalised_entropy"] == pytest.approx(1, abs=1e-4)


def test_two_workers_and_one_give_the_same_ranker(world, alone, tmp_path):
    assert world.recipe.ranker.dropout > 0
    assert world.recipe.ranker.embedding_dropout > 0
    assert world.recipe.ranker.side_dropout > 0
    assert world.recipe.ranker.id_dropout > 0
    shared = fit_in_two(_ranker_task, world.arguments, replace(CONFIG, batch_size=128, num_workers=2), tmp_path / "two")
    assert {rank for table in shared.plan for rank in table.ranks} == {0, 1}
    difference = np.abs(entropies(world, tmp_path / "two") - entropies(world, alone))
    assert difference.max() < 1e-4, difference


def test_tables_split_by_rows_over_two_workers_learn_the_unsplit_model(world, alone, tmp_path):
    config = replace(CONFIG, batch_size=128, num_workers=2, rows_a_part=ROWS_A_PART)
    split = fit_in_two(_ranker_task, world.arguments, config, tmp_path / "split")
    parts = [t for t in split.plan if "video_id@" in t.table]
    assert [t.rows for t in parts] == [1000, 1000, 1000, 1000, 96]
    assert {rank for t in parts for rank in t.ranks} == {0, 1}
    left, right = (load_file(folder / "ranker.safetensors") for folder in (alone, tmp_path / "split"))
    assert {name: t.shape for name, t in left.items()} == {name: t.shape for name, t in right.items()}
    difference = np.abs(entropies(world, tmp_path / "split") - entropies(world, alone))
    assert difference.max() < 1e-4, difference


def test_a_split_table_starts_and_moves_as_the_unsplit_one(world, tmp_path):
    """One step, one worker: first values are drawn by row, and each row moves as it does in one table."""
    task = _ranker_task(*world.arguments)
    few = replace(CONFIG, batch_size=len(task.train_units()), warmup_steps=1)
    states = []
    for name, rows_a_part in (("whole", None), ("parts", ROWS_A_PART)):
        fit(task, replace(few, rows_a_part=rows_a_part), out_dir=tmp_path / name)
        states.append(load_file(tmp_path / name / "ranker.safetensors"))
    whole, parts = states
    for name in (n for n in whole if "embedding_bags" in n):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_fp16_tables_are_stored_and_scored_as_fp16(world, tmp_path):
    folder, _, train, validation = world.arguments
    task = _ranker_task(folder, RankerConfig(half_tables=True), train, validation)
    result = fit(task, CONFIG, out_dir=tmp_path)
    state = load_file(tmp_path / "ranker.safetensors")
    assert {t.dtype for name, t in state.items() if "embedding_bags" in name} == {torch.float16}
    table = next(t for t in result.plan if t.table == "video_ebc.video_id")
    assert table.mib == pytest.approx(4096 * (16 * 2 + 4) / 2**20)
    assert np.isfinite(entropies(world, tmp_path)).all()
