"""Encoded users or videos: one row each, ready to be gathered into a batch; in memory or memory-mapped.

N entities, W sparse slots, D dense width. Row 0 is the unknown entity, row r belongs to `ids[r - 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ByRow(Protocol):
    """Values by row: an array, or what gives one for each list of rows."""

    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class SparseColumns:
    """Where each sparse feature lies in the W slots of a row, and how many rows its embedding table has."""

    names: tuple[str, ...]
    widths: tuple[int, ...]
    table_rows: tuple[int, ...]

    def slice(self, name: str) -> slice:
        """The slots of one feature."""
        position = self.names.index(name)
        start = sum(self.widths[:position])
        return slice(start, start + self.widths[position])


class Encoded(Protocol):
    """What `features.inputs.assemble` gathers from: `Entities`, or a catalogue that grows."""

    @property
    def sparse(self) -> ByRow: ...

    @property
    def dense(self) -> ByRow: ...

    @property
    def columns(self) -> SparseColumns: ...


@dataclass(frozen=True, slots=True)
class Entities:
    """Users or videos as arrays."""

    ids: np.ndarray
    """(N,) int64, sorted ascending."""
    sparse: np.ndarray
    """(N+1, W) int32 embedding rows (not ids); -1 where a multi-valued feature has fewer values."""
    dense: np.ndarray
    """(N+1, D) float32: standardised numbers, then content embeddings."""
    columns: SparseColumns

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, ids_M: np.ndarray) -> np.ndarray:
        """Ids (M,) int64 -> rows (M,) int64, 0 for an id that is not here."""
        if len(self.ids) == 0:
            return np.zeros(len(ids_M), dtype=np.int64)
        at = np.searchsorted(self.ids, ids_M)
        at_clipped = np.minimum(at, len(self.ids) - 1)
        return np.where(self.ids[at_clipped] == ids_M, at_clipped + 1, 0).astype(np.int64)

    def ids_of(self, rows_M: np.ndarray) -> np.ndarray:
        """Rows (M,) in 1 .. N -> ids (M,) int64."""
        return self.ids[np.asarray(rows_M) - 1]

    def save(self, folder: Path, prefix: str) -> None:
        """Write `PREFIX_ids.npy`, `PREFIX_sparse.npy`, `PREFIX_dense.npy` into an existing folder."""
        for field in ("ids", "sparse", "dense"):
            np.save(folder / f"{prefix}_{field}.npy", getattr(self, field), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, prefix: str, columns: SparseColumns) -> Entities:
        """Memory-map what `save` wrote; a second process on the machine shares the pages."""
        arrays = {field: mapped(folder / f"{prefix}_{field}.npy") for field in ("ids", "sparse", "dense")}
        return cls(columns=columns, **arrays)


def mapped(file: Path) -> np.ndarray:
    """A memory-mapped .npy as a plain array: gathering from an `np.memmap` pays for its subclass at each batch."""
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
