"""A model that trains on from another run's end: its parameters, tables and optimizers, and new owners for old rows.

An id that was not known has no row of its own: it begins as the unknown id, whose row id dropout has trained, and not
as noise, nor as the id that had the row before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from pipelines.training.row_parts import RowRange
from pipelines.training.workers import told_by_workers


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStart:
    """Where a fresh run begins."""

    checkpoint: Path
    """Of the earlier run, of the same model; any number of workers may have written it."""
    renewed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By SIDE.FEATURE: embedding rows (R,) int64 that belong to other ids than before."""


@torch.no_grad()
def renew_rows(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, RowRange], renewed: Mapping[str, np.ndarray]
) -> None:
    """Give rows the values of their table's row 0, the unknown id's, and no gradient history; called by all workers.

    `tensors`: the trainer's state, "model/TABLE" with its accumulators "fused/TABLE/..."; `rows`: where each table lies
    in the unsharded module, by TABLE. A feature that the model does not read has no table, and nothing to renew."""
    wanted = {_table(feature): values for feature, values in renewed.items()}
    of_unknown_id = _first_rows(tensors, rows)
    for name, where in rows.items():
        if where.table not in wanted:
            continue
        for first, weight_RD in _held(tensors[f"model/{name}"]):
            weight_RD[_inside(wanted[where.table], where.start + first, len(weight_RD))] = of_unknown_id[where.table]
        for state in (tensor for key, tensor in tensors.items() if key.startswith(f"fused/{name}/")):
            for first, values_R in _held(state):
                values_R[_inside(wanted[where.table], where.start + first, len(values_R))] = 0.0


def _first_rows(tensors: Mapping[str, torch.Tensor], rows: Mapping[str, RowRange]) -> dict[str, torch.Tensor]:
    """Row 0 of every table, from whichever worker holds it."""
    own = {
        where.table: part[0].clone()
        for name, where in rows.items()
        for first, part in _held(tensors[f"model/{name}"])
        if where.start + first == 0 and len(part)
    }
    return {table: row for found in told_by_workers(own) for table, row in found.items()}


def _held(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, values) of what this worker has of a tensor."""
    if not isinstance(tensor, ShardedTensor):
        yield 0, tensor
        return
    for part in tensor.local_shards():
        yield part.metadata.shard_offsets[0], part.tensor


def _inside(rows: np.ndarray, start: int, count: int) -> torch.Tensor:
    """Those of the rows in start .. start+count, counted from start."""
    return torch.from_numpy(rows[(rows >= start) & (rows < start + count)] - start)


def _table(feature: str) -> str:
    """State name of the table of SIDE.FEATURE."""
    side, _, name = feature.partition(".")
    return f"{side}_ebc.embedding_bags.{name}.weight"
