"""Training under Ray Train: the same loop (`pipelines.training.trainer.fit`) in one worker process or in many.

A worker that dies, alone or with its machine, is replaced and the run goes on from its last checkpoint; an error in the
code or the data ends it with that error. Workers tell their progress through a file beside the checkpoints, which the
driver follows. On a cluster of several machines `out_dir` must be storage that all of them see.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.cluster import ClusterConfig, cluster, usable_cpus
from pipelines.training.checkpoint import DISK_REFUSALS, CheckpointError, Checkpoints
from pipelines.training.telemetry import telemetry
from pipelines.training.trainer import Progress, Task, TrainConfig, TrainResult, fit
from pipelines.training.warm_start import WarmStart

NODE_WAIT_S = 300.0
"""How long a run that lost a machine waits for another one."""
GROUP_STARTS = 5
"""How often Ray Train waits, a minute or more each, for room for all workers; without end by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One model to train: every worker calls `make_task(*args)` and so opens the data itself."""

    make_task: Callable[..., Task]
    args: tuple[Any, ...]
    """Small and picklable: a dataset's folder, not its arrays."""
    config: TrainConfig
    out_dir: Path
    resume: bool = True
    start: WarmStart | None = None
    """Where a fresh run begins; None: from nothing."""


class TrainingError(RuntimeError):
    """Training ended without a model; the message says which worker met what, `__cause__` is that error."""


