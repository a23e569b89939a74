"""Vectors in shards: what an index is built from, a shard in memory at a time.

N vectors of a shard, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class Shards(Protocol):
    """A corpus of vectors by row, that can be read again shard by shard and from several processes."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Vectors in each shard."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when any vector does: a build of another fingerprint is not resumed."""
        ...

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows (N,) int64, vectors (N, D) float16 or float32 of length 1)."""
        ...


@dataclass(frozen=True, slots=True)
class SpooledShards:
    """Chunks that came once, kept as float16 files until the index is built."""

    folder: Path
    counts: tuple[int, ...]
    fingerprint: str = "spooled"

    @classmethod
    def write(cls, chunks: Iterable[tuple[np.ndarray, np.ndarray]], folder: Path) -> SpooledShards:
        """Take all chunks of (rows, vectors) from an iterable; raises ValueError where a vector is not finite."""
        folder.mkdir(parents=True)
        counts = []
        for number, (rows, vector_ND) in enumerate(chunks):
            np.save(folder / f"{number}-rows.npy", np.asarray(rows, np.int64), allow_pickle=False)
            np.save(folder / f"{number}-vectors.npy", np.asarray(vector_ND, np.float16), allow_pickle=False)
            counts.append(len(rows))
        return cls(folder, tuple(counts))

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One chunk, as it came."""
        rows = np.load(self.folder / f"{number}-rows.npy", allow_pickle=False)
        return rows, np.load(self.folder / f"{number}-vectors.npy", allow_pickle=False)


def sample(shards: Shards, wanted: int, seed: int) -> np.ndarray:
    """About `wanted` vectors (N, D) float32, drawn evenly from every shard, in random order."""
    rng = np.random.default_rng(seed)
    share = min(1.0, wanted / max(sum(shards.counts), 1))
    parts = []
    for number, count in enumerate(shards.counts):
        take = int(np.ceil(share * count))
        if take:
            chosen = np.sort(rng.choice(count, take, replace=False))
            parts.append(shards.read(number)[1][chosen].astype(np.float32))
    together = np.concatenate(parts)
    return together[rng.permutation(len(together))]
