"""The one resumable training loop for both models, the same on one process and on many.

Workers are the processes of torch.distributed's default group; without one, `fit` makes a group of one. Each step:
units -> collate (background) -> Batch -> loss -> stop if it is not finite -> backward, in which the tables move ->
sum of the workers' dense gradients -> Adam. Randomness is reseeded from (seed, epoch, step), so that a position says
everything; what is drawn by row must hang on the row (`ranking.dropout`), for workers share out the rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from features.batch import Batch, to_batch
from features.inputs import Collated
from pipelines.allocator import freed_memory_kept
from pipelines.batches import VALIDATION, Step, ahead, derived_seed, training_steps, validation_steps
from pipelines.checkpoint import Checkpoints, Cursor, EpochReport, read_cursor, read_unsharded
from pipelines.repeatable import repeatable
from pipelines.sharding import TablePlan, Traffic, dense_parameters, shard
from pipelines.warm_start import WarmStart, renew_rows


class Task(Protocol):
    """A model and its data, as the trainer sees them."""

    name: str

    def build(self, tables_on: torch.device) -> nn.Module:
        """Fresh unsharded module on the CPU, its tables on `tables_on`, the meta device. forward(batch, targets) gives
        "loss", a mean, and other scalars; it calls each collection once and uses all dense parameters."""
        ...

    def train_units(self) -> np.ndarray:
        """int64 ids of what is shuffled and batched."""
        ...

    def validation_units(self) -> np.ndarray:
        """int64 ids never trained on; the best epoch is chosen by them."""
        ...

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int) -> Collated:
        """Numpy only; deterministic in (units, seed); one context a unit."""
        ...

    def export(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the model from its unsharded state_dict into `folder`. Large tables are mapped from a file: write, do
        not copy, and keep no reference."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train; what to train is the task."""

    epochs: int = 5
    batch_size: int = 256
    """Units a step and worker."""
    lr_dense: float = 1e-3
    """Adam, everything but the sharded tables."""
    lr_sparse: float = 0.05
    """Row-wise Adagrad, fused into the backward pass of the tables."""
    weight_decay: float = 0.0
    """Decoupled, on dense matrices only (not on biases and norms)."""
    warmup_steps: int = 50
    """Both learning rates rise linearly over these steps."""
    lr_final: float = 1.0
    """Share of both learning rates that is left at the end of the last epoch; they fall there in a straight line."""
    patience: int = 2
    """Epochs without a better validation loss before stopping."""
    seed: int = 1
    checkpoint_every_steps: int | None = None
    """Also checkpoint inside an epoch; None: after each epoch alone."""
    prefetch: int = 2
    """Batches collated ahead."""
    num_workers: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the dense part's matrix products; parameters, tables, optimizers and losses stay in fp32."""
    rows_a_part: int | None = None
    """Tables of more rows are split into tables of this many, to lie on several workers; what is learnt is the same."""
    threads: int | None = None
    """Torch threads a worker; None: the machine's cores shared out evenly."""
    use_gpu: bool = False
    """One GPU a worker (nccl); otherwise CPU (gloo)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a run tells about itself, a few times a second."""

    name: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    """Mean over the units of this epoch so far."""
    validation_loss: float | None
    """Of the epoch that just ended; None inside an epoch."""
    samples_per_s: float
    input_wait_share: float
    eta_s: float
    """Training time left if no epoch is saved by early stopping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a run did; losses are in `epochs`."""

    name: str
    epochs: tuple[EpochReport, ...]
    best_epoch: int
    best_validation_loss: float
    plan: tuple[TablePlan, ...]
    steps: int
    workers: int
    resumed_from_step: int
    """0 for a fresh run."""
    wall_s: float

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainResult:
        """What `to_json` wrote."""
        fields = json.loads(text)
        plan = tuple(TablePlan(**{**t, "ranks": tuple(t["ranks"])}) for t in fields["plan"])
        epochs = tuple(EpochReport(**e) for e in fields["epochs"])
        return cls(**{**fields, "plan": plan, "epochs": epochs})


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; no parameter has moved in that step."""


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
    with _process_group(), freed_memory_kept(), nullcontext() if config.use_gpu else repeatable():
        run = _Run(task, config, out_dir, on_progress)
        if not resume:
            run.checkpoints.clear()
        if start is not None and run.checkpoints.find("last") is None:
            run.begin(start)
        run.resume()
        while not run.cursor.finished:
            run.train_epoch()
            run.close_epoch()
        return run.export()


class _Run:
    """State of one worker: the sharded model, both optimizers, and the cursor."""

    def __init__(self, task: Task, config: TrainConfig, out_dir: Path, tell: Callable[[Progress], None]) -> None:
        self.started = time.perf_counter()
        self.task, self.config, self.out_dir, self.tell = task, config, out_dir, tell
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.use_gpu else torch.device("cpu")
        self.train_units, self.validation_units = task.train_units(), task.validation_units()
        if len(self.validation_units) < self.world:
            raise ValueError(
                f"task {task.name}: {len(self.validation_units)} validation units for {self.world} workers; "
                "choose validation dates that hold data"
            )
        torch.manual_seed(derived_seed(config.seed))
        module = task.build(torch.device("meta"))
        self.unsharded = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
        sharded = shard(
            module,
            lr_sparse=config.lr_sparse,
            batch_size=config.batch_size,
            traffic=self._traffic(),
            device=self.device,
            seed=config.seed,
            rows_a_part=config.rows_a_part,
        )
        self.model, self.plan, self.table_rows = sharded.model, sharded.plan, sharded.rows
        self.dense = dense_parameters(self.model)
        matrices = [p for p in self.dense.values() if p.ndim > 1]
        others = [p for p in self.dense.values() if p.ndim <= 1]
        self.dense_optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr_dense,
            fused=True,
        )
        self.checkpoints = Checkpoints(out_dir / "checkpoints")
        self.cursor = Cursor(recipe=self._recipe(), finished=config.epochs == 0)
        self.resumed_from_step = 0

    def begin(self, start: WarmStart) -> None:
        """Take over another run's parameters, tables and optimizers."""
        tensors = self._tensors()
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
        self.checkpoints.load(last, self._tensors())
        self.cursor, self.resumed_from_step = cursor, cursor.steps_done
        if self.cursor.units_done == 0:
            self.cursor = replace(self.cursor, finished=self._is_finished())

    def train_epoch(self) -> None:
        """From the cursor to the end of its epoch."""
        self.model.train()
        clock = _Clock()
        steps = self._training_steps()
        for step, batch, targets in self._feed(steps, clock):
            self._set_learning_rates()
            torch.manual_seed(step.seed_of_all)
            loss = self._training_step(step, batch, targets)
            self.cursor = replace(
                self.cursor,
                units_done=self.cursor.units_done + step.units_of_all,
                epoch_loss_sum=self.cursor.epoch_loss_sum + loss * step.units_of_all,
                steps_done=self.cursor.steps_done + 1,
            )
            clock.samples += step.units_of_all
            if self.rank == 0 and clock.due():
                self._report(step.number + 1, steps[-1].number + 1, clock)
            every = self.config.checkpoint_every_steps
            if every and self.cursor.steps_done % every == 0 and step is not steps[-1]:
                self.checkpoints.save(self._tensors(), self.cursor, best=False)
        self.clock = clock.stop()

    def close_epoch(self) -> None:
        """Validate, remember the epoch, checkpoint."""
        cursor = self.cursor
        validation = self._validate()
        report = EpochReport(
            epoch=cursor.epoch,
            train_loss=cursor.epoch_loss_sum / cursor.units_done,
            validation_loss=validation.pop("loss"),
            metrics=validation,
            samples_per_s=self.clock.samples_per_s,
            input_wait_share=self.clock.wait_share,
        )
        if not math.isfinite(report.validation_loss):
            raise NonFiniteLossError(
                f"task {self.task.name}, epoch {cursor.epoch}: validation loss is {report.validation_loss}; "
                "this epoch is not checkpointed; lower lr_dense or lr_sparse"
            )
        best = all(report.validation_loss < earlier.validation_loss for earlier in cursor.epochs)
        self.cursor = replace(
            cursor,
            epoch=cursor.epoch + 1,
            units_done=0,
            epoch_loss_sum=0.0,
            best_epoch=cursor.epoch if best else cursor.best_epoch,
            epochs=(*cursor.epochs, report),
        )
        self.cursor = replace(self.cursor, finished=self._is_finished())
        self.checkpoints.save(self._tensors(), self.cursor, best=best)
        steps = len(self._training_steps())
        self._report(steps, steps, self.clock, closed=report)

    def export(self) -> TrainResult:
        """The first worker hands the best epoch's whole, unsharded state to the task."""
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
            self._export_whole(best)
            (self.out_dir / "training.json").write_text(result.to_json())
        dist.barrier()
        return result

    def _export_whole(self, checkpoint: Path) -> None:
        like = {f"model/{name}": tensor for name, tensor in self.unsharded.items()}
        parts = {f"model/{name}": (f"model/{r.table}", r.start, r.end) for name, r in self.table_rows.items()}
        scratch = self.out_dir / "whole.partial"
        try:
            state = read_unsharded(checkpoint, like, parts, scratch)
            self.task.export({name.removeprefix("model/"): t for name, t in state.items()}, self.out_dir)
        finally:
            scratch.unlink(missing_ok=True)

    def _recipe(self) -> dict[str, str | int]:
        units = hashlib.sha256(np.ascontiguousarray(self.train_units).tobytes()).hexdigest()[:16]
        parts = {} if self.config.rows_a_part is None else {"rows_a_part": self.config.rows_a_part}
        return {"task": self.task.name, "seed": self.config.seed, "train_units": units, **parts}

    def _traffic(self) -> dict[str, Traffic]:
        """Bags a step and ids a bag of each feature, as the first batch has them; the most of all workers."""
        first = self._steps(0, 0)[0]
        batch = to_batch(self.task.collate(first.units, seed=first.seed, seed_of_all=first.seed_of_all).inputs)
        asked = {}
        for bags in (batch.user, batch.video):
            lengths_FB = bags.lengths().view(len(bags.keys()), -1).float()
            n_bags = self._largest(lengths_FB.shape[1])
            for name, mean in zip(bags.keys(), lengths_FB.mean(dim=1).tolist(), strict=True):
                asked[name] = Traffic(n_bags, mean)
        shares: list = [None] * self.world
        dist.all_gather_object(shares, asked)  # the planner must see one figure everywhere
        return shares[0]

    def _is_finished(self) -> bool:
        stale = self.cursor.epoch - 1 - self.cursor.best_epoch
        return self.cursor.epoch >= self.config.epochs or stale >= self.config.patience

    def _training_steps(self) -> list[Step]:
        return self._steps(self.cursor.epoch, self.cursor.units_done)

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

    def _feed(self, steps: list[Step], clock: _Clock) -> Iterator[tuple[Step, Batch, dict[str, torch.Tensor]]]:
        """Tensors on the device, all workers' batches padded to equally many videos."""

        def make(step: Step) -> tuple[Batch, dict[str, torch.Tensor]]:
            made = self.task.collate(step.units, seed=step.seed, seed_of_all=step.seed_of_all)
            return to_batch(made.inputs), {name: torch.from_numpy(a) for name, a in made.targets.items()}

        made_ahead = ahead(make, steps, depth=self.config.prefetch)
        while True:
            asked = time.perf_counter()
            following = next(made_ahead, None)
            if following is None:
                return
            step, (batch, targets) = following
            if self.world > 1:
                batch = batch.pad_videos(self._largest(len(batch.video_dense_UD)))
            batch = batch.to(self.device)
            targets = {name: tensor.to(self.device) for name, tensor in targets.items()}
            clock.waited_s += time.perf_counter() - asked
            yield step, batch, targets

    def _training_step(self, step: Step, batch: Batch, targets: dict[str, torch.Tensor]) -> float:
        """Mean loss of all workers. Tables move inside backward, so the loss is looked at before."""
        with self._dense_precision():
            loss = self.model(batch, targets)["loss"]
        mean_loss = self._mean(loss.detach())
        if not math.isfinite(mean_loss):
            self._refuse(step, float(loss.detach()))
        self.dense_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._average_dense_gradients()
        self.dense_optimizer.step()
        return mean_loss

    def _dense_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _average_dense_gradients(self) -> None:
        """In one piece: the dense part is small beside what the tables exchange, so there is little to overlap, and
        DistributedDataParallel's hooks and copies would cost a step time even of one worker."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in self.dense.values() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _refuse(self, step: Step, own_loss: float) -> None:
        shares: list = [None] * self.world
        dist.all_gather_object(shares, (own_loss, step.units.tolist()))
        bad = {rank: units for rank, (loss, units) in enumerate(shares) if not math.isfinite(loss)}
        where = "; ".join(f"worker {rank}: units {units[:20]} ({len(units)} in all)" for rank, units in bad.items())
        raise NonFiniteLossError(
            f"task {self.task.name}, epoch {self.cursor.epoch}, step {step.number}: the loss is not finite on {where}. "
            "No parameter moved in this step. Look for NaN in the targets of these units, or lower the learning rates"
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Every scalar of the module, as the mean over all workers' validation units."""
        self.model.eval()
        torch.manual_seed(derived_seed(self.config.seed, VALIDATION))
        steps = validation_steps(
            self.validation_units,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            rank=self.rank,
            world=self.world,
        )
        sums: dict[str, float] = {}
        units = 0
        for step, batch, targets in self._feed(steps, _Clock()):
            with self._dense_precision():
                scalars = self.model(batch, targets)
            for name, scalar in scalars.items():
                sums[name] = sums.get(name, 0.0) + self._mean(scalar) * step.units_of_all
            units += step.units_of_all
        return {name: total / units for name, total in sums.items()}

    def _set_learning_rates(self) -> None:
        warm = min(1.0, (self.cursor.steps_done + 1) / max(1, self.config.warmup_steps))
        epochs_done = self.cursor.epoch + self.cursor.units_done / len(self.train_units)
        share = warm * (1.0 - (1.0 - self.config.lr_final) * epochs_done / self.config.epochs)
        for group in self.dense_optimizer.param_groups:
            group["lr"] = self.config.lr_dense * share
        for group in self.model.fused_optimizer.param_groups:
            cast("dict", group)["lr"] = self.config.lr_sparse * share
        self.model.fused_optimizer.step()  # hands the rate to the kernels; the tables move in backward

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All state under unsharded names: sharded tables with their accumulators, dense parameters with Adam's."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for table, state in self.model.fused_optimizer.state_dict()["state"].items():
            tensors |= {f"fused/{table}/{name}": tensor for name, tensor in state.items()}
        for name, parameter in self.dense.items():
            state = self.dense_optimizer.state[parameter]
            if not state:  # before the first step Adam has none
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"dense/{name}/{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    def _mean(self, scalar: torch.Tensor) -> float:
        value = scalar.detach().to(torch.float64).reshape(1)
        if self.world > 1:
            dist.all_reduce(value)
        return float(value) / self.world

    def _largest(self, count: int) -> int:
        if self.world == 1:
            return count
        largest = torch.tensor([count], dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _report(self, step: int, steps: int, clock: _Clock, closed: EpochReport | None = None) -> None:
        epoch = closed.epoch if closed else self.cursor.epoch
        loss = closed.train_loss if closed else self.cursor.epoch_loss_sum / self.cursor.units_done
        units_left = (steps - step + (self.config.epochs - epoch - 1) * steps) * self.config.batch_size * self.world
        self.tell(
            Progress(
                name=self.task.name,
                epoch=epoch,
                epochs=self.config.epochs,
                step=step,
                steps=steps,
                loss=loss,
                validation_loss=closed.validation_loss if closed else None,
                samples_per_s=clock.samples_per_s,
                input_wait_share=clock.wait_share,
                eta_s=0.0 if self.cursor.finished else units_left / max(clock.samples_per_s, 1e-9),
            )
        )


class _Clock:
    """Pace of one epoch."""

    def __init__(self) -> None:
        self.started = self.told = time.perf_counter()
        self.stopped: float | None = None
        self.waited_s = 0.0
        self.samples = 0

    def due(self, every_s: float = 0.5) -> bool:
        """Whether it is time for another report."""
        now = time.perf_counter()
        if now - self.told < every_s:
            return False
        self.told = now
        return True

    def stop(self) -> _Clock:
        """The pace up to now is the epoch's."""
        self.stopped = time.perf_counter()
        return self

    @property
    def _elapsed_s(self) -> float:
        return max((self.stopped or time.perf_counter()) - self.started, 1e-9)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self._elapsed_s

    @property
    def wait_share(self) -> float:
        return self.waited_s / self._elapsed_s


@contextmanager
def _process_group() -> Iterator[None]:
    """The default group, or one of this process alone (in memory: no port, no file)."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
