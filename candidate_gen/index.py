"""The video index: FAISS over video vectors, filtered inside the search, never short of results that exist.

Q queries, K results, D width. Small catalogues are searched exactly; large ones by inverted lists of residual 4-bit
codes (fast-scan), whose best finds are scored again with the float16 vectors kept beside the index. A filter that
leaves few videos is answered by scanning just these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

faiss: Any = _faiss  # its annotations know the C++ constructors, not the Python ones

FORMAT = 1
KINDS = ("flat", "ivf")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """How the index is built and searched."""

    kind: str = "auto"
    """"flat" is exact, "ivf" approximate; "auto" takes flat up to `exact_below` videos."""
    exact_below: int = 20_000
    """Up to this many videos (or, under a filter, allowed videos) a scan of them all is quick enough."""
    lists: int = 0
    """Inverted lists; 0 for 4 sqrt(videos), between 16 and 65,536."""
    probes: int = 128
    """Lists searched first; more follow while results are missing. The prior spreads a user's best over many lists: of
    50,000 videos' exact top 1,000, 32 probes found 81% in 1.2 ms of CPU, 128 found 98% in 1.7."""
    refine: int = 4
    """Codes find `refine` times k videos, exact scores pick k of them."""
    train_per_list: int = 64
    """Vectors sampled for training, a list; FAISS asks for 39 or more."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *KINDS):
            raise ValueError(f"IndexConfig.kind {self.kind!r}: choose auto, flat or ivf")


class VideoIndex:
    """Rows of `Entities` by inner product with a query; row 0 is never among them."""

    def __init__(self, index: Any, vectors_RD: np.ndarray, rows: np.ndarray, kind: str, config: IndexConfig) -> None:
        self._index, self._kind, self._config = index, kind, config
        self.vectors_RD = vectors_RD
        """(rows, D) float16 by row; zeros where a row is not indexed."""
        indexed = np.zeros(len(vectors_RD), bool)
        indexed[rows] = True
        self._indexed_bits = np.packbits(indexed, bitorder="little")

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors_RD.shape[1]

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def build(
        cls,
        vectors: Iterable[tuple[np.ndarray, np.ndarray]],
        n_rows: int,
        config: IndexConfig,
        on_progress: Callable[[int], None] | None = None,
    ) -> VideoIndex:
        """Index chunks of (rows, float32 vectors of length 1), rows in 1 .. n_rows-1; progress counts videos."""
        stored_RD, rows = _store(vectors, n_rows, on_progress)
        kind = config.kind
        if kind == "auto":
            kind = "flat" if len(rows) <= config.exact_below else "ivf"
        index = _flat(stored_RD, rows) if kind == "flat" else _inverted(stored_RD, rows, config)
        return cls(index, stored_RD, rows, kind, config)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        excluded_rows: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best rows (Q, k) int64 and scores (Q, k) float32, padded with -1 and -inf; k results wherever k exist.

        `allowed` is a bool a row or a bitmap (uint8, bit r & 7 of byte r >> 3 is row r), `excluded_rows` lists
        further rows to leave out.
        """
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        if query_QD.ndim != 2 or query_QD.shape[1] != self.dim:
            raise ValueError(f"queries have shape {query_QD.shape}; this index wants (any, {self.dim})")
        bits = self._filter(allowed, excluded_rows)
        n_allowed = int(np.bitwise_count(bits).sum())
        if k <= 0 or n_allowed == 0:
            shape = (len(query_QD), max(k, 0))
            return np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        if self._kind == "ivf" and n_allowed <= self._config.exact_below:
            rows = np.flatnonzero(np.unpackbits(bits, bitorder="little", count=len(self.vectors_RD)))
            return self._scan(query_QD, rows, k)
        return self._search_index(query_QD, k, bits, min(k, n_allowed))

    def recall_against_exact(self, query_QD: np.ndarray, k: int) -> float:
        """Mean share of a query's exact k best that `search` finds."""
        rows = np.flatnonzero(np.unpackbits(self._indexed_bits, bitorder="little", count=len(self.vectors_RD)))
        exact_QK, _ = self._scan(np.ascontiguousarray(query_QD, np.float32), rows, k)
        found_QK, _ = self.search(query_QD, k)
        pairs = zip(exact_QK, found_QK, strict=True)
        return float(np.mean([np.isin(exact[exact >= 0], found).mean() for exact, found in pairs]))

    def save(self, folder: Path) -> None:
        """Write `index.faiss`, `index.json` and `vectors.npy` into `folder` (created)."""
        folder.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._index, str(folder / "index.faiss"))
        np.save(folder / "vectors.npy", self.vectors_RD, allow_pickle=False)
        described = {
            "format": FORMAT,
            "kind": self._kind,
            "dim": self.dim,
            "ntotal": len(self),
            "n_rows": len(self.vectors_RD),
            "metric": "inner product",
            "config": asdict(self._config),
        }
        (folder / "index.json").write_text(json.dumps(described, indent=2, sort_keys=True))

    @classmethod
    def load(cls, folder: Path) -> VideoIndex:
        """Read what `save` wrote; raises ValueError when a file is not what index.json says."""
        described, config = _read_json(folder / "index.json")
        vectors_RD = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        shape = (described["n_rows"], described["dim"])
        if vectors_RD.shape != shape or vectors_RD.dtype != np.float16:
            raise ValueError(
                f"{folder / 'vectors.npy'} holds {vectors_RD.dtype} {vectors_RD.shape}, index.json says "
                f"float16 {shape}; build the index again"
            )
        index = _read_faiss(folder / "index.faiss", described)
        rows = _rows_in(index)
        if len(rows) and (rows.min() < 1 or rows.max() >= described["n_rows"]):
            raise ValueError(f"{folder / 'index.faiss'} names rows outside 1 .. {shape[0] - 1}; build the index again")
        return cls(index, vectors_RD, rows, described["kind"], config)

    def _filter(self, allowed: np.ndarray | None, excluded_rows: np.ndarray | None) -> np.ndarray:
        """Bit r (little-endian) is set where row r may be returned: the layout IDSelectorBitmap reads."""
        bits = self._indexed_bits
        if allowed is not None:
            packed = allowed if allowed.dtype == np.uint8 else np.packbits(allowed, bitorder="little")
            if len(allowed) != (len(bits) if packed is allowed else len(self.vectors_RD)):
                raise ValueError(
                    f"`allowed` is {allowed.dtype} of length {len(allowed)}, the index has {len(self.vectors_RD)} rows"
                )
            bits = bits & packed
        if excluded_rows is not None and len(excluded_rows):
            rows = np.asarray(excluded_rows, np.int64)
            bits = bits.copy()
            np.bitwise_and.at(bits, rows >> 3, ~(1 << (rows & 7)).astype(np.uint8))
        return bits

    def _search_index(
        self, query_QD: np.ndarray, k: int, bits: np.ndarray, expected: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search the FAISS index, widening the search of those queries that found fewer than `expected`."""
        selector = faiss.IDSelectorBitmap(bits)  # does not own `bits`, which this frame keeps alive
        if self._kind == "flat":
            score_QK, row_QK = self._index.search(query_QD, k, params=faiss.SearchParameters(sel=selector))
            return row_QK, np.where(row_QK >= 0, score_QK, -np.inf).astype(np.float32)
        row_QK = np.full((len(query_QD), k), -1, np.int64)
        score_QK = np.full((len(query_QD), k), -np.inf, np.float32)
        open_queries, probes = np.arange(len(query_QD)), min(self._config.probes, self._index.nlist)
        while len(open_queries):
            params = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            _, found = self._index.search(query_QD[open_queries], self._config.refine * k, params=params)
            row_QK[open_queries], score_QK[open_queries] = self._rescore(query_QD[open_queries], found, k)
            if probes == self._index.nlist:
                break
            open_queries = open_queries[(row_QK[open_queries] >= 0).sum(axis=1) < expected]
            probes = min(4 * probes, self._index.nlist)
        return row_QK, score_QK

    def _rescore(self, query_QD: np.ndarray, found_QM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        vector_QMD = self.vectors_RD[np.maximum(found_QM, 0)].astype(np.float32)
        score_QM = np.where(found_QM >= 0, np.einsum("qd,qmd->qm", query_QD, vector_QMD), -np.inf)
        return _best(found_QM, score_QM.astype(np.float32), k)

    def _scan(self, query_QD: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact search of a few rows, in pieces that fit the cache and the memory."""
        n = len(query_QD)
        best_rows, best_scores = np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32)
        for start in range(0, len(rows), 65_536):
            piece = rows[start : start + 65_536]
            score_QM = query_QD @ self.vectors_RD[piece].astype(np.float32).T
            merged_rows = np.concatenate([best_rows, np.broadcast_to(piece, (n, len(piece)))], axis=1)
            best_rows, best_scores = _best(merged_rows, np.concatenate([best_scores, score_QM], axis=1), k)
        return best_rows, best_scores


