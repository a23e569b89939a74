"""Where a training run stands, and what each of its epochs did: the JSON beside a checkpoint's tensors.

All randomness is reseeded from (seed, epoch, step), so that a position is the random state too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What one epoch did; losses are means over units, of all workers."""

    epoch: int
    train_loss: float
    validation_loss: float
    metrics: dict[str, float]
    """What the task makes of the module's other scalars, over the validation units."""
    samples_per_s: float
    input_wait_share: float
    """Share of the epoch's training time the first worker waited for input."""
    checkpoint_wait_share: float
    """Share of that time checkpoints inside the epoch held it up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a run stands. Counted in units, not steps, so that another number of workers can go on from it."""

    recipe: dict[str, str | int]
    """What must not change between a run and its resumption."""
    epoch: int = 0
    units_done: int = 0
    """Units of this epoch consumed, over all workers."""
    epoch_loss_sum: float = 0.0
    """Sum over those units of the training loss."""
    steps_done: int = 0
    """Optimizer steps since the start of the run."""
    best_epoch: int = -1
    finished: bool = False
    epochs: tuple[EpochReport, ...] = ()

    @property
    def epoch_just_closed(self) -> EpochReport | None:
        """The last epoch's report, if no step was made since; None inside an epoch."""
        return self.epochs[-1] if self.epochs and self.units_done == 0 else None

    @property
    def train_loss(self) -> float:
        """Mean over the units of this epoch so far."""
        return self.epoch_loss_sum / self.units_done

    def after_step(self, units: int, mean_loss: float) -> Cursor:
        """One step on, in which all workers together took so many units."""
        return replace(
            self,
            units_done=self.units_done + units,
            epoch_loss_sum=self.epoch_loss_sum + mean_loss * units,
            steps_done=self.steps_done + 1,
        )

    def after_epoch(self, report: EpochReport) -> Cursor:
        """At the start of the next epoch."""
        best = all(report.validation_loss < earlier.validation_loss for earlier in self.epochs)
        return replace(
            self,
            epoch=self.epoch + 1,
            units_done=0,
            epoch_loss_sum=0.0,
            best_epoch=self.epoch if best else self.best_epoch,
            epochs=(*self.epochs, report),
        )

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "epochs": tuple(EpochReport(**e) for e in fields["epochs"])})


def read_cursor(checkpoint: Path) -> Cursor:
    """Position and history stored with a checkpoint."""
    return Cursor.from_json((checkpoint / "cursor.json").read_text())
