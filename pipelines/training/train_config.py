"""What is trained (`Task`) and how (`TrainConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn

from features.inputs import Collated


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

    def metrics(self, scalars: dict[str, float]) -> dict[str, float]:
        """What a validation reports, made of the module's scalars but "loss", each a mean over the validation units;
        "normalised_entropy" among them is shown while training."""
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
    keep_best: int = 1
    """Checkpoints kept beside the last one: those of the epochs of least validation loss."""
    background_checkpoints: bool | None = None
    """Write a copy of the state while training goes on, which takes the state's memory once more on each worker; None:
    where a quarter of the free memory holds that copy."""
    ledger: bool = False
    """Each worker writes down which units every step consumed (`pipelines.training.ledger`)."""
    mlflow: str | None = None
    """Also log to the MLflow server at this tracking URI; needs requirements/mlflow.txt."""
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

    def __post_init__(self) -> None:
        if self.keep_best < 1:
            raise ValueError(f"TrainConfig.keep_best is {self.keep_best}: at least 1, for the best epoch is exported")