def _store(
    vectors: Iterable[tuple[np.ndarray, np.ndarray]], n_rows: int, on_progress: Callable[[int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks -> float16 matrix by row, and the rows that came, ascending."""
    stored_RD, came = None, np.zeros(n_rows, bool)
    for rows, vector_ND in vectors:
        if stored_RD is None:
            stored_RD = np.zeros((n_rows, vector_ND.shape[1]), np.float16)
        if len(rows) and (rows.min() < 1 or rows.max() >= n_rows or came[rows].any()):
            raise ValueError(f"index chunk: rows must lie in 1 .. {n_rows - 1} and come once")
        if not np.isfinite(vector_ND).all():
            raise ValueError("index chunk: vectors hold NaN or infinity; the towers did not train properly")
        stored_RD[rows], came[rows] = vector_ND, True
        if on_progress is not None:
            on_progress(len(rows))
    if stored_RD is None:
        raise ValueError("no vectors to index: the catalogue has no eligible video")
    return stored_RD, np.flatnonzero(came)


def _flat(stored_RD: np.ndarray, rows: np.ndarray) -> Any:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(stored_RD.shape[1]))
    index.add_with_ids(stored_RD[rows].astype(np.float32), rows)
    return index


def _inverted(stored_RD: np.ndarray, rows: np.ndarray, config: IndexConfig) -> Any:
    """IVF with residual 4-bit product codes, two dimensions a code. Vectors have length 1, so L2 ranks as the inner
    product does, and FAISS trains it several times faster."""
    dim = stored_RD.shape[1]
    lists = config.lists or int(np.clip(4 * np.sqrt(len(rows)), 16, 65_536))
    lists = max(1, min(lists, len(rows) // 39))
    index: Any = faiss.index_factory(dim, f"IVF{lists},PQ{max(dim // 2, 1)}x4fsr", faiss.METRIC_L2)
    index.cp.seed, index.cp.niter = config.seed, 10
    sample = np.random.default_rng(config.seed).permutation(rows)[: config.train_per_list * lists]
    index.train(stored_RD[np.sort(sample)].astype(np.float32))
    for start in range(0, len(rows), 65_536):
        piece = rows[start : start + 65_536]
        index.add_with_ids(stored_RD[piece].astype(np.float32), piece)
    return index


def _best(rows_QM: np.ndarray, score_QM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best columns of each query, best first, ties by row; -1 and -inf pad."""
    if rows_QM.shape[1] < k:
        short = ((0, 0), (0, k - rows_QM.shape[1]))
        rows_QM = np.pad(rows_QM, short, constant_values=-1)
        score_QM = np.pad(score_QM, short, constant_values=-np.inf)
    if rows_QM.shape[1] > 4 * k:
        top = np.argpartition(-score_QM, k, axis=1)[:, :k]
        rows_QM, score_QM = np.take_along_axis(rows_QM, top, 1), np.take_along_axis(score_QM, top, 1)
    order = np.lexsort((rows_QM, -score_QM), axis=1)[:, :k]
    rows_QK, score_QK = np.take_along_axis(rows_QM, order, 1), np.take_along_axis(score_QM, order, 1)
    return np.where(np.isneginf(score_QK), -1, rows_QK), score_QK


def _read_json(path: Path) -> tuple[dict[str, Any], IndexConfig]:
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT or described["kind"] not in KINDS:
            raise ValueError(f"format {described['format']} kind {described['kind']!r}")
        for name in ("dim", "ntotal", "n_rows"):
            if type(described[name]) is not int or described[name] < 0:
                raise ValueError(f"{name} is {described[name]!r}")
        return described, IndexConfig(**described["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe an index: {error!r}; build the index again") from error


def _read_faiss(path: Path, described: dict[str, Any]) -> Any:
    """Open the file only as the type that index.json names, of its width and count."""
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a FAISS index: {error}; build the index again") from error
    if isinstance(index, faiss.IndexIDMap):
        inner = faiss.downcast_index(index.index)
        kind = "flat" if type(inner) is faiss.IndexFlatIP or type(inner) is faiss.IndexFlat else type(inner).__name__
    else:
        kind = "ivf" if type(index) is faiss.IndexIVFPQFastScan else type(index).__name__
    found = {"kind": kind, "dim": index.d, "ntotal": index.ntotal}
    expected = {name: described[name] for name in found}
    if found != expected:
        raise ValueError(f"{path} holds {found}, index.json says {expected}; build the index again")
    return index


def _rows_in(index: Any) -> np.ndarray:
    """Row numbers that a flat or inverted index holds."""
    if isinstance(index, faiss.IndexIDMap):
        return faiss.vector_to_array(index.id_map)
    lists = index.invlists
    sizes = [lists.list_size(number) for number in range(index.nlist)]
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), size).copy() for i, size in enumerate(sizes) if size]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
