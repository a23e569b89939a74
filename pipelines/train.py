"""Training under Ray Train: the same loop (`pipelines.trainer.fit`) in one worker process or in many.

A worker that dies is replaced and the run goes on from its last checkpoint; an error in the code or the data ends it
with that error. Workers tell their progress through a file beside the checkpoints, which the driver follows.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.cluster import ClusterConfig, cluster, usable_cpus
from pipelines.trainer import Progress, Task, TrainConfig, TrainResult, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One model to train: every worker calls `make_task(*args)` and so opens the data itself."""

    make_task: Callable[..., Task]
    args: tuple[Any, ...]
    """Small and picklable: a dataset's folder, not its arrays."""
    config: TrainConfig
    out_dir: Path
    resume: bool = True


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
    num_workers and use_gpu. `restarts`: how often lost workers are replaced."""
    shapes = {(job.config.num_workers, job.config.use_gpu) for job in jobs}
    if len(shapes) != 1:
        raise ValueError(f"jobs of one call must agree on (num_workers, use_gpu), not {sorted(shapes)}")
    jobs = [replace(job, out_dir=job.out_dir.absolute()) for job in jobs]
    for job in jobs:
        job.out_dir.mkdir(parents=True, exist_ok=True)
        _progress_file(job).write_text("")
    with cluster(where), _followed([_progress_file(job) for job in jobs], on_progress):
        for restarts_left in range(restarts, -1, -1):
            failure = _run_group(jobs)
            if failure is None:
                break
            if not failure.lost_worker or restarts_left == 0:
                raise TrainingError(failure.message) from failure.cause
            jobs = [replace(job, resume=True) for job in jobs]
    return [TrainResult.from_json((job.out_dir / "training.json").read_text()) for job in jobs]


class _Failure(NamedTuple):
    message: str
    cause: BaseException
    lost_worker: bool


def _run_group(jobs: Sequence[Job]) -> _Failure | None:
    """One worker group from start to end; what went wrong, if anything did."""
    import ray
    from ray.exceptions import RayError
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, use_gpu = jobs[0].config.num_workers, jobs[0].config.use_gpu
    there = int(ray.cluster_resources().get("GPU" if use_gpu else "CPU", 0))
    if there < workers:
        raise ValueError(
            f"num_workers={workers} needs {workers} {'GPUs' if use_gpu else 'CPUs'}; the cluster has {there}"
        )
    trainer = TorchTrainer(
        _work,
        train_loop_config={"jobs": list(jobs)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(storage_path=str(jobs[0].out_dir), name="ray_train"),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as failed:
        return _explain(failed)
    return None


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

            fit(job.make_task(*job.args), job.config, out_dir=job.out_dir, resume=job.resume, on_progress=tell)


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


def _progress_file(job: Job) -> Path:
    return job.out_dir / "progress.jsonl"


@contextmanager
def _followed(files: Sequence[Path], tell: Callable[[Progress], None], every_s: float = 0.2) -> Iterator[None]:
    """Tell every line that appears in the files, from a thread, until the block ends."""
    ended = threading.Event()
    read = dict.fromkeys(files, 0)

    def tell_new() -> None:
        for file in files:
            text = file.read_bytes()[read[file] :]
            complete = text[: text.rfind(b"\n") + 1]
            read[file] += len(complete)
            for line in complete.splitlines():
                tell(Progress(**json.loads(line)))

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
