"""This project's index for the benchmarks: build it from a corpus into a folder, open the folder, search video numbers.

The only module of the benchmarks that knows how the index is built and swept. Video i of a corpus is row i + 1 of the
index (row 0 is never returned). Q queries, K results, D width.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.building import Rate
from benchmarks.vectors import Corpus
from candidate_gen.index import IndexConfig, VideoIndex

NAME = "reelrank"
PROBES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
REFINE = (2, 4, 8)


def build(corpus: Corpus, n: int, folder: Path) -> dict[str, float]:
    """Index the first n videos into `folder`; wall seconds by stage."""
    start = time.perf_counter()
    chunks = (
        (np.arange(first + 1, first + 1 + len(block_BD)), block_BD.astype(np.float32))
        for first, block_BD in corpus.blocks(n)
    )
    index = VideoIndex.build(chunks, n + 1, IndexConfig(), Rate(NAME, n))
    built = time.perf_counter()
    index.save(folder)
    return {"train, assign, encode": built - start, "write": time.perf_counter() - built}


def build_layout(corpus: Corpus, n: int, folder: Path) -> dict[str, float]:
    """Write an index of n videos in the real layout with codes drawn at random; wall seconds by stage."""
    raise NotImplementedError(f"{folder}: this index has no layout on disk that could be drawn for {n:,} videos")


class OurIndex:
    """An opened index that answers in video numbers."""

    def __init__(self, folder: Path) -> None:
        self._index = VideoIndex.load(folder)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        probes: int = 0,
        refine: int = 0,
        allowed_rows: np.ndarray | None = None,
        excluded_rows: np.ndarray | None = None,
    ) -> np.ndarray:
        """Numbers (Q, k), -1 pads; `probes` and `refine` 0 keep the index's own."""
        index = self._index if not probes else self._swept(probes, refine)
        row_QK, _ = index.search(query_QD, k, allowed=allowed_rows, excluded_rows=excluded_rows)
        return np.where(row_QK > 0, row_QK - 1, -1)

    def as_filter(self, mask_N: np.ndarray) -> np.ndarray:
        """A bool a video as `search` takes it in `allowed_rows`."""
        return np.concatenate([[False], mask_N])

    def _swept(self, probes: int, refine: int) -> VideoIndex:
        index = copy.copy(self._index)
        index._config = replace(self._index._config, probes=probes, refine=refine)
        return index
