"""This project's index for the benchmarks: build it from a corpus into a folder, open the folder, search video numbers.

The only module of the benchmarks that knows how the index is built and swept. Video i of a corpus is row i + 1 of the
index (row 0 is never returned). Q queries, K results, D width, L lists.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.building import THREADS, Rate
from benchmarks.vectors import Corpus
from candidate_gen.index import IndexConfig, Progress, RowFilter, VideoIndex
from candidate_gen.index import build as build_index
from candidate_gen.index.build import describe, digests
from candidate_gen.index.lists import Piece, write_lists
from candidate_gen.index.shards import sample
from candidate_gen.index.stored import StoredVectors, create
from candidate_gen.index.trained import Trained

NAME = "reelrank"
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
REFINE = (1, 2, 3, 4)
SHARD = 1_000_000
CONFIG = IndexConfig(stored="int8")
"""Of the comparisons by memory and speed; by itself the index keeps up to two million vectors as float16."""


@dataclass(frozen=True, slots=True)
class CorpusShards:
    """The first n videos of a corpus, a million a shard, as the index builder reads them."""

    folder: Path
    n: int

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(min(SHARD, self.n - first) for first in range(0, self.n, SHARD))

    @property
    def fingerprint(self) -> str:
        return Corpus.open(self.folder).fingerprint(self.n)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = number * SHARD, min((number + 1) * SHARD, self.n)
        corpus = Corpus.open(self.folder)
        parts = []
        for shard, end in zip(corpus.shards, corpus.ends, strict=True):
            rows_BD = np.load(shard, mmap_mode="r", allow_pickle=False)
            begin = end - len(rows_BD)
            if begin < last and first < end:
                parts.append(rows_BD[max(first - begin, 0) : last - begin])
        return np.arange(first + 1, last + 1), parts[0] if len(parts) == 1 else np.concatenate(parts)


def build(corpus: Corpus, n: int, folder: Path, config: IndexConfig = CONFIG) -> dict[str, float]:
    """Index the first n videos into `folder`; wall seconds by stage. One shard is encoded by
    this process on two threads, several by two processes of one thread."""
    shards, query_QD = CorpusShards(corpus.folder, n), corpus.train_queries(10_000)
    build_it = partial(build_index, shards, n + 1, config, folder, query_QD=query_QD, on_progress=_Teller())
    if len(shards.counts) == 1:
        return build_it()
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # for the processes started below
    with ProcessPoolExecutor(THREADS, mp_context=multiprocessing.get_context("spawn")) as pool:
        return build_it(parallel=pool.map)


class _Teller:
    """Prints a build's progress, at most every ten seconds."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._told >= 10:
            self._told = time.monotonic()
            print(f"{NAME}: {progress}", flush=True)


def build_layout(corpus: Corpus, n: int, folder: Path) -> dict[str, float]:
    """Write an index of n videos in the real layout with codes drawn at random; wall seconds by stage.

    Lists are trained on the corpus and as long as its videos make them; rows are spread over all lists, as they are
    when a catalogue is numbered by id. Stored vectors are int4: what fits 300 million videos into 18 GiB."""
    start = time.perf_counter()
    config = replace(IndexConfig(), stored="int4", kind="ivf")
    lists = config.lists_for(n)
    shards = CorpusShards(corpus.folder, min(n, len(corpus)))
    sample_ND = sample(shards, 40 * lists, config.seed)
    trained = Trained.fit(sample_ND, lists, config, corpus.train_queries(10_000))
    trained.save(folder)
    list_N = trained.encode(sample_ND)[0]
    trained_at = time.perf_counter()
    share_L = np.bincount(list_N, minlength=lists) + 0.5
    sizes_L = np.random.default_rng(1).multinomial(n, share_L / share_L.sum())
    code_bytes = trained.codebook.code_bytes
    write_lists(folder, sizes_L, _random_pieces(sizes_L, n, code_bytes), code_bytes)
    create(folder / "stored.faiss", sample_ND[:262_144], n + 1, config.stored)
    code_RB, rate, rng = (
        StoredVectors(folder / "stored.faiss", writable=True),
        Rate("layout", n),
        np.random.default_rng(2),
    )
    for first in range(1, n + 1, SHARD):
        few_ND = sample_ND[rng.integers(0, len(sample_ND), min(SHARD, n + 1 - first))]
        code_RB.write(np.arange(first, first + len(few_ND)), few_ND)
        rate(len(few_ND))
    code_RB.flush()
    indexed = np.ones(n + 1, bool)
    indexed[0] = False
    np.save(folder / "indexed.npy", np.packbits(indexed, bitorder="little"), allow_pickle=False)
    files = digests(folder, sorted(path.name for path in folder.iterdir()))
    described = {"kind": "ivf", "videos": n, "n_rows": n + 1, "lists": lists, "config": asdict(config)}
    seconds = {"train": trained_at - start, "draw and write": time.perf_counter() - trained_at}
    describe(folder, {**described, "files": files})
    return seconds


def _random_pieces(sizes_L: np.ndarray, n: int, code_bytes: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """Lists in order, codes random, each row once: multiplication by a prime permutes 0 .. n-1."""
    before_L, rng, first = np.concatenate([[0], np.cumsum(sizes_L)]), np.random.default_rng(3), 0
    while first < len(sizes_L):
        last = min(len(sizes_L), max(first + 1, int(np.searchsorted(before_L, before_L[first] + 4_000_000))))
        number = np.arange(before_L[first], before_L[last])
        list_n = np.repeat(np.arange(first, last), sizes_L[first:last])
        yield first, last, [(list_n, rng.integers(0, 256, (len(number), code_bytes), np.uint8), _spread(number, n))]
        first = last


def _spread(number: np.ndarray, n: int) -> np.ndarray:
    prime = 2_147_483_647  # divides no n below itself
    return number * prime % n + 1


class OurIndex:
    """An opened index that answers in video numbers."""

    def __init__(self, folder: Path) -> None:
        self._index = VideoIndex(folder)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        probes: int | None = None,
        refine: int | None = None,
        allowed_rows: RowFilter | None = None,
        excluded_rows: np.ndarray | None = None,
    ) -> np.ndarray:
        """Numbers (Q, k), -1 pads; without `probes` and `refine` as the index is configured."""
        row_QK, _ = self._index.search(
            query_QD, k, allowed=allowed_rows, excluded_rows=excluded_rows, probes=probes, rerank=refine
        )
        return np.where(row_QK > 0, row_QK - 1, -1)

    def as_filter(self, mask_N: np.ndarray) -> RowFilter:
        """A bool a video as `search` takes it in `allowed_rows`."""
        return self._index.allow(np.concatenate([[False], mask_N]))
