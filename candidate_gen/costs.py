"""What a video index costs: bytes, nanoseconds and recall of its parts, each constant with its source.

R directions that lists and codes keep, D width, n videos. [M] is measured on two cores of an AMD EPYC (AVX-512),
faiss-cpu 1.15.1; [D] is derived from such. Recall is of a trained video tower's vectors (64 wide, 16 directions) for
queries of its user tower, 1 M, 10 M and 100 M videos; other towers differ, and a sweep on one's own replaces it.
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
    kept_logit: float
    """Share of the exact best 100 of 100 M videos that is in the 1,000 best by code, as a logit."""
    block: int = 1
    """Codes a list is padded to a multiple of."""

    def bytes_at(self, directions: int) -> float:
        """Bytes of one code."""
        return self.bits_per_dim * directions / 8 + self.extra_bytes

    def scan_ns_at(self, directions: int) -> float:
        """Nanoseconds to scan one code."""
        size = self.bytes_at(directions)
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

    def ms(self, lists: int, probes: int, directions: int) -> float:
        """Milliseconds a query."""
        at, us = np.array(self.us_per_probe).T
        step = np.interp(np.log(lists), np.log(at), us)
        return float(lists * directions * self.ns_per_list_dim * 1e-6 + probes * step * 1e-3)

    def bytes_at(self, lists: int, directions: int) -> int:
        """Beside the float32 centroids."""
        return lists * (self.bytes_per_list + self.bits_per_dim * directions // 8)


REFERENCE = 100e6
"""Videos that recall figures were measured at."""

PQ_SCAN_NS = ((16, 1.5),)
"""[M] slope between 128 and 512 probes of 100 M x 16 B, this index; other sizes [D] by their bytes."""

CODES = (
    CodeCosts(name="pq 8b", bits_per_dim=8, scan_ns=PQ_SCAN_NS, kept_logit=3.2, block=32),  # [M] .961
    CodeCosts(name="pq 4b", bits_per_dim=4, scan_ns=PQ_SCAN_NS, kept_logit=1.6, block=32),  # [M] .967 at 10 M
    CodeCosts(name="pq 2b", bits_per_dim=2, scan_ns=PQ_SCAN_NS, kept_logit=0.46, block=32),  # [M] .993 at 1 M
    CodeCosts(name="rabitq 1b", bits_per_dim=1, extra_bytes=8, scan_ns=((16, 9.0),), kept_logit=-1.6, block=32),
    # [D] 10 M synthetic vectors: .854 where pq 2b kept .98; 9 ns, some times pq at the same bytes
    CodeCosts(name="sq 8b", bits_per_dim=8, scan_ns=((64, 16.0),), kept_logit=3.3),  # [D] as pq 8b
)

COARSE = (
    CoarseCosts(name="exact", ns_per_list_dim=0.18),  # [M] .77 ms at 65,536 lists x 64, 2.8 ms at 262,144
    CoarseCosts(
        name="fast-scan",
        ns_per_list_dim=0.02,
        us_per_probe=((1, 0.32),),
        found=0.1,
        bits_per_dim=4,
    ),  # [M] .11, .18, .38 ms at 16,384, 65,536, 262,144 lists and 256 probes; 64 of 65,536 found so held .70 of the
    # best 100 of 100 M, 8 found by exact products .79
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
    list_bytes: int = 8
    """Size of a list, int64."""
    process_bytes: int = 200 * 2**20
    """[M] A Python process with numpy and FAISS loaded and its search buffers, before any index."""
    recall_at_share: tuple[tuple[float, float], ...] = (
        (0.000244, 0.882),
        (0.000488, 0.945),
        (0.000977, 0.978),
        (0.00195, 0.989),
        (0.0039, 0.996),
    )
    """[M] (share of lists probed, share of the exact best 100 in them): 8, 16, 32, 64 and 128 of 32,768 lists, 100 M
    videos. Linear between them in log(share) and logit; extrapolated outside."""
    share_exponent: float = 0.2
    """[M] n videos at a share s find what 100 M find at s (n / 100 M)^.2: .15 to .27 at 1 M and 10 M."""
    kept_per_decade: float = 1.9
    """[M] logit(kept) falls by this for ten times the videos: .9991, .9948 and .961 at 1 M, 10 M and 100 M, 8 bits."""
    kept_per_tenfold_found: float = 1.52
    """[M] and rises by this when ten times as many are found by code and scored exactly: .961, .975, .984 at 100 M."""
    refine_first_k: tuple[tuple[str, float], ...] = (("float16", 1.0), ("int8", 0.965), ("int4", 0.69), ("none", 0.97))
    """[M] share of the best 100 among the 1,000 handed on that stored vectors put first (int8 at 10 M, int4 at 1 M);
    [D] none: sq 8b alone."""
    handed_on_per_k: int = 10
    """The index hands this many times k on: 1,000 for the best 100."""
    rerank: tuple[int, ...] = (1, 2, 4)
    """Codes find so many times what is handed on, stored vectors score it (`IndexConfig.rerank`)."""
    query_fixed_ms: float = 0.1
    found_us: float = 0.13
    """[M] .23 ms more a query for each 1,000 found and scored, less the rescoring below."""
    rescore_us_per_64_bytes: float = 0.1
    """[D] gathering and multiplying one row of 64 bytes: 28 M rows/s is the memory's bound."""
    fault_us: float = 66.0
    """[M] reading one page of a mapped file that is not cached, at random places of a 2 GiB file."""
    memory_gb_s: float = 12.9
    """[M] sequential, one thread: the bound of an exact scan."""
    p99_over_p50: float = 1.2
    """[M] 1.1 to 1.24 in 100 M x 32 B and 500 M x 16 B, one query at a time, quiet machine."""
    train_rounds: int = 10
    train_gflops: float = 15.0
    """[M] a core, two-level k-means: 9 s for 32,768 lists of 16 directions on a busy machine, sampling included."""
    assign_gflops: float = 5.0
    """[M] a core, two-level assignment, whose products are narrow: with encoding and storing, 100 M took 680
    CPU-seconds on a busy machine."""
    assign_branches: int = 3
    """Groups whose lists a vector is compared with."""
    encode_per_s: float = 185_000.0
    """[M] vectors of 64 directions a second and core: codes, stored vectors, conversions."""
    merge_per_s: float = 1_000_000.0
    """[M] vectors a second, one process (100 M in 120 s on a busy machine)."""
    disk_gb_s: float = 1.4
    """[M] sequential read and write."""

    def probed(self, share: float, videos: int) -> float:
        """Share of the exact best that lies in this share of the lists."""
        if share >= 1:
            return 1.0
        shares, recalls = np.array(self.recall_at_share).T
        x, y = np.log(shares), np.log(recalls / (1 - recalls))
        at = np.log(max(share, 1e-9)) + self.share_exponent * np.log(videos / REFERENCE)
        i = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
        return float(1 / (1 + np.exp(-(y[i] + (at - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])))))

    def kept(self, codes: CodeCosts, videos: int, rerank: int) -> float:
        """Share of the exact best k in the probed lists that is among the 10 k times `rerank` best by code."""
        logit = codes.kept_logit - self.kept_per_decade * np.log10(videos / REFERENCE)
        return float(1 / (1 + np.exp(-(logit + self.kept_per_tenfold_found * np.log10(rerank)))))
