"""Inverted lists on disk, in the very layout that FAISS's fast-scan kernels read, so that they are searched where they
lie: opening is instant, and processes share the pages.

FAISS keeps fast-scan lists in memory only (`BlockInvertedLists`); but its kernels ask any `InvertedLists` for two
pointers a list, and `OnDiskInvertedLists` answers from a mapped file. A list is there

    capacity * code bytes   codes packed in blocks of 32 (`codes.pack`), then
    capacity * 8            int64 rows, -1 behind the last,           with capacity = size rounded up to 32.

L lists, n vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from candidate_gen.index.codes import BLOCK, pack
from candidate_gen.index.trained import Trained

faiss: Any = _faiss

Piece = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(list, code, row) of vectors sorted by list."""
BATCHED, ONE_BY_ONE = 0, 11
"""FAISS's fast-scan implementations: its own choice, and list by list for one query, results in a reservoir. For one
query of 32 lists and 1,000 results the latter takes 100 us, the former 141."""


def write_lists(
    folder: Path, sizes_L: np.ndarray, pieces: Iterable[tuple[int, int, Iterable[Piece]]], code_bytes: int
) -> None:
    """Write `lists.bin` and `lists.npy`, sequentially: `pieces` yields, for ranges of lists in order, what the shards
    hold of them."""
    with (folder / "lists.bin").open("wb") as file:
        for first, last, of_range in pieces:
            file.write(_lay_out(sizes_L[first:last], first, list(of_range), code_bytes).tobytes())
    np.save(folder / "lists.npy", sizes_L.astype(np.int64), allow_pickle=False)


