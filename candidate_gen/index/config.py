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
    code_bits: int = 8
    """Of each dimension that codes keep: 8, 4 or 2. What codes cannot tell apart, `rerank` must make up for, and at a
    hundred million videos the best thousand differ by less than 4 bits show."""
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
        if self.code_bits not in (2, 4, 8):
            raise ValueError(f"IndexConfig.code_bits is {self.code_bits}: give 2, 4 or 8")

    def kind_for(self, videos: int) -> str:
        """flat or ivf."""
        return ("flat" if videos <= self.exact_below else "ivf") if self.kind == "auto" else self.kind

    def stored_for(self, videos: int) -> str:
        """float16, int8 or int4."""
        return ("float16" if videos < 2_000_000 else "int8") if self.stored == "auto" else self.stored

    def lists_for(self, videos: int) -> int:
        """3.3 sqrt(videos) rounded down to a power of two: 2,048 for a million, 32,768 for a hundred million; never so
        many that FAISS's 39 training vectors a list are missing."""
        wish = self.lists or 1 << int(np.log2(max(3.3 * np.sqrt(videos), 16)))
        return max(1, min(wish, videos // 39, MAX_LISTS))

    def probes_for(self, lists: int) -> int:
        """Lists searched first: all of a few, 64 of thousands, a 512th part of very many."""
        return min(lists, self.probes or max(64, lists // 512))
