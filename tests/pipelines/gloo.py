"""Two real processes that train one model over gloo; started by `multiprocessing`, so without Ray's seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.trainer import Task, TrainConfig, TrainResult, fit


def fit_in_two(make_task: Callable[..., Task], args: tuple, config: TrainConfig, out_dir: Path) -> TrainResult:
    """`fit` by two workers of one thread each; `make_task` must be importable."""
    out_dir.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(rank, make_task, args, config, out_dir), daemon=True) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return TrainResult.from_json((out_dir / "training.json").read_text())


def _work(rank: int, make_task: Callable[..., Task], args: tuple, config: TrainConfig, out_dir: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(out_dir / "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        fit(make_task(*args), config, out_dir=out_dir)
    finally:
        dist.destroy_process_group()
