"""What a video index costs: bytes, nanoseconds and recall of its parts, each constant with its source.

D width, n videos. [M] is measured on two cores of an AMD EPYC (AVX-512), faiss-cpu 1.15.1; [D] is derived from such.
Recall figures are of 10 M synthetic two-tower vectors with queries off the videos' distribution (mixtures of three
interests): they rank designs, and a sweep on one's own vectors replaces them (`IndexCosts(recall_at_share=...)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeCosts:
    """One way to write a residual vector into a list; 4b is four bits a dimension."""

    name: str
    bits_per_dim: float
    extra_bytes: int = 0
    """Factors kept beside the code, a vector."""
    scan_ns: tuple[tuple[float, float], ...]
    """(bytes of a code, ns to scan one), one query on one thread; linear between, proportional above and below."""
    kept: float
    """Share of the exact best k among the probed videos that is in the 10 k best by code."""
    block: int = 1
    """Codes a list is padded to a multiple of."""

    def bytes_at(self, dim: int) -> float:
        """Bytes of one code."""
        return self.bits_per_dim * dim / 8 + self.extra_bytes

    def scan_ns_at(self, dim: int) -> float:
        """Nanoseconds to scan one code."""
        size = self.bytes_at(dim)
        sizes, ns = np.array(self.scan_ns).T
        nearest = np.clip(size, sizes[0], sizes[-1])
        return float(np.interp(nearest, sizes, ns) * size / nearest)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoarseCosts:
    """One way to find the lists to probe."""

    name: str
    ns_per_list_dim: float = 0.0
    """A query, for every list and dimension."""
    us_per_probe: tuple[tuple[int, float], ...] = ((1, 0.0),)
    """(lists, us a probe), linear in log(lists)."""
    found: float = 1.0
    """Share of the nearest lists it finds; a list it misses counts as one not probed."""
    bytes_per_list: int = 0
    """Beside the float32 centroid."""
    bits_per_dim: int = 0
    """Of a centroid's code, beside the float32 centroid."""

    def ms(self, lists: int, probes: int, dim: int) -> float:
        """Milliseconds a query."""
        at, us = np.array(self.us_per_probe).T
        step = np.interp(np.log(lists), np.log(at), us)
        return float(lists * dim * self.ns_per_list_dim * 1e-6 + probes * step * 1e-3)

    def bytes_at(self, lists: int, dim: int) -> int:
        """Beside the float32 centroids."""
        return lists * (self.bytes_per_list + self.bits_per_dim * dim // 8)


PQ_SCAN_NS = ((16, 3.4), (32, 4.84), (64, 10.0))
"""[M] slopes between 64 and 1,024 probes of 500 M x 16 B, 100 M x 32 B and 100 M x 64 B, coarse step subtracted."""

CODES = (
    CodeCosts(name="pq 4b", bits_per_dim=4, scan_ns=PQ_SCAN_NS, kept=1.0, block=32),  # [M] .937 of .937
    CodeCosts(name="pq 2b", bits_per_dim=2, scan_ns=PQ_SCAN_NS, kept=0.98, block=32),  # [M] .918 of .937
    CodeCosts(name="rabitq 1b", bits_per_dim=1, extra_bytes=8, scan_ns=((16, 9.0),), kept=0.854, block=32),
    # [M] .800 of .937, 9 ns: twice pq at the same bytes
    CodeCosts(name="sq 8b", bits_per_dim=8, scan_ns=((64, 16.0),), kept=1.0),  # [M] .937 of .937
)

COARSE = (
    CoarseCosts(name="exact", ns_per_list_dim=0.18),  # [M] .77 ms at 65,536 lists x 64, 2.8 ms at 262,144
    CoarseCosts(
        name="fast-scan",
        ns_per_list_dim=0.02,
        us_per_probe=((1, 0.32),),
        found=0.87,
        bits_per_dim=4,
    ),  # [M] .11, .18, .38 ms at 16,384, 65,536, 262,144 lists and 256 probes; twice the probes rescored exactly
    CoarseCosts(
        name="hnsw",
        us_per_probe=((65_536, 2.6), (262_144, 4.1)),
        found=0.97,
        bytes_per_list=32 * 2 * 4 + 32,
    ),  # [M] HNSW32 at ef 1.5 probes, 1.95 and 3.1 us a probe, finds .967 and .908; [D] ef 2 probes costs a third more
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexCosts:
    """Constants of the planner."""

    row_bytes: int = 8
    """int64 row beside each code."""
    id_map_bytes: int = 8
    """int64 video id by row."""
    bitmap_bits: int = 1
    """Indexed and not removed, by row."""
    list_bytes: int = 16
    """Size and offset of a list, two int64."""
    process_bytes: int = 200 * 2**20
    """[M] A Python process with numpy and FAISS loaded and its search buffers, before any index."""
    lists_per_root: float = 4.0
    """Lists: the power of two at or above 4 sqrt(n), at most 2^18: what the recall figures below were measured at
    (16,384 for 10 M) and the scan times too (65,536 for 100 M)."""
    most_lists: int = 2**18
    recall_at_share: tuple[tuple[float, float], ...] = ((0.001, 0.737), (0.0039, 0.835), (0.0156, 0.937))
    """[M] (share of lists probed, recall of the exact best 100): 16, 64 and 256 of 16,384 lists. Linear between them
    in log(share) and logit(recall); extrapolated outside."""
    refine_first_k: tuple[tuple[str, float], ...] = (("int8", 0.993), ("int4", 0.92))
    """[M] share of the best 100 that rescoring 1,000 with shared-scale int8 (int4: clipped at 3 sigma) puts first."""
    found_per_k: int = 10
    """Codes hand this many times k on to be rescored: the recall figures are of the best 100 among 1,000."""
    query_fixed_ms: float = 0.05
    found_us: float = 0.2
    """[M] .25 ms a query at 1,000 found that no number of codes explains: tables, heap, merge."""
    rescore_us_per_64_bytes: float = 0.1
    """[D] gathering and multiplying one row of 64 bytes: 28 M rows/s is the memory's bound."""
    fault_us: float = 66.0
    """[M] reading one page of a mapped file that is not cached, at random places of a 2 GiB file."""
    memory_gb_s: float = 12.9
    """[M] sequential, one thread: the bound of an exact scan."""
    p99_over_p50: float = 1.2
    """[M] 1.1 to 1.24 in 100 M x 32 B and 500 M x 16 B, one query at a time, quiet machine."""
    train_per_list: int = 64
    """Vectors sampled for k-means, a list."""
    train_rounds: int = 10
    train_gflops: float = 90.0
    """[M] a core in FAISS k-means, L2 (181 on two)."""
    assign_gflops: float = 40.0
    """[D] a core in two-level assignment: half the exact rate of 78 to 93, for gathering the second level."""
    assign_branches: int = 8
    """First-level cells whose lists a vector is compared with."""
    encode_per_s: float = 185_000.0
    """[M] vectors of 64 dimensions a second and core, 4-bit product codes (.25 to 1.4 M/s on two; the slow middle)."""
    disk_gb_s: float = 1.4
    """[M] sequential read and write."""

    def lists(self, videos: int) -> int:
        """Inverted lists for this many videos."""
        return int(min(2 ** np.ceil(np.log2(max(self.lists_per_root * np.sqrt(videos), 16))), self.most_lists))

    def recall(self, share: float) -> float:
        """Recall of the exact best when this share of the lists is scanned exactly; 1 when all are."""
        if share >= 1:
            return 1.0
        shares, recalls = np.array(self.recall_at_share).T
        x, y, at = np.log(shares), np.log(recalls / (1 - recalls)), np.log(max(share, 1e-9))
        i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
        logit = y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])
        return float(1 / (1 + np.exp(-logit)))
