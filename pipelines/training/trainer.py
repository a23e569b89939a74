"""The one resumable training loop for both models, the same on one process and on many.

Workers are the processes of torch.distributed's default group; without one, `fit` makes a group of one. Each step:
units -> collate (background) -> batch -> loss -> stop if it is not finite -> every parameter moves. Randomness is
reseeded from (seed, epoch, step), so that a position says everything; what is drawn by row must hang on the row
(`ranking.dropout`), for workers share out the rows.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from features.batch import Batch
from pipelines.training.allocator import freed_memory_kept
from pipelines.training.batches import VALIDATION, Step, derived_seed, training_steps, validation_steps
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.cursor import Cursor, EpochReport, read_cursor
from pipelines.training.learner import Learner, NonFiniteLossError, NonFiniteStateError
from pipelines.training.ledger import Ledger, cut_ledger
from pipelines.training.loader import load_batches, traffic_of
from pipelines.training.progress import Pace, Progress, TrainResult
from pipelines.training.repeatable import repeatable
from pipelines.training.sharding import shard
from pipelines.training.train_config import Task, TrainConfig
from pipelines.training.warm_start import WarmStart, renew_rows
from pipelines.training.whole_state import export_model
from pipelines.training.workers import process_group, told_by_workers


def fit(
    task: Task,
    config: TrainConfig,
    *,
    out_dir: Path,
    resume: bool = True,
    start: WarmStart | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> TrainResult:
    """Train to the best epoch and export it into `out_dir`; called by every worker. With `resume`, goes on from the
    last checkpoint in `out_dir` if there is one; a fresh run begins where `start` says. Progress: the first worker's,
    and every worker's at an epoch's end."""
    kept = Checkpoints(out_dir / "checkpoints", keep_best=config.keep_best, background=config.background_checkpoints)
    same_bits = nullcontext() if config.use_gpu else repeatable()
    with process_group(), freed_memory_kept(), same_bits, kept as checkpoints:
        run = Run(task, config, out_dir, checkpoints, on_progress)
        if not resume:
            checkpoints.clear()
        if start is not None and checkpoints.find("last") is None:
            run.begin(start)
        run.resume()
        with run.ledger():
            while not run.cursor.finished:
                run.train_epoch()
                run.close_epoch()
        return run.export()


class Run:
    """State of one worker: the learner, and the cursor."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        out_dir: Path,
        checkpoints: Checkpoints,
        tell: Callable[[Progress], None],
    ) -> None:
        self.started = time.perf_counter()
        self.task, self.config, self.out_dir, self.checkpoints, self.tell = task, config, out_dir, checkpoints, tell
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.use_gpu else torch.device("cpu")
        self.train_units, self.validation_units = task.train_units(), task.validation_units()
        if len(self.validation_units) < self.world:
            raise ValueError(
                f"task {task.name}: {len(self.validation_units)} validation units for {self.world} workers; "
                "choose validation dates that hold data"
            )
        self.learner = self._fresh_learner()
        self.cursor = Cursor(recipe=self._recipe(), finished=config.epochs == 0)
        self.resumed_from_step = 0
        self.pace, self.learning_rates = Pace(), (0.0, 0.0)
        self._ledger: Ledger | None = None

    def begin(self, start: WarmStart) -> None:
        """Take over another run's parameters, tables and optimizers."""
        tensors = self.learner.tensors()
        self.checkpoints.load(start.checkpoint, tensors)
        renew_rows(tensors, self.table_rows, start.renewed)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        last = self.checkpoints.find("last")
        if last is None:
            return
        cursor = read_cursor(last)
        if cursor.recipe != self.cursor.recipe:
            raise ValueError(
                f"{last} was written for {cursor.recipe}, not for {self.cursor.recipe}: "
                "train into another folder, or start over with resume=False"
            )
        self.checkpoints.load(last, self.learner.tensors())
        self.cursor, self.resumed_from_step = cursor, cursor.steps_done
        if self.cursor.units_done == 0:
            self.cursor = replace(self.cursor, finished=self._is_finished())

    def train_epoch(self) -> None:
        """From the cursor to the end of its epoch."""
        learner, pace = self.learner, Pace()
        learner.model.train()
        steps = self._steps(self.cursor.epoch, self.cursor.units_done)
        for step, batch, targets in self._loaded(steps, pace):
            self.learning_rates = learner.set_learning_rates(self._share_of_rates())
            torch.manual_seed(step.seed_of_all)
            loss, mean_loss = learner.loss(batch, targets)
            self._require_finite(step, loss, mean_loss)
            self._move(step, loss)
            self._remember(step, mean_loss)
            pace.samples += step.units_of_all
            if self.rank == 0 and pace.due():
                self._report(step.number + 1, pace)
            with pace.waiting_for("checkpoint"):
                self._checkpoint_inside(is_last=step is steps[-1])
        self.pace = pace.stop()

    def close_epoch(self) -> None:
        """Validate, remember the epoch, checkpoint."""
        validation, pace = self.validate(), self.pace
        report = EpochReport(
            epoch=self.cursor.epoch,
            train_loss=self.cursor.train_loss,
            validation_loss=validation.pop("loss"),
            metrics=self.task.metrics(validation),
            samples_per_s=pace.samples_per_s,
            input_wait_share=pace.share_waiting_for("input"),
            checkpoint_wait_share=pace.share_waiting_for("checkpoint"),
        )
        if not math.isfinite(report.validation_loss):
            raise NonFiniteLossError(
                f"task {self.task.name}, epoch {report.epoch}: validation loss is {report.validation_loss}; "
                "this epoch is not checkpointed; lower lr_dense or lr_sparse"
            )
        self.cursor = self.cursor.after_epoch(report)
        self.cursor = replace(self.cursor, finished=self._is_finished())
        self._checkpoint()
        self._report(self._steps_an_epoch(), pace, closed=report)

    def export(self) -> TrainResult:
        """The first worker hands the best epoch's whole, unsharded state to the task."""
        self.checkpoints.wait()
        best = self.checkpoints.find("best")
        if best is None:
            raise ValueError(f"task {self.task.name}: nothing was trained (epochs={self.config.epochs}), so no model")
        result = TrainResult(
            name=self.task.name,
            epochs=self.cursor.epochs,
            best_epoch=self.cursor.best_epoch,
            best_validation_loss=self.cursor.epochs[self.cursor.best_epoch].validation_loss,
            plan=self.plan,
            steps=self.cursor.steps_done,
            workers=self.world,
            resumed_from_step=self.resumed_from_step,
            wall_s=time.perf_counter() - self.started,
        )
        if self.rank == 0:
            export_model(self.task, best, self.unsharded, self.table_rows, self.out_dir, result.to_json())
        dist.barrier()
        return result

    def ledger(self) -> closing[Ledger] | nullcontext[None]:
        """Opens this worker's ledger, if there shall be one, at the cursor."""
        if not self.config.ledger:
            return nullcontext()
        folder = self.out_dir / "ledger"
        if self.rank == 0:
            cut_ledger(folder, self.cursor.steps_done)
        dist.barrier()
        self._ledger = Ledger(folder, self.rank)
        return closing(self._ledger)

    def _fresh_learner(self) -> Learner:
        """Built on the meta device, placed by the planner, its first values drawn by who holds them."""
        config = self.config
        torch.manual_seed(derived_seed(config.seed))
        module = self.task.build(torch.device("meta"))
        self.unsharded = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        sharded = shard(
            module,
            lr_sparse=config.lr_sparse,
            batch_size=config.batch_size,
            traffic=traffic_of(self.task, self._steps(0, 0)[0], self.device),
            device=self.device,
            seed=config.seed,
            rows_a_part=config.rows_a_part,
        )
        self.plan, self.table_rows = sharded.plan, sharded.rows
        return Learner(sharded, config, self.device)

    def _loaded(self, steps: list[Step], pace: Pace) -> Iterator[tuple[Step, Batch, dict[str, torch.Tensor]]]:
        return load_batches(self.task, steps, prefetch=self.config.prefetch, device=self.device, pace=pace)

    def _require_finite(self, step: Step, loss: torch.Tensor, mean_loss: float) -> None:
        if math.isfinite(mean_loss):
            return
        shares = told_by_workers((float(loss.detach()), step.units.tolist()))
        bad = {rank: units for rank, (own, units) in enumerate(shares) if not math.isfinite(own)}
        where = "; ".join(f"worker {rank}: units {units[:20]} ({len(units)} in all)" for rank, units in bad.items())
        raise NonFiniteLossError(
            f"task {self.task.name}, epoch {self.cursor.epoch}, step {step.number}: the loss is not finite on {where}. "
            "No parameter moved in this step. Look for NaN in the targets of these units, or lower the learning rates"
        )

    def _move(self, step: Step, loss: torch.Tensor) -> None:
        try:
            self.learner.move(loss if step.share == 1.0 else loss * step.share)
        except NonFiniteStateError as met:
            raise NonFiniteStateError(
                f"task {self.task.name}, epoch {self.cursor.epoch}, step {step.number}: {met}. The tables have moved; "
                "the last checkpoint is from before: lower the learning rates and start over from it"
            ) from met

    def _remember(self, step: Step, mean_loss: float) -> None:
        if self._ledger is not None:
            self._ledger.add(position=self.cursor.steps_done, epoch=self.cursor.epoch, units=step.units)
        self.cursor = self.cursor.after_step(step.units_of_all, mean_loss)

    def _checkpoint_inside(self, *, is_last: bool) -> None:
        """An epoch; its last step is followed by the checkpoint that closes it."""
        every = self.config.checkpoint_every_steps
        if every and self.cursor.steps_done % every == 0 and not is_last:
            self._checkpoint()
        self.checkpoints.check()

    def _checkpoint(self) -> None:
        if self._ledger is not None:
            self._ledger.sync()
        self.checkpoints.save(self.learner.tensors(), self.cursor)

    def _recipe(self) -> dict[str, str | int]:
        units = hashlib.sha256(np.ascontiguousarray(self.train_units).tobytes()).hexdigest()[:16]
        parts = {} if self.config.rows_a_part is None else {"rows_a_part": self.config.rows_a_part}
        return {"task": self.task.name, "seed": self.config.seed, "train_units": units, **parts}

    def _is_finished(self) -> bool:
        stale = self.cursor.epoch - 1 - self.cursor.best_epoch
        return self.cursor.epoch >= self.config.epochs or stale >= self.config.patience

    def _steps(self, epoch: int, units_done: int) -> list[Step]:
        return training_steps(
            self.train_units,
            seed=self.config.seed,
            epoch=epoch,
            batch_size=self.config.batch_size,
            rank=self.rank,
            world=self.world,
            units_done=units_done,
        )

    def _steps_an_epoch(self) -> int:
        return -(-len(self.train_units) // (self.config.batch_size * self.world))

    def validate(self) -> dict[str, float]:
        """Every scalar of the module, as the mean over all workers' validation units."""
        self.learner.model.eval()
        torch.manual_seed(derived_seed(self.config.seed, VALIDATION))
        steps = validation_steps(
            self.validation_units,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            rank=self.rank,
            world=self.world,
        )
        sums: dict[str, float] = {}
        for step, batch, targets in self._loaded(steps, Pace()):
            for name, scalar in self.learner.scalars(batch, targets).items():
                sums[name] = sums.get(name, 0.0) + scalar * step.units_of_all
        units = sum(step.units_of_all for step in steps)
        return {name: total / units for name, total in sums.items()}

    def _share_of_rates(self) -> float:
        """Of the configured learning rates, at the cursor."""
        warm = min(1.0, (self.cursor.steps_done + 1) / max(1, self.config.warmup_steps))
        epochs_done = self.cursor.epoch + self.cursor.units_done / len(self.train_units)
        return warm * (1.0 - (1.0 - self.config.lr_final) * epochs_done / self.config.epochs)

    def _report(self, step: int, pace: Pace, closed: EpochReport | None = None) -> None:
        config, cursor, steps = self.config, self.cursor, self._steps_an_epoch()
        epoch = closed.epoch if closed else cursor.epoch
        units_left = (steps - step + (config.epochs - epoch - 1) * steps) * config.batch_size * self.world
        self.tell(
            Progress(
                name=self.task.name,
                epoch=epoch,
                epochs=config.epochs,
                step=step,
                steps=steps,
                steps_done=cursor.steps_done,
                loss=closed.train_loss if closed else cursor.train_loss,
                validation_loss=closed.validation_loss if closed else None,
                metrics=cursor.epochs[-1].metrics if cursor.epochs else {},
                lr_dense=self.learning_rates[0],
                lr_sparse=self.learning_rates[1],
                samples_per_s=pace.samples_per_s,
                input_wait_share=pace.share_waiting_for("input"),
                eta_s=0.0 if cursor.finished else units_left / max(pace.samples_per_s, 1e-9),
            )
        )
