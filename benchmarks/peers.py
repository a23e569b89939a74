"""Other libraries' indexes behind one small interface: build a folder from a matrix, open it, search one query.

Every class is one library with its build parameters; `settings` is the sweep of its search parameters. Inner product
on unit vectors throughout. N videos, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Search = Callable[..., np.ndarray]
"""search(query_1D, k, **setting) -> at most k numbers, best first, by the calling thread alone."""
FACTORS = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8, 10)
TRAIN_PER_LIST = 64
"""Vectors a list or leaf that k-means sees; FAISS and ScaNN warn below about 40."""
PROBES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Engine(Protocol):
    """What the benchmark asks of a library."""

    @property
    def name(self) -> str: ...
    @property
    def package(self) -> str:
        """Its distribution on PyPI."""
        ...

    @property
    def module(self) -> str:
        """What Python imports."""
        ...

    def build(self, vector_ND: np.ndarray, folder: Path, threads: int) -> None:
        """Index the vectors and write it into the folder, which exists and is empty."""
        ...

    def open(self, folder: Path) -> Search: ...

    def settings(self, k: int) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Hnswlib:
    """hnswlib, float32."""

    name: str
    m: int
    ef_construction: int = 200
    package: str = "hnswlib"
    module: str = "hnswlib"

    def build(self, vector_ND: np.ndarray, folder: Path, threads: int) -> None:
        import hnswlib

        index = hnswlib.Index(space="ip", dim=vector_ND.shape[1])
        index.init_index(len(vector_ND), M=self.m, ef_construction=self.ef_construction, random_seed=1)
        index.add_items(vector_ND, np.arange(len(vector_ND)), num_threads=threads)
        index.save_index(str(folder / "index.bin"))
        (folder / "dim").write_text(str(vector_ND.shape[1]))

    def open(self, folder: Path) -> Search:
        import hnswlib

        index = hnswlib.Index(space="ip", dim=int((folder / "dim").read_text()))
        index.load_index(str(folder / "index.bin"))

        def search(query_1D: np.ndarray, k: int, ef: int) -> np.ndarray:
            index.set_ef(ef)
            return index.knn_query(query_1D, k, num_threads=1)[0]

        return search

    def settings(self, k: int) -> list[dict[str, Any]]:
        return [{"ef": int(k * factor)} for factor in FACTORS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usearch:
    """usearch with vectors kept in `dtype`; its own default connectivity and expansion unless said."""

    name: str
    dtype: str
    connectivity: int = 16
    expansion: int = 128
    package: str = "usearch"
    module: str = "usearch"

    def build(self, vector_ND: np.ndarray, folder: Path, threads: int) -> None:
        from usearch.index import Index

        index = Index(
            ndim=vector_ND.shape[1],
            metric="ip",
            dtype=self.dtype,
            connectivity=self.connectivity,
            expansion_add=self.expansion,
        )
        index.add(np.arange(len(vector_ND)), vector_ND, threads=threads)
        index.save(str(folder / "index.usearch"))

    def open(self, folder: Path) -> Search:
        from usearch.index import Index

        index: Any = Index.restore(str(folder / "index.usearch"))

        def search(query_1D: np.ndarray, k: int, ef: int) -> np.ndarray:
            index.expansion_search = ef
            return index.search(query_1D[0], k, threads=1).keys

        return search

    def settings(self, k: int) -> list[dict[str, Any]]:
        return [{"ef": int(k * factor)} for factor in FACTORS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scann:
    """ScaNN: a tree of leaves, anisotropic 4-bit codes of two dimensions, float32 reordering.

    Settings as its authors advise: about sqrt(N) to 4 sqrt(N) leaves, threshold .2. `soar` spills a vector to a second
    leaf.
    """

    name: str
    leaves: int
    soar: bool = False
    package: str = "scann-core"
    module: str = "scann"

    def build(self, vector_ND: np.ndarray, folder: Path, threads: int) -> None:
        from scann import scann_ops_pybind

        spill = {"soar_lambda": 1.5, "overretrieve_factor": 2.0} if self.soar else {}
        leaves = min(self.leaves, len(vector_ND) // 40)
        sample = min(len(vector_ND), TRAIN_PER_LIST * leaves)
        index = (
            scann_ops_pybind.builder(vector_ND, 100, "dot_product")
            .set_n_training_threads(threads)
            .tree(leaves, max(leaves // 50, 1), training_sample_size=sample, **spill)
            .score_ah(2, anisotropic_quantization_threshold=0.2)
            .reorder(400)
            .build()
        )
        index.serialize(str(folder))

    def open(self, folder: Path) -> Search:
        from scann import scann_ops_pybind

        index = scann_ops_pybind.load_searcher(str(folder))

        def search(query_1D: np.ndarray, k: int, leaves: int, reorder: int) -> np.ndarray:
            return index.search(
                query_1D[0], final_num_neighbors=k, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves
            )[0]

        return search

    def settings(self, k: int) -> list[dict[str, Any]]:
        return [
            {"leaves": leaves, "reorder": reorder}
            for leaves, reorder in product(PROBES, (2 * k, 3 * k, 4 * k, 6 * k))
            if leaves <= self.leaves
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Faiss:
    """A FAISS factory string: an HNSW graph, or inverted lists with or without a refine stage."""

    name: str
    factory: str
    lists: int = 0
    """Inverted lists; 0 says the index is a graph."""
    ef_construction: int = 200
    package: str = "faiss-cpu"
    module: str = "faiss"

    def build(self, vector_ND: np.ndarray, folder: Path, threads: int) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        index: Any = faiss.index_factory(vector_ND.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
        if not self.lists:
            index.hnsw.efConstruction = self.ef_construction
        sample = np.random.default_rng(1).permutation(len(vector_ND))[: TRAIN_PER_LIST * (self.lists or 256)]
        index.train(vector_ND[np.sort(sample)])
        index.add(vector_ND)
        faiss.write_index(index, str(folder / "index.faiss"))

    def open(self, folder: Path) -> Search:
        import faiss

        faiss.omp_set_num_threads(1)
        index: Any = faiss.read_index(str(folder / "index.faiss"))
        make: Any = faiss  # its annotations know the C++ constructors, not the Python ones

        def search(query_1D: np.ndarray, k: int, **setting: Any) -> np.ndarray:
            if not self.lists:
                params = make.SearchParametersHNSW(efSearch=setting["ef"])
            else:
                params = make.SearchParametersIVF(nprobe=setting["nprobe"])
            if "k_factor" in setting:
                params = make.IndexRefineSearchParameters(k_factor=setting["k_factor"], base_index_params=params)
            return index.search(query_1D, k, params=params)[1]

        return search

    def settings(self, k: int) -> list[dict[str, Any]]:
        if not self.lists:
            return [{"ef": int(k * factor)} for factor in FACTORS]
        # More probes than lists make FAISS's fast-scan answer nonsense (1.15.1).
        probes = [nprobe for nprobe in PROBES if nprobe <= self.lists]
        if "Refine" in self.factory:
            return [{"nprobe": nprobe, "k_factor": factor} for nprobe, factor in product(probes, (2, 4, 8))]
        return [{"nprobe": nprobe} for nprobe in probes]


def engines(n: int, dim: int) -> list[Engine]:
    """The peers, with the variants of each that come near the front; lists and leaves grow with the videos."""
    lists = 1 << max(4, round(np.log2(4 * np.sqrt(n))))
    return [
        Hnswlib(name="hnswlib M16", m=16),
        Hnswlib(name="hnswlib M32", m=32),
        Usearch(name="usearch f32", dtype="f32"),
        Usearch(name="usearch bf16", dtype="bf16"),
        Scann(name=f"ScaNN {lists // 4}", leaves=lists // 4),
        Scann(name=f"ScaNN {lists // 2}", leaves=lists // 2),
        Scann(name=f"ScaNN {lists}", leaves=lists),
        Scann(name=f"ScaNN {lists} SOAR", leaves=lists, soar=True),
        Faiss(name="FAISS HNSW16", factory="HNSW16"),
        Faiss(name="FAISS HNSW16 SQ8", factory="HNSW16_SQ8"),
        Faiss(name=f"FAISS IVF{lists},Flat", factory=f"IVF{lists},Flat", lists=lists),
        Faiss(name=f"FAISS IVF{lists // 4},Flat", factory=f"IVF{lists // 4},Flat", lists=lists // 4),
        Faiss(name=f"FAISS IVF{lists},PQfs+SQ8", factory=f"IVF{lists},PQ{dim}x4fsr,Refine(SQ8)", lists=lists),
    ]


def is_installed(engine: Engine) -> bool:
    """Whether its module can be found, without importing it."""
    return find_spec(engine.module) is not None
