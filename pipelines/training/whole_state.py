"""A checkpoint of sharded tensors read as whole, unsharded ones, by one process and without holding them in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict_loader import load

from pipelines.training.checkpoint import CheckpointError
from pipelines.training.row_parts import RowRange
from pipelines.training.train_config import Task

_ALIGNED = 64


def export_model(
    task: Task,
    checkpoint: Path,
    unsharded: Mapping[str, torch.Tensor],
    table_rows: Mapping[str, RowRange],
    out_dir: Path,
    training: str,
) -> None:
    """Hand the checkpoint's model, with the names and shapes of `unsharded`, to the task; then write `training`, what
    the run did. `table_rows`: where the rows of each stored table lie in the unsharded ones. Raises CheckpointError
    where the disk refuses the model."""
    like = {f"model/{name}": tensor for name, tensor in unsharded.items()}
    parts = {f"model/{name}": (f"model/{r.table}", r.start, r.end) for name, r in table_rows.items()}
    scratch = out_dir / "whole.partial"
    try:
        state = read_unsharded(checkpoint, like, parts, scratch)
        task.export({name.removeprefix("model/"): t for name, t in state.items()}, out_dir)
        (out_dir / "training.json").write_text(training)
    except (OSError, SafetensorError) as failed:
        intact = f"All checkpoints are intact, the best is {checkpoint.name}"
        raise CheckpointError.of("the model", out_dir, failed, intact) from failed
    finally:
        scratch.unlink(missing_ok=True)


def read_unsharded(
    checkpoint: Path, like: dict[str, torch.Tensor], parts: dict[str, tuple[str, int, int]], scratch: Path
) -> dict[str, torch.Tensor]:
    """Plain whole tensors of these names and shapes, read by this process alone into a file that backs them: a model
    larger than memory goes through in pieces. `parts`: what is stored as a range of a tensor's rows, by its stored
    name. The tensors end with `scratch`, which the caller removes. Raises OSError where the disk cannot hold it."""
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
    size = max(end, 1)
    with file.open("wb") as made:
        # Without its blocks a full disk would be met as SIGBUS, at the first write into the mapping.
        os.posix_fallocate(made.fileno(), 0, size)
    data = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))
    return {
        name: data[offsets[name] : offsets[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for name, tensor in like.items()
    }
