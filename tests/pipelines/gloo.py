"""Real processes that train one model over gloo; started by `multiprocessing`, so without Ray's seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.training.trainer import Task, TrainConfig, TrainResult, fit


def fit_in_two(make_task: Callable[..., Task], args: tuple, config: TrainConfig, out_dir: Path) -> TrainResult:
    """`fit` by two workers of one thread each; `make_task` must be importable."""
    out_dir.mkdir(parents=True, exist_ok=True)
    in_two(partial(_fit, make_task, args, config, out_dir), out_dir / "rendezvous")
    return TrainResult.from_json((out_dir / "training.json").read_text())


def in_two(work: Callable[[], None], rendezvous: Path) -> None:
    """`work`, which must be importable, by two workers of one group, of one thread each."""
    rendezvous.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, work, rendezvous), daemon=True) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(280)
    assert [worker.exitcode for worker in workers] == [0, 0]


def _work(rank: int, work: Callable[[], None], rendezvous: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(rendezvous), 2), rank=rank, world_size=2)
    try:
        work()
    finally:
        dist.destroy_process_group()


def _fit(make_task: Callable[..., Task], args: tuple, config: TrainConfig, out_dir: Path) -> None:
    fit(make_task(*args), config, out_dir=out_dir)
