"""How an index is built and searched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("flat", "ivf")
STORED = ("float16", "int8", "int4")
MAX_LISTS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """The defaults suit a catalogue of any size; `reelrank index plan` proposes others for a given memory."""

    kind: str = "auto"
    """"flat" is exact, "ivf" approximate; "auto" takes flat up to `exact_below` videos."""
    exact_below: int = 20_000
    """Up to this many videos (or, under a filter, allowed videos) a scan of them all is quick enough."""
    lists: int = 0
    """Inverted lists; 0 takes `lists_for`."""
    probes: int = 0
    """Lists searched first; more follow while results are missing. 0 takes `probes_for`."""
    kept_variance: float = 0.999
    """Lists and codes live in the fewest principal directions that hold this share of the variance, weighted by how
    much queries look along them; trained towers leave most of their 64 dimensions nearly empty. The stored vectors
    keep all dimensions."""
    dims_per_nibble: int = 1
    """Dimensions that share four bits of a code: 1 for precision, 2 for half the memory and scanning."""
    stored: str = "auto"
    """How vectors are kept for exact scores: float16, int8 or int4; "auto" is float16 below two million videos, then
    int8."""
    rerank: int = 4
    """Codes find `rerank` times k videos, the stored vectors pick k of them ..."""
    rerank_at_most: int = 2048
    """... but never more than this many, or k where that is more."""
    train_per_list: int = 40
    """Vectors sampled for training, a list; FAISS asks for 39 or more."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("auto", *KINDS):
            raise ValueError(f"IndexConfig.kind {self.kind!r}: choose auto, flat or ivf")
        if self.stored not in ("auto", *STORED):
            raise ValueError(f"IndexConfig.stored {self.stored!r}: choose auto, {', '.join(STORED)}")
        if not 0.0 < self.kept_variance <= 1.0:
            raise ValueError(f"IndexConfig.kept_variance is {self.kept_variance}: give more than 0, at most 1")
        if self.dims_per_nibble not in (1, 2):
            raise ValueError(f"IndexConfig.dims_per_nibble is {self.dims_per_nibble}: give 1 or 2")

    def kind_for(self, videos: int) -> str:
        """flat or ivf."""
        return ("flat" if videos <= self.exact_below else "ivf") if self.kind == "auto" else self.kind

    def stored_for(self, videos: int) -> str:
        """float16, int8 or int4."""
        return ("float16" if videos < 2_000_000 else "int8") if self.stored == "auto" else self.stored

    def lists_for(self, videos: int) -> int:
        """6.6 sqrt(videos) rounded down to a power of two: 4,096 for a million, 65,536 for a hundred million; never so
        many that FAISS's 39 training vectors a list are missing."""
        wish = self.lists or 1 << int(np.log2(max(6.6 * np.sqrt(videos), 16)))
        return max(1, min(wish, videos // 39, MAX_LISTS))

    def probes_for(self, lists: int) -> int:
        """Lists searched first: all of a few, 128 of thousands, a 256th part of very many."""
        return min(lists, self.probes or max(128, lists // 256))