def train(
    make_task: Callable[..., Task],
    args: tuple[Any, ...],
    config: TrainConfig,
    *,
    out_dir: Path,
    resume: bool = True,
    where: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> TrainResult:
    """Train `make_task(*args)` with config.num_workers processes; the model and training.json appear in `out_dir`."""
    job = Job(make_task=make_task, args=args, config=config, out_dir=out_dir, resume=resume)
    return train_all([job], where=where, on_progress=on_progress)[0]


def train_all(
    jobs: Sequence[Job],
    *,
    where: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
    restarts: int = 2,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[TrainResult]:
    """Train one after another in one group of workers, since starting a group takes seconds. All jobs have the same
    num_workers and use_gpu. `restarts`: how often lost workers are replaced without a checkpoint in between."""
    shapes = {(job.config.num_workers, job.config.use_gpu) for job in jobs}
    if len(shapes) != 1:
        raise ValueError(f"jobs of one call must agree on (num_workers, use_gpu), not {sorted(shapes)}")
    jobs = [replace(job, out_dir=job.out_dir.absolute()) for job in jobs]
    for job in jobs:
        _prepare(job)
    jobs = [replace(job, resume=True) for job in jobs]  # what must not be gone on from is removed
    with cluster(where), _followed(jobs, on_progress):
        _require_workers(jobs[0].config, wait_s=0)
        restarts_left, reached = restarts, _reached(jobs)
        while (failure := _run_group(jobs)) is not None:
            before, reached = reached, _reached(jobs)
            restarts_left = restarts if reached != before else restarts_left
            if not failure.lost_worker or restarts_left == 0:
                raise TrainingError(failure.message) from failure.cause
            restarts_left -= 1
            _require_workers(jobs[0].config, wait_s=NODE_WAIT_S)
    return [TrainResult.from_json((job.out_dir / "training.json").read_text()) for job in jobs]


def _prepare(job: Job) -> None:
    try:
        job.out_dir.mkdir(parents=True, exist_ok=True)
        if not job.resume:
            shutil.rmtree(job.out_dir / "checkpoints", ignore_errors=True)
        _progress_file(job).write_text("")
    except OSError as failed:
        raise TrainingError(str(_unwritten(job, failed))) from failed


def _unwritten(job: Job, failed: OSError) -> CheckpointError:
    kept = Checkpoints(job.out_dir / "checkpoints").find("last")
    intact = "No checkpoint is there" if kept is None else f"The last checkpoint, {kept.name}, is intact"
    return CheckpointError.of("training", job.out_dir, failed, intact)


def _reached(jobs: Sequence[Job]) -> list[str | None]:
    """The last checkpoint of each job: what has changed here need not be done again."""
    found = [Checkpoints(job.out_dir / "checkpoints").find("last") for job in jobs]
    return [None if checkpoint is None else checkpoint.name for checkpoint in found]


def _require_workers(config: TrainConfig, *, wait_s: float) -> None:
    """Raise ValueError where the cluster has too few CPUs or GPUs and gets no more of them in this time."""
    import ray

    kind, workers, end = "GPU" if config.use_gpu else "CPU", config.num_workers, time.monotonic() + wait_s
    while (there := int(ray.cluster_resources().get(kind, 0))) < workers:
        if time.monotonic() >= end:
            lost = " since a machine was lost; add one and run again: it goes on from its checkpoint" if wait_s else ""
            raise ValueError(f"num_workers={workers} needs {workers} {kind}s; the cluster has {there}{lost}")
        time.sleep(1.0)


class _Failure(NamedTuple):
    message: str
    cause: BaseException
    lost_worker: bool


def _run_group(jobs: Sequence[Job]) -> _Failure | None:
    """One worker group from start to end; what went wrong, if anything did."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, use_gpu = jobs[0].config.num_workers, jobs[0].config.use_gpu
    trainer = TorchTrainer(
        _work,
        train_loop_config={"jobs": list(jobs)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            storage_path=str(jobs[0].out_dir),
            name="ray_train",
            failure_config=FailureConfig(controller_failure_limit=GROUP_STARTS),
        ),
    )
    try:
        with _interrupts_stay_ours():
            trainer.fit()
    except (TrainingFailedError, RayError) as failed:
        return _explain(failed)
    return None


@contextmanager
def _interrupts_stay_ours() -> Iterator[None]:
    """Ray Train leaves its answer to Ctrl-C behind, which fails once its controller has gone."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _work(loop_config: dict[str, Any]) -> None:
    """In each worker, where Ray Train has made the process group."""
    import ray.train
    import torch

    first = ray.train.get_context().get_world_rank() == 0
    for job in loop_config["jobs"]:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(job.config.threads or max(1, usable_cpus() // local))
        with _progress_file(job).open("a") as lines:

            def tell(progress: Progress, lines: Any = lines) -> None:
                if first:
                    lines.write(json.dumps(asdict(progress)) + "\n")
                    lines.flush()
                if progress.validation_loss is not None:
                    ray.train.report(asdict(progress))

            task = job.make_task(*job.args)
            try:
                fit(task, job.config, out_dir=job.out_dir, resume=job.resume, start=job.start, on_progress=tell)
            except OSError as failed:  # what is no checkpoint: progress, the ledger
                if failed.errno in DISK_REFUSALS:
                    raise _unwritten(job, failed) from failed
                raise


def _explain(failed: Exception) -> _Failure:
    """The failure that says most: an error of code or data before the loss of a connection that it caused."""
    failures: dict[int, Exception] = getattr(failed, "worker_failures", {})
    causes = {rank: _unwrapped(failure) for rank, failure in failures.items()}
    if not causes:
        cause = getattr(failed, "controller_failure", failed)
        return _Failure(f"Ray Train could not run the workers: {cause}", cause, lost_worker=False)
    rank = min(causes, key=lambda rank: (_is_loss(causes[rank]), rank))
    cause = causes[rank]
    if _is_loss(cause):
        return _Failure(f"worker {rank} was lost, and restarts are used up: {cause}", cause, lost_worker=True)
    return _Failure(f"worker {rank} failed: {type(cause).__name__}: {cause}", cause, lost_worker=False)


def _unwrapped(failure: Exception) -> BaseException:
    """Ray Train wraps what the worker raised, and what its health check met."""
    return getattr(failure, "_base_exc", None) or getattr(failure, "health_check_failure", None) or failure


def _is_loss(cause: BaseException) -> bool:
    """Whether a process went away: Ray's word for the dead one, gloo's or nccl's for those who waited for it."""
    import torch.distributed as dist
    from ray.exceptions import RayError

    return isinstance(cause, RayError | dist.DistError) or "gloo/transport" in str(cause)


def _plots(job: Job) -> AbstractContextManager[Callable[[Progress], None]]:
    return telemetry(job.out_dir.name, job.config, job.out_dir, fresh=_reached([job]) == [None])


def _progress_file(job: Job) -> Path:
    return job.out_dir / "progress.jsonl"


@contextmanager
def _followed(jobs: Sequence[Job], tell: Callable[[Progress], None], every_s: float = 0.2) -> Iterator[None]:
    """Tell every line that appears in the jobs' files, and plot it, from a thread, until the block ends."""
    ended, read = threading.Event(), [0] * len(jobs)
    with ExitStack() as stack:
        plots = [stack.enter_context(_plots(job)) for job in jobs]

        def tell_new() -> None:
            for n, job in enumerate(jobs):
                text = _progress_file(job).read_bytes()[read[n] :]
                complete = text[: text.rfind(b"\n") + 1]
                read[n] += len(complete)
                for line in complete.splitlines():
                    progress = Progress(**json.loads(line))
                    plots[n](progress)
                    tell(progress)

        def follow() -> None:
            while not ended.wait(every_s):
                tell_new()

        thread = threading.Thread(target=follow, name="training-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            tell_new()
