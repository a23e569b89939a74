"""A cluster of three machines (three raylets here) that loses one, while it trains and while it ingests."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch
from ray.cluster_utils import Cluster

from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.cluster import LOCAL_SETTINGS, ClusterConfig
from pipelines.ingest import ingest
from pipelines.training.train import train
from pipelines.training.trainer import TrainConfig
from pipelines.world import SCALES, generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = TrainConfig(
    epochs=2,
    batch_size=32,
    warmup_steps=5,
    lr_dense=0.01,
    lr_sparse=0.2,
    num_workers=2,
    threads=1,
    checkpoint_every_steps=4,
)


@pytest.fixture
def three_nodes(monkeypatch) -> Iterator[Cluster]:
    """The first is the driver's; one CPU each, so that two workers lie on two of them and a third is to spare."""
    import ray

    for name, setting in LOCAL_SETTINGS.items():
        monkeypatch.setenv(name, setting)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def kill(nodes: Cluster, node_id: str) -> None:
    """As a machine that loses its power."""
    nodes.remove_node(next(node for node in nodes.worker_nodes if node.node_id == node_id), allow_graceful=False)


class Located:
    """The task, slow enough to be met at work, that writes down on which node each worker lives."""

    def __init__(self, task, folder: Path) -> None:
        self.task, self.folder = task, folder

    def __getattr__(self, name):
        if name in ("task", "folder") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)

    def collate(self, units, **seeds):
        import ray

        (self.folder / ray.get_runtime_context().get_node_id()).touch()
        time.sleep(0.1)
        return self.task.collate(units, **seeds)


def test_a_node_killed_while_training_changes_nothing(three_nodes, toy_task, tmp_path):
    import ray

    for module in (sys.modules[type(toy_task).__module__], sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    where, seen, killed = ClusterConfig(address=three_nodes.address), tmp_path / "seen", []
    seen.mkdir()

    def kill_one(progress):
        away = {node.node_id for node in three_nodes.worker_nodes} & {path.name for path in seen.iterdir()}
        if not killed and progress.steps_done > 5 and away:
            killed.append(progress.steps_done)
            kill(three_nodes, min(away))

    task = Located(toy_task, seen)
    lost = train(lambda: task, (), CONFIG, out_dir=tmp_path / "lost", where=where, on_progress=kill_one)
    assert killed
    assert killed[0] < lost.steps
    assert lost.resumed_from_step > 0
    assert len(three_nodes.worker_nodes) == 1
    whole = train(lambda: toy_task, (), CONFIG, out_dir=tmp_path / "whole", where=where)
    assert [e.validation_loss for e in lost.epochs] == [e.validation_loss for e in whole.epochs]
    left, right = (torch.load(tmp_path / side / "toy.pt", weights_only=True) for side in ("lost", "whole"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_node_killed_while_ingesting_changes_nothing(three_nodes, tmp_path):
    generate(SCALES["tiny"], tmp_path / "raw")
    where, killed = ClusterConfig(address=three_nodes.address), []

    def kill_one(progress):
        if not killed:
            killed.append(progress)
            kill(three_nodes, min(node.node_id for node in three_nodes.worker_nodes))

    lost = ingest(CanonicalAdapter(tmp_path / "raw"), tmp_path / "lost", where=where, on_progress=kill_one)
    assert killed
    assert len(three_nodes.worker_nodes) == 1
    whole = ingest(CanonicalAdapter(tmp_path / "raw"), tmp_path / "whole", where=where)
    assert lost.tables == whole.tables
    for table in ("events", "videos", "users"):
        left, right = (
            ds.dataset(next((tmp_path / side).glob(f"{table}*")), format="parquet").to_table()
            for side in ("lost", "whole")
        )
        assert left.equals(right)
