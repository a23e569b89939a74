"""Checkpoints of a training run: tensors by torch.distributed.checkpoint, position and history as JSON beside them.

    FOLDER/step-000000400/{*.distcp, .metadata, cursor.json}    FOLDER/{last,best}.json name one of them

A checkpoint appears under its name only when complete, and may be read by any number of workers: every tensor is
stored under its unsharded name and shape. It is the trainer's own, local and trusted: what serving reads is exported.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochReport:
    """What one epoch did; losses are means over units, of all workers."""

    epoch: int
    train_loss: float
    validation_loss: float
    metrics: dict[str, float]
    """Other scalars of the module, over the validation units."""
    samples_per_s: float
    input_wait_share: float
    """Share of the epoch's training time the first worker waited for input."""


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

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "epochs": tuple(EpochReport(**e) for e in fields["epochs"])})


class Checkpoints:
    """The last and the best checkpoint of a run; `save` and `load` are called by all workers together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, tensors: dict[str, torch.Tensor], cursor: Cursor, *, best: bool) -> None:
        """Write beside, rename, point `last` (and `best`) at it, drop what nothing points at."""
        name = f"step-{cursor.steps_done:09d}{'-end' if best or cursor.units_done == 0 else ''}"
        beside = self.folder / f".{name}.partial"
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        # The writer keeps a copy of every shard until its file is complete: large ones get a file each.
        one_file = sum(_held_bytes(tensor) for tensor in tensors.values()) < ONE_FILE_BYTES
        save(dict(tensors), storage_writer=FileSystemWriter(beside, single_file_per_rank=one_file))
        if first:
            (beside / "cursor.json").write_text(cursor.to_json())
            shutil.rmtree(self.folder / name, ignore_errors=True)
            beside.rename(self.folder / name)
            for pointer in ("last", "best") if best else ("last",):
                _replace(self.folder / f"{pointer}.json", json.dumps({"checkpoint": name}))
            self._drop_unnamed()
        dist.barrier()

    def find(self, pointer: str) -> Path | None:
        """Folder of the "last" or the "best" checkpoint; None before the first."""
        file = self.folder / f"{pointer}.json"
        return self.folder / json.loads(file.read_text())["checkpoint"] if file.exists() else None

    def load(self, checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the tensors in place, whatever their sharding was when saved."""
        load(dict(tensors), checkpoint_id=checkpoint)

    def clear(self) -> None:
        """Forget everything; called by all workers together."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        dist.barrier()

    def _drop_unnamed(self) -> None:
        kept = {self.find("last"), self.find("best")}
        for folder in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


ONE_FILE_BYTES = 2**30
"""State of a worker up to which its part of a checkpoint is one file."""


def _held_bytes(tensor: torch.Tensor) -> int:
    """Bytes that this worker holds of a tensor."""
    if isinstance(tensor, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in tensor.local_shards())
    return tensor.nbytes


def read_cursor(checkpoint: Path) -> Cursor:
    """Position and history stored with the checkpoint."""
    return Cursor.from_json((checkpoint / "cursor.json").read_text())


def read_unsharded(
    checkpoint: Path, like: dict[str, torch.Tensor], parts: dict[str, tuple[str, int, int]], scratch: Path
) -> dict[str, torch.Tensor]:
    """Plain whole tensors of these names and shapes, read by this process alone into a file that backs them: a model
    larger than memory goes through in pieces. `parts`: what is stored as a range of a tensor's rows, by its stored
    name. The tensors end with `scratch`, which the caller removes."""
    whole = _mapped_tensors(like, scratch)
    in_parts = {name for name, _, _ in parts.values()}
    stored = {name: tensor for name, tensor in whole.items() if name not in in_parts}
    stored |= {name: whole[of][start:end] for name, (of, start, end) in parts.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(stored), checkpoint_id=checkpoint, no_dist=True)
    return whole


def _mapped_tensors(like: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of these shapes in a fresh file."""
    offsets, end = {}, 0
    for name, tensor in like.items():
        offsets[name] = end
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    data = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(max(end, 1),)))
    return {
        name: data[offsets[name] : offsets[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for name, tensor in like.items()
    }


_ALIGNED = 64


def _replace(file: Path, text: str) -> None:
    beside = file.with_suffix(".partial")
    beside.write_text(text)
    os.replace(beside, file)
