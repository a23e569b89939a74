"""Where a training run's curves go: TensorBoard event files beside the model, and MLflow where it is asked for.

    tensorboard --logdir RUN/training        OUT/tensorboard/events.out.tfevents.*

The driver writes them from the progress that it is told, so workers on other machines need neither library nor
credentials. Points have the number of optimizer steps as their place; steps that are made again, by a worker in a lost
one's place, replace what was plotted of them.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.training.progress import Progress
from pipelines.training.train_config import TrainConfig

Listener = Callable[[Progress], None]


class TelemetryError(RuntimeError):
    """Curves cannot be written as asked; the message says what to do."""


def points(progress: Progress) -> dict[str, float]:
    """What is plotted of a progress: its pace, loss and rates; when an epoch closes also what validation found."""
    plotted = {
        "train/loss": progress.loss,
        "pace/samples_per_s": progress.samples_per_s,
        "pace/input_wait_share": progress.input_wait_share,
        "lr/dense": progress.lr_dense,
        "lr/sparse": progress.lr_sparse,
    }
    if progress.validation_loss is not None:
        plotted["validation/loss"] = progress.validation_loss
        plotted |= {f"validation/{name}": value for name, value in progress.metrics.items()}
    return plotted


@contextmanager
def telemetry(name: str, config: TrainConfig, out_dir: Path, *, fresh: bool) -> Iterator[Listener]:
    """Writes the curves of the run that is called `name`, while the block lasts; `fresh`: not after an earlier run's.
    A sink that fails while training goes on is left out from there, with a warning: no model is lost to its plots."""
    with closing(TensorBoard(out_dir / "tensorboard", fresh=fresh)) as board:
        if config.mlflow is None:
            yield _guarded(board)
            return
        mlflow = MLflow(config.mlflow, name, config, out_dir / "mlflow-run-id", fresh=fresh)
        sinks = [_guarded(board), _guarded(mlflow)]

        def to_both(progress: Progress) -> None:
            for sink in sinks:
                sink(progress)

        try:
            yield to_both
        except BaseException:
            mlflow.end("FAILED")
            raise
        mlflow.end("FINISHED")


class TensorBoard:
    """Event files, without tensorboardX's queue: a full disk ends its thread, and then whoever waits for the queue."""

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self.folder, self._step = folder, -1
        self._file: Any = None
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, progress: Progress) -> None:
        """Plot its points."""
        step, made = progress.steps_done, import_module("tensorboardX.proto.summary_pb2").Summary
        if self._file is None or step < self._step:
            self._open(step)
        values = [made.Value(tag=tag, simple_value=value) for tag, value in points(progress).items()]
        self._write(step, summary=made(value=values))
        self._step = step

    def close(self) -> None:
        """Everything is on disk already, or was refused and told."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open(self, step: int) -> None:
        # Not torch.utils.tensorboard: that wants the whole viewer installed where training runs.
        events = import_module("tensorboardX.event_file_writer")
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = events.EventsWriter(str(self.folder / "events"), f".from-{step}")
        log = import_module("tensorboardX.proto.event_pb2").SessionLog
        self._write(step, session_log=log(status=log.START))  # the viewer drops older files' points from here on

    def _write(self, step: int, **what: Any) -> None:
        event = import_module("tensorboardX.proto.event_pb2").Event
        self._file.write_event(event(wall_time=time.time(), step=step, **what))
        self._file.flush()


class MLflow:
    """One run of the experiment "reelrank"; its id is kept in a file, so that a resumed training goes on in it."""

    def __init__(self, uri: str, name: str, config: TrainConfig, kept: Path, *, fresh: bool) -> None:
        try:
            self._entities = import_module("mlflow.entities")
            client = import_module("mlflow.tracking").MlflowClient
        except ImportError as missing:
            raise TelemetryError(
                f"mlflow={uri!r} asks for MLflow, which is not installed: "
                "pip install --no-deps -r requirements/mlflow.txt"
            ) from missing
        try:
            self._client = client(tracking_uri=uri)
            if fresh or not kept.exists():
                experiment = self._client.get_experiment_by_name("reelrank")
                number = experiment.experiment_id if experiment else self._client.create_experiment("reelrank")
                made = self._client.create_run(number, run_name=name).info.run_id
                self._client.log_batch(
                    made, params=[self._entities.Param(key, str(value)) for key, value in asdict(config).items()]
                )
                kept.write_text(made)
            self._run = kept.read_text()
        except Exception as failed:  # MLflow, urllib3 or requests: whatever the server is
            raise TelemetryError(
                f"no MLflow run at {uri}: {failed}. Check ranker_train.mlflow and its server"
            ) from failed

    def __call__(self, progress: Progress) -> None:
        """Log its points."""
        now_ms, step, metric = int(time.time() * 1000), progress.steps_done, self._entities.Metric
        self._client.log_batch(self._run, [metric(key, value, now_ms, step) for key, value in points(progress).items()])

    def end(self, status: str) -> None:
        """FINISHED or FAILED."""
        try:
            self._client.set_terminated(self._run, status)
        except Exception as failed:
            _log.warning("MLflow was not told that the run is %s: %s", status, failed)


def _guarded(sink: Listener) -> Listener:
    broken = False

    def write(progress: Progress) -> None:
        nonlocal broken
        if broken:
            return
        try:
            sink(progress)
        except Exception as failed:
            broken = True
            _log.warning("%s: curves end at step %d: %s", type(sink).__name__, progress.steps_done, failed)

    return write


_log = logging.getLogger(__name__)
