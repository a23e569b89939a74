"""Where large arrays are made: in memory, or as memory-mapped .npy files that are filled in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""(name, shape, dtype) -> an array to be filled; its first contents are arbitrary."""


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of this process; its name is not used."""
    return np.empty(shape, dtype)


def in_folder(folder: Path) -> Allocate:
    """Arrays that are `folder/NAME.npy`, as `numpy.save` would have written them."""

    def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        path = folder / f"{name}.npy"
        if 0 in shape:  # nothing to map
            np.save(path, np.empty(shape, dtype), allow_pickle=False)
            return np.empty(shape, dtype)
        # A plain array over the map: an np.memmap makes each slice pay for its subclass.
        return np.asarray(np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape))

    return allocate


def shards(ends: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Owners 0 .. n-1 in contiguous ranges [first, last) of at most `most` entries each, or of one owner with more.

    `ends[i]` counts the entries of owners 0 .. i, ascending.
    """
    ranges, first, before = [], 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(ends, before + most, side="right")), first + 1)
        ranges.append((first, last))
        first, before = last, int(ends[last - 1])
    return ranges
