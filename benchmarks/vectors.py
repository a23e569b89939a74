"""The corpus that retrieval is measured on, read in blocks, and the exact answers to its queries.

A corpus is a folder: `videos-00000.npy`, `videos-00001.npy` ... (float16, any number of rows each, all of the same
width, unit length), `queries.npy` and `train_queries.npy` (float32, of the same width). Video i is the i-th row over
all shards in order. Q queries, K results, D width, B the rows of a block, N videos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candidate_gen.index.check import exact_top


@dataclass(frozen=True, slots=True)
class Corpus:
    """Vectors on disk; no method but `matrix` holds more than a block of them."""

    folder: Path
    shards: tuple[Path, ...]
    ends: tuple[int, ...]
    """Number of videos up to and including each shard."""
    dim: int

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Read the shards' headers; raises ValueError when the folder holds none or they differ in type or width."""
        shards = tuple(sorted(folder.glob("videos-*.npy")))
        headers = [np.load(shard, mmap_mode="r", allow_pickle=False) for shard in shards]
        kinds = {(header.dtype.name, header.shape[1:]) for header in headers}
        if len(kinds) != 1 or next(iter(kinds))[0] != "float16" or headers[0].ndim != 2:
            raise ValueError(
                f"{folder} needs videos-*.npy of float16 (rows, D), all of one width; found {kinds or 'none'}"
            )
        ends = tuple(np.cumsum([len(header) for header in headers]).tolist())
        return cls(folder, shards, ends, headers[0].shape[1])

    def __len__(self) -> int:
        return self.ends[-1]

    def blocks(self, n: int, size: int = 65_536) -> Iterator[tuple[int, np.ndarray]]:
        """The first n videos as (number of the first, float16 (B, D)), B <= size, read as they are asked for."""
        if n > len(self):
            raise ValueError(f"{self.folder} holds {len(self):,} videos, {n:,} were asked for; write more shards")
        for shard, end in zip(self.shards, self.ends, strict=True):
            rows_BD = np.load(shard, mmap_mode="r", allow_pickle=False)
            first = end - len(rows_BD)
            for start in range(0, min(len(rows_BD), n - first), size):
                yield first + start, np.asarray(rows_BD[start : min(start + size, n - first)])

    def matrix(self, n: int) -> np.ndarray:
        """The first n videos as float32 (n, D)."""
        vector_ND = np.empty((n, self.dim), np.float32)
        for start, block_BD in self.blocks(n):
            vector_ND[start : start + len(block_BD)] = block_BD
        return vector_ND

    def fingerprint(self, n: int) -> str:
        """Short name of the first n videos, from a sample of their rows: a cached result belongs to these vectors."""
        digest = hashlib.sha256(f"{n} {self.dim}".encode())
        for shard in self.shards:
            rows_BD = np.load(shard, mmap_mode="r", allow_pickle=False)
            digest.update(np.ascontiguousarray(rows_BD[:: max(len(rows_BD) // 64, 1)]).tobytes())
            n -= len(rows_BD)
            if n <= 0:
                break
        return digest.hexdigest()[:12]

    def queries(self, count: int) -> np.ndarray:
        """The first `count` queries, float32 (Q, D)."""
        return self._queries("queries.npy", count)

    def train_queries(self, count: int) -> np.ndarray:
        """Up to `count` queries that no figure is taken on, float32 (Q, D): an index may learn from them."""
        return self._queries("train_queries.npy", count)

    def _queries(self, name: str, count: int) -> np.ndarray:
        query_QD = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        if query_QD.ndim != 2 or query_QD.shape[1] != self.dim:
            raise ValueError(f"{self.folder / name} has shape {query_QD.shape}, the videos are {self.dim} wide")
        return np.array(query_QD[:count], np.float32)


def numbered(blocks: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of `Corpus.blocks` with the number of each video."""
    for start, vector_BD in blocks:
        yield np.arange(start, start + len(vector_BD)), vector_BD


def exact_answers(
    corpus: Corpus, n: int, query_QD: np.ndarray, k: int, cache: Path, on_progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Numbers (Q, k) of the best among the first n videos, kept in `cache`."""
    asked = hashlib.sha256(query_QD.tobytes()).hexdigest()[:12]
    path = cache / f"exact-{corpus.fingerprint(n)}-{asked}-{k}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    best_QK, _ = exact_top(numbered(corpus.blocks(n)), query_QD, k, on_progress)
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, best_QK, allow_pickle=False)
    return best_QK
