"""What a training run tells about itself, while it goes on and at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from pipelines.training.cursor import EpochReport
from pipelines.training.sharding import TablePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a run tells about itself, a few times a second."""

    name: str
    epoch: int
    epochs: int
    step: int
    steps: int
    steps_done: int
    """Since the start of the run."""
    loss: float
    """Mean over the units of this epoch so far."""
    validation_loss: float | None
    """Of the epoch that just ended; None inside an epoch."""
    metrics: dict[str, float]
    """Of the last validation; empty before the first."""
    lr_dense: float
    lr_sparse: float
    samples_per_s: float
    input_wait_share: float
    eta_s: float
    """Training time left if no epoch is saved by early stopping."""

    def line(self) -> str:
        """For people, in one line."""
        entropy = self.metrics.get("normalised_entropy")
        validated = "" if entropy is None else f"normalised entropy {entropy:.4f} "
        return (
            f"{self.name}, epoch {self.epoch + 1}/{self.epochs}, step {self.step}/{self.steps} loss {self.loss:.4f} "
            f"{validated}{self.samples_per_s:,.0f} samples/s, {self.eta_s:.0f} s left"
        )


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

    def summary(self) -> str:
        """For people, in one line."""
        waited = sum(epoch.input_wait_share for epoch in self.epochs) / len(self.epochs)
        return (
            f"{self.name}: {len(self.epochs)} epochs, validation loss {self.best_validation_loss:.4f} at epoch "
            f"{self.best_epoch + 1}, {waited:.0%} of the time waiting for input"
        )

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


class Pace:
    """Samples/s of one epoch, and what its time went to beside training."""

    def __init__(self) -> None:
        self.started = self.told = time.perf_counter()
        self.stopped: float | None = None
        self.samples = 0
        self.waited_s = {"input": 0.0, "checkpoint": 0.0}

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Count the block's time as waiting for "input" or "checkpoint"."""
        asked = time.perf_counter()
        yield
        self.waited_s[what] += time.perf_counter() - asked

    def due(self, every_s: float = 0.5) -> bool:
        """Whether it is time for another report."""
        now = time.perf_counter()
        if now - self.told < every_s:
            return False
        self.told = now
        return True

    def stop(self) -> Pace:
        """The pace up to now is the epoch's."""
        self.stopped = time.perf_counter()
        return self

    @property
    def _elapsed_s(self) -> float:
        return max((self.stopped or time.perf_counter()) - self.started, 1e-9)

    @property
    def samples_per_s(self) -> float:
        return self.samples / self._elapsed_s

    def share_waiting_for(self, what: str) -> float:
        """Of the time so far."""
        return self.waited_s[what] / self._elapsed_s
