"""Our loop on one worker and on two, one thread each: samples/s, and where a step's time goes.

Time by kind is read off torch's profiler on the first worker: lookup is FBGEMM's forward and backward (in which the
tables move), communication is every wait for the other worker, input is waiting for collation, dense is the rest.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.trainer import Task, TrainConfig, fit

COMMUNICATION = ("All2All", "c10d::", "gloo:", "[splits_dist]", "[input_dist]", "[output_dist]", "## ")
"""How the profiler's names of TorchRec's exchanges, of their waits ("## ... wait() ##") and of collectives begin."""
LOOKUP = ("fbgemm::", "[lookup]")


def measure(make_task: Callable[..., Task], arguments: tuple, config: TrainConfig, workers: int) -> dict[str, Any]:
    """Pace of the second epoch without a profiler, then shares of a run under it; each worker has one thread."""
    rates = run(make_task, arguments, config, workers, profiled=False)
    shares = run(make_task, arguments, config, workers, profiled=True)
    return {"workers": workers, **rates, "shares": shares["shares"]}


def run(
    make_task: Callable[..., Task], arguments: tuple, config: TrainConfig, workers: int, *, profiled: bool
) -> dict[str, Any]:
    """What the first worker reports."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_work, args=(rank, workers, folder, make_task, arguments, config, profiled, answers))
            for rank in range(workers)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
    failed = [process.exitcode for process in started if process.exitcode]
    if failed:
        raise RuntimeError(f"a worker of {workers} ended with exit code {failed[0]}; its traceback stands above")
    return answers.get()


def _work(
    rank: int,
    workers: int,
    folder: str,
    make_task: Callable[..., Task],
    arguments: tuple,
    config: TrainConfig,
    profiled: bool,
    answers: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meet", workers), rank=rank, world_size=workers)
    task = make_task(*arguments)
    if profiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            result = fit(task, config, out_dir=Path(folder))
        spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    else:
        result, spent = fit(task, config, out_dir=Path(folder)), {}
    if rank == 0:
        samples = len(task.train_units())
        wall_s = sum(samples / epoch.samples_per_s for epoch in result.epochs)
        input_s = sum(samples / e.samples_per_s * e.input_wait_share for e in result.epochs)
        by_kind = {
            "lookup": sum(s for name, s in spent.items() if name.startswith(LOOKUP)),
            "communication": sum(s for name, s in spent.items() if name.startswith(COMMUNICATION)),
            "input": input_s,
        }
        shares = {kind: seconds / wall_s for kind, seconds in by_kind.items()}
        shares["dense"] = 1 - sum(shares.values())
        answers.put(
            {
                "samples_per_s": result.epochs[-1].samples_per_s,
                "validation_loss": result.epochs[-1].validation_loss,
                "shares": shares,
            }
        )
    dist.destroy_process_group()
