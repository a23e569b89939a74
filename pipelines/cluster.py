"""The one place that starts or joins Ray: a quiet local cluster on this machine, or the one at an address."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

CALM_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
"""Threads that wait must not spin: beside another process on the same cores, spinning cost 5 to 20 times the work.
Read by the libraries as they load, so set before anything is imported; workers of a Ray that is started here inherit
them, those of a running cluster are told."""

LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # default 60 s, which importing torch can exceed on a busy machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # default 2 s, waited for at both ends of every training run
}
"""What a one-machine run of minutes has no use for. Set before Ray is imported; a variable already set is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where Ray runs."""

    address: str | None = None
    """A running cluster ("auto", "host:6379", "ray://host:10001"); None starts one on this machine."""
    cpus: int | None = None
    """CPUs of the local cluster; None: this machine's, and at least 2 so that two workers can run anywhere."""
    object_store_mib: int = 512
    """Shared memory of the local cluster."""


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Ray inside the block. Joins the Ray this process already uses, if any, and then leaves it running."""
    if config.address is None:
        for name, setting in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, setting)
    import ray  # after the environment, which Ray reads on import

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if config.address is not None:
        calm = {name: os.environ.get(name, setting) for name, setting in CALM_THREADS.items()}
        ray.init(address=config.address, runtime_env={"env_vars": calm}, **quiet)
    else:
        ray.init(
            address="local",  # else Ray would join whatever cluster runs on this machine
            num_cpus=config.cpus or max(2, usable_cpus()),
            include_dashboard=False,
            object_store_memory=config.object_store_mib * 2**20,
            **quiet,
        )
    _answer_sigterm_by(on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _answer_sigterm_by(handler: object) -> None:
    """As before: ray.init puts a handler of its own in place, which exits with code 15."""
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def spread(
    work: Callable[[int], T],
    numbers: Sequence[int],
    *,
    workers: int,
    where: ClusterConfig = ClusterConfig(),
) -> Iterator[T]:
    """work(number) for each number, as they finish: one after another in this process for one worker or one number,
    else as Ray tasks of one thread, at most `workers` at a time. A task whose process dies is run again by Ray."""
    if workers <= 1 or len(numbers) <= 1:
        yield from map(work, numbers)
        return
    with cluster(where):
        import ray

        @ray.remote(num_cpus=1)
        def task(number: int) -> T:
            _one_thread()
            return work(number)

        waiting, running = list(reversed(numbers)), set()
        while waiting or running:
            while waiting and len(running) < workers:
                running.add(task.remote(waiting.pop()))
            ready, _ = ray.wait(list(running))
            running -= set(ready)
            yield from ray.get(ready)


def _one_thread() -> None:
    """Workers share the cores as processes; threads of each would only wait for one another."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def joined_cpus() -> int:
    """Cores of the Ray this process has joined, on all its machines; without one, those of `usable_cpus`."""
    ray = sys.modules.get("ray")  # importing it here would be before the cluster has set its environment
    if ray is None or not ray.is_initialized():
        return usable_cpus()
    return int(ray.cluster_resources().get("CPU", 1))


def usable_cpus() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))
