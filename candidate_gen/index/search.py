"""The video index: filtered inside the search, never short of results that exist, opened where it lies.

Q queries, K results, D width, V rows of the catalogue (row 0 is nobody's). A search meets the nearest lists' codes, and
the best of these again with the stored vectors: one call into FAISS. A filter that leaves few videos is answered by a
scan of just these; a query that came up short is asked again over more lists.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss as _faiss
import numpy as np
import torch

from candidate_gen.index.build import Progress, build, read_description, verify
from candidate_gen.index.config import IndexConfig
from candidate_gen.index.device import is_cpu
from candidate_gen.index.exact import ExactScan
from candidate_gen.index.filters import Excluded, RowFilter, distinct, lists_of, places
from candidate_gen.index.lists import InvertedLists
from candidate_gen.index.selectors import Masks, parameters, selector_of
from candidate_gen.index.shards import SpooledShards
from candidate_gen.index.stored import StoredVectors
from candidate_gen.index.trained import Trained

faiss: Any = _faiss

SCAN_BLOCK = 65_536


class VideoIndex:
    """Rows of `Entities` by inner product with a query; immutable, threads share it."""

    def __init__(self, folder: Path, scan_on: str | None = None) -> None:
        """Open what `build` wrote and somebody has verified: a bundle's manifest, or `open`. Raises ValueError when a
        file is not what index.json says. With `scan_on`, a device of torch, every search is exact: all vectors are held
        in its memory in float16 (128 bytes and a row's 8 of a 64-wide one), and the lists stay closed."""
        described, self.config = read_description(folder / "index.json")
        self.folder, self.kind, self.n_rows = folder, described["kind"], described["n_rows"]
        self.vectors = StoredVectors(folder / "stored.faiss")
        """`vectors[rows]` decodes (n, D) float32."""
        bits = np.load(folder / "indexed.npy", allow_pickle=False)
        if self.vectors.n_rows != self.n_rows or len(bits) != -(-self.n_rows // 8):
            raise ValueError(
                f"{folder}: stored.faiss, indexed.npy and index.json differ in rows; build the index again"
            )
        self.everything = RowFilter(bits, int(np.bitwise_count(bits).sum()), everything=True)
        if self.everything.count != described["videos"]:
            raise ValueError(f"{folder}: indexed.npy and index.json differ in videos; build the index again")
        self.underfilled = 0
        """Queries that were answered with fewer rows than exist; counted so that it can be watched to stay 0."""
        self._exact = None
        self.slots = None if scan_on is None or is_cpu(scan_on) else 1
        """Searches at once that there is room for, where they share work; None: one a core."""
        if scan_on is not None:
            self._exact = ExactScan(self.vectors, _rows_of(bits), scan_on, torch.float16)
        elif self.kind == "flat":
            self._exact = ExactScan(self.vectors, _rows_of(bits), "cpu", torch.float32)
        else:
            self.trained = Trained.load(folder)
            self._lists = InvertedLists(folder, self.trained, self.n_rows)
            self._batched, self._single = (
                faiss.IndexRefine(scan.index, self.vectors.index) for scan in (self._lists.batched, self._lists.single)
            )
            self._probes = self.config.probes_for(self._lists.lists)
            self._masks = Masks(self.n_rows)

    @classmethod
    def build(
        cls,
        vectors: Iterable[tuple[np.ndarray, np.ndarray]],
        n_rows: int,
        config: IndexConfig,
        folder: Path,
        on_progress: Callable[[Progress], None] = lambda _: None,
        query_QD: np.ndarray | None = None,
    ) -> VideoIndex:
        """Index chunks of (rows, float32 vectors of length 1) that come once; see `build.build` for shards on disk."""
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix="spool-") as spool:
            shards = SpooledShards.write(vectors, Path(spool) / "v")
            build(shards, n_rows, config, folder, query_QD=query_QD, on_progress=on_progress)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> VideoIndex:
        """Hash every file, then open; a damaged one is refused by name before any parser sees it."""
        verify(folder)
        return cls(folder)

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors.dim

    def __len__(self) -> int:
        return self.everything.count

    def copy_to(self, folder: Path) -> None:
        """The same index in another folder (created)."""
        shutil.copytree(self.folder, folder)

    def allow(self, passing: np.ndarray) -> RowFilter:
        """A filter from a bool a row (V,) or its packed bits (V / 8,) uint8, for as many searches as wanted."""
        if passing.dtype == bool:
            if len(passing) != self.n_rows:
                raise ValueError(f"`allowed` has {len(passing)} rows, the index {self.n_rows}")
            passing = np.packbits(passing, bitorder="little")
        if len(passing) != len(self.everything.bits):
            raise ValueError(f"`allowed` has {8 * len(passing)} bits, the index {self.n_rows} rows")
        bits = passing & self.everything.bits
        count = int(np.bitwise_count(bits).sum())
        rows = _rows_of(bits) if count <= 2 * self.config.exact_below else None
        return RowFilter(bits, count, count == len(self), rows)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        allowed: RowFilter | np.ndarray | None = None,
        excluded_rows: Excluded | None = None,
        probes: int | None = None,
        rerank: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best rows (Q, k) int64 and scores (Q, k) float32, padded with -1 and -inf; k results wherever k exist.

        `allowed` is a bool a row, or better a `RowFilter` (nothing of the catalogue's size is then touched);
        `excluded_rows` lists further rows to leave out, seen videos or blocked authors': one array for all queries, or
        a list of one array a query. Each query is answered as it would be alone, but for the order of equal scores, or
        exactly, where another's exclusions leave so few rows that all are scanned. `probes` and `rerank` stand in for
        the configuration's.
        """
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        if query_QD.ndim != 2 or query_QD.shape[1] != self.dim:
            raise ValueError(f"queries have shape {query_QD.shape}; this index wants (any, {self.dim})")
        if allowed is None:
            allowed = self.everything
        elif not isinstance(allowed, RowFilter):
            allowed = self.allow(allowed)
        n, excluded = len(query_QD), lists_of(excluded_rows, len(query_QD))
        scarce = allowed.count - max(map(len, excluded)) < max(k, self.config.exact_below)
        if scarce or self._exact is not None:
            excluded = tuple(distinct(rows, allowed.bits) for rows in excluded)
        most_left = allowed.count - min(map(len, excluded))
        if min(k, most_left) <= 0 or not n:
            shape = (n, max(k, 0))
            return np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        if self._exact is not None:
            return self._exact.search(query_QD, k, allowed, excluded)
        if scarce and most_left <= max(self.config.exact_below, 2 * k):
            return self._scan(query_QD, k, allowed, excluded)
        if len(excluded) == 1:
            return self._search_lists(query_QD, k, min(k, most_left), allowed, excluded[0], probes, rerank)
        options = {"allowed": allowed, "probes": probes, "rerank": rerank}
        alone = [self.search(query_QD[q : q + 1], k, excluded_rows=excluded[q], **options) for q in range(n)]
        return np.concatenate([rows for rows, _ in alone]), np.concatenate([scores for _, scores in alone])

    def shares_work(self, allowed: RowFilter, k: int) -> bool:
        """Whether searches under a filter cost less asked together, each with exclusions of its own: a scan of all that
        passes reads it once for all (20,000 videos for 8 queries: 1.6 to 2.4 times as many a second). Inverted lists do
        not: FAISS's search of many at a time takes more CPU than one by one up to some 32 queries, at a million videos
        and at a hundred million, and knows one selector for all of them."""
        return self._exact is not None or allowed.count <= max(self.config.exact_below, 2 * k)

    def _search_lists(
        self,
        query_QD: np.ndarray,
        k: int,
        expected: int,
        allowed: RowFilter,
        excluded: np.ndarray,
        probes: int | None,
        rerank: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search the lists; queries that found fewer than `expected` are asked again over four times as many."""
        lists = self._lists.lists
        index = self._single if len(query_QD) == 1 else self._batched
        probes = min(probes or self._first_probes(allowed.count), lists)
        found = k * rerank if rerank else max(k, min(k * self.config.rerank, self.config.rerank_at_most))
        with self._masks.without(excluded) as mask:
            selector, keep = selector_of(None if allowed.everything else allowed.bits, mask)
            score_QK, row_QK = index.search(query_QD, k, params=parameters(probes, found / k, selector))
            short = row_QK[:, expected - 1] < 0
            while short.any() and probes < lists:
                probes = min(4 * probes, lists)
                params = parameters(probes, found / k, selector)
                score_QK[short], row_QK[short] = index.search(query_QD[short], k, params=params)
                short = row_QK[:, expected - 1] < 0
            del keep
        if expected < k:
            score_QK[row_QK < 0] = -np.inf
        self.underfilled += int(short.sum())
        return row_QK, score_QK

    def _first_probes(self, n_allowed: int) -> int:
        """The fewer videos pass, the further away the best of them lie: twice the lists for a quarter of the videos."""
        return int(self._probes * np.sqrt(len(self) / n_allowed))

    def _scan(
        self, query_QD: np.ndarray, k: int, allowed: RowFilter, excluded: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Exact search of the allowed rows, in pieces that fit the cache and the memory."""
        n = len(query_QD)
        best = np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32)
        rows = _rows_of(allowed.bits) if allowed.rows is None else allowed.rows
        if len(excluded) == 1 and len(excluded[0]):
            rows = np.setdiff1d(rows, excluded[0], assume_unique=True)
        for start in range(0, len(rows), SCAN_BLOCK):
            piece = rows[start : start + SCAN_BLOCK]
            score_QM = query_QD @ self.vectors[piece].T
            if len(excluded) > 1:
                score_QM[places(excluded, piece)] = -np.inf
            best = _merge(best, piece, score_QM)
        best[0][np.isneginf(best[1])] = -1
        return best


def _rows_of(bits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(bits, bitorder="little"))


def _merge(
    best: tuple[np.ndarray, np.ndarray], rows_M: np.ndarray, score_QM: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of `best` and new columns, best first, ties by row; -1 and -inf pad."""
    k = best[0].shape[1]
    if len(rows_M) > 4 * k:
        top_QK = np.argpartition(-score_QM, k, axis=1)[:, :k]
        row_QM, score_QM = rows_M[top_QK], np.take_along_axis(score_QM, top_QK, 1)
    else:
        row_QM = np.broadcast_to(rows_M, score_QM.shape)
    row_QM, score_QM = np.concatenate([best[0], row_QM], axis=1), np.concatenate([best[1], score_QM], axis=1)
    order = np.lexsort((row_QM, -score_QM), axis=1)[:, :k]
    return np.take_along_axis(row_QM, order, 1), np.take_along_axis(score_QM, order, 1)
