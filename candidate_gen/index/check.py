"""What the index loses: its answers held against exact search over the very vectors it was built from, in one pass.

Q queries, K results, N vectors of a block, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from candidate_gen.index.search import VideoIndex
from candidate_gen.index.shards import Shards

BLOCK = 65_536


def recall_against_shards(index: VideoIndex, shards: Shards, query_QD: np.ndarray, k: int) -> float:
    """Mean share of each query's exact k best among all shards that the index finds."""
    exact_QK, _ = exact_top(blocks(shards), query_QD, k)
    found_QK, _ = index.search(query_QD, k)
    pairs = zip(exact_QK, found_QK, strict=True)
    return float(np.mean([np.isin(exact[exact >= 0], found).mean() for exact, found in pairs]))


def blocks(shards: Shards) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows (N,) and vectors (N, D) of all shards, a block at a time."""
    for number, count in enumerate(shards.counts):
        rows, vector_ND = shards.read(number)
        for start in range(0, count, BLOCK):
            yield rows[start : start + BLOCK], vector_ND[start : start + BLOCK]


def exact_top(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    query_QD: np.ndarray,
    k: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (Q, k) and scores (Q, k) of each query's best videos by inner product in float32, best first.

    `blocks` are (numbers (N,), vectors (N, D)). Only scores above a query's k-th so far are sorted, few after the first
    blocks. Padded with -1 and -inf.
    """
    best_QK = np.full((len(query_QD), k), -1, np.int64)
    score_QK = np.full((len(query_QD), k), -np.inf, np.float32)
    for number_N, vector_ND in blocks:
        if len(number_N):
            score_QN = query_QD @ vector_ND.astype(np.float32).T
            for q in np.flatnonzero(score_QN.max(axis=1) > score_QK[:, -1]):
                at = np.flatnonzero(score_QN[q] > score_QK[q, -1])
                scores = np.concatenate([score_QK[q], score_QN[q, at]])
                numbers = np.concatenate([best_QK[q], number_N[at]])
                top = np.argpartition(-scores, k - 1)[:k]
                top = top[np.argsort(-scores[top], kind="stable")]
                best_QK[q], score_QK[q] = numbers[top], scores[top]
        if on_progress is not None:
            on_progress(len(number_N))
    return best_QK, score_QK