def _lay_out(sizes_L: np.ndarray, first: int, pieces: list[Piece], code_bytes: int) -> np.ndarray:
    """Bytes of consecutive lists, in units of 32 bytes a byte of code or of row."""
    list_n, code_nB, row_n = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(list_n, kind="stable")
    blocks_L = -(-sizes_L // BLOCK)
    block_start_L = np.cumsum(blocks_L) - blocks_L
    vector_start_L = np.cumsum(sizes_L) - sizes_L
    list_n = list_n[order] - first
    place_n = block_start_L[list_n] * BLOCK + np.arange(len(list_n)) - vector_start_L[list_n]
    n_blocks = int(blocks_L.sum())
    code_PB = np.zeros((n_blocks * BLOCK, code_bytes), np.uint8)
    row_P = np.full(n_blocks * BLOCK, -1, np.int64)
    code_PB[place_n], row_P[place_n] = code_nB[order], row_n[order]
    # A block is code_bytes units of codes and 8 units of rows; a list has all its codes first.
    out = np.empty((n_blocks * (code_bytes + 8), BLOCK), np.uint8)
    owner = np.repeat(np.arange(len(sizes_L)), blocks_L)
    within = np.arange(n_blocks) - block_start_L[owner]
    base = block_start_L[owner] * (code_bytes + 8)
    codes_at = base[:, None] + within[:, None] * code_bytes + np.arange(code_bytes)
    rows_at = base[:, None] + (blocks_L[owner] * code_bytes)[:, None] + within[:, None] * 8 + np.arange(8)
    out[codes_at.ravel()] = pack(code_PB).reshape(-1, BLOCK)
    out[rows_at.ravel()] = row_P.view(np.uint8).reshape(-1, BLOCK)
    return out


class InvertedLists:
    """FAISS indexes over the mapped file, one for many queries at a time and one for a single query."""

    def __init__(self, folder: Path, trained: Trained, n_rows: int) -> None:
        path, code_bytes = folder / "lists.bin", trained.codebook.code_bytes
        self.sizes_L = np.load(folder / "lists.npy", allow_pickle=False)
        capacity_L = -(-self.sizes_L // BLOCK) * BLOCK
        expected = int(capacity_L.sum()) * (code_bytes + 8)
        found = path.stat().st_size if path.exists() else -1
        if len(self.sizes_L) != trained.clusters.lists or found != expected:
            raise ValueError(
                f"{path} has {found:,} bytes, {len(self.sizes_L):,} lists of {code_bytes}-byte codes take "
                f"{expected:,}; build the index again"
            )
        self._mapped = _map_lists(path, self.sizes_L, capacity_L, code_bytes)
        route = _route(trained)
        self.batched = Scan.of(trained, route, self._mapped, n_rows, BATCHED)
        self.single = Scan.of(trained, route, self._mapped, n_rows, ONE_BY_ONE)

    @property
    def lists(self) -> int:
        """L."""
        return len(self.sizes_L)

    def rows(self) -> np.ndarray:
        """(n,) int64: every row in the lists, list by list."""
        return np.concatenate([np.zeros(0, np.int64), *self._rows_by_list()])

    def _rows_by_list(self) -> Iterator[np.ndarray]:
        for number in np.flatnonzero(self.sizes_L):
            pointer = self._mapped.get_ids(int(number))
            yield faiss.rev_swig_ptr(pointer, int(self.sizes_L[number])).copy()


def _map_lists(path: Path, sizes_L: np.ndarray, capacity_L: np.ndarray, code_bytes: int) -> Any:
    lists = faiss.OnDiskInvertedLists()
    lists.filename, lists.read_only = str(path), True
    lists.nlist, lists.code_size = len(sizes_L), code_bytes
    lists.prefetch_nthread = 0  # FAISS would start 32 threads a search to touch the pages: 0.8 ms
    lists.totsize = int(capacity_L.sum()) * (code_bytes + 8)
    offset_L = (np.cumsum(capacity_L) - capacity_L) * (code_bytes + 8)
    table = np.stack([sizes_L, capacity_L, offset_L], axis=1).astype(np.uint64)
    lists.lists.resize(len(sizes_L))
    faiss.memcpy(lists.lists.data(), faiss.swig_ptr(table), table.nbytes)
    if lists.totsize:
        lists.do_mmap()
    return lists


@dataclass(frozen=True, slots=True)
class Scan:
    """FAISS objects from the inside out. Each refers to those before it without owning them, so all are kept."""

    route: tuple[Any, ...]
    """What finds the nearest lists of a mapped query; the last one is the quantizer of `codes`."""
    codes: Any
    """IndexIVFPQFastScan over the mapped lists."""
    to_space: Any
    index: Any
    """Takes full queries: maps them, then scans."""

    @classmethod
    def of(cls, trained: Trained, route: tuple[Any, ...], lists: Any, n_rows: int, implem: int) -> Scan:
        """`n_rows` counts rows, indexed or not: IndexRefine wants as many codes as vectors, and those are by row."""
        codebook, n_lists = trained.codebook, trained.clusters.lists
        query_map_SD = np.tile(trained.query_map_RD, (codebook.stages, 1))  # every nibble is met by its dimension
        width, dim = query_map_SD.shape
        codes = faiss.IndexIVFPQFastScan(route[-1], width, n_lists, codebook.nibbles, 4, faiss.METRIC_INNER_PRODUCT)
        codes.by_residual, codes.is_trained, codes.ntotal, codes.implem = True, True, n_rows, implem
        codebook.install(codes)
        codes.replace_invlists(lists, False)
        to_space = faiss.LinearTransform(dim, width, False)
        faiss.copy_array_to_vector(query_map_SD.ravel(), to_space.A)
        to_space.is_trained = True
        return cls(route, codes, to_space, faiss.IndexPreTransform(to_space, codes))


def _route(trained: Trained) -> tuple[Any, ...]:
    """Exact products with every centroid. Few dimensions make them cheap: 65,536 of 16 take 0.2 ms, and 4-bit codes of
    the centroids would lose half of the recall to save half of that."""
    centroid_LR = trained.clusters.centroid_LD
    flat = faiss.IndexFlatIP(centroid_LR.shape[1])
    flat.add(centroid_LR)
    if trained.codebook.stages == 1:
        return (flat,)
    width = centroid_LR.shape[1]
    first = faiss.RemapDimensionsTransform(trained.codebook.stages * width, width, False)
    return first, flat, faiss.IndexPreTransform(first, flat)
