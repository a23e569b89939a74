"""The newest videos, scanned exactly: one writer appends, any number of threads search, nobody waits.

Q queries, K results, D width, M entries. Entries live in preallocated blocks that never move, behind a length that only
grows; a removed entry loses its alive mark. A writer that replaces a video publishes the new entry before it takes
the old one's mark, and a reader looks at the length again after it has read the marks: it meets the old entry, the new
one or both, never neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from candidate_gen.bits import are_set

BLOCK = 4096
NO_VIDEO = int(np.iinfo(np.int64).min)
"""Id that pads a result; no video may have it."""
QUERIES_AT_ONCE = 64
"""Scores of so many queries are held at a time."""


@dataclass(frozen=True, slots=True)
class Block:
    """BLOCK entries."""

    vectors_MD: np.ndarray
    """float32, of float16 values: what the log keeps, so that a restart changes no score."""
    ids_M: np.ndarray
    base_rows_M: np.ndarray
    """Row of the same video in the base catalogue, 0 for a new one."""
    alive_M: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> Block:
        """A block without entries."""
        return cls(
            np.zeros((BLOCK, dim), np.float32),
            np.zeros(BLOCK, np.int64),
            np.zeros(BLOCK, np.int64),
            np.zeros(BLOCK, bool),
        )


Found = tuple[np.ndarray, np.ndarray]
"""Ids (Q, K) int64 and scores (Q, K) of the best of each query; NO_VIDEO and -inf where there are fewer."""


class Delta:
    """Entries (id, vector, base row), the last of an id being the one that counts."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._blocks: list[Block] = []
        self._entry_of: dict[int, int] = {}
        self._knows_base = False
        """An entry has a base row: without any, filters have nothing to say here."""
        self.length = 0
        """Entries published, dead ones included."""

    def __len__(self) -> int:
        """Videos alive."""
        return len(self._entry_of)

    def append(self, ids_M: np.ndarray, vectors_MD: np.ndarray, base_rows_M: np.ndarray) -> None:
        """Publish entries of distinct ids, then retire what they replace here. One writer at a time."""
        self._knows_base = self._knows_base or bool(base_rows_M.any())
        replaced = [self._entry_of.get(video_id) for video_id in ids_M.tolist()]
        done = 0
        while done < len(ids_M):
            at = self.length % BLOCK
            if at == 0:
                self._blocks.append(Block.empty(self._dim))
            block, n = self._blocks[-1], min(BLOCK - at, len(ids_M) - done)
            piece, room = slice(done, done + n), slice(at, at + n)
            block.vectors_MD[room], block.ids_M[room] = vectors_MD[piece], ids_M[piece]
            block.base_rows_M[room], block.alive_M[room] = base_rows_M[piece], True
            self._entry_of.update(zip(ids_M[piece].tolist(), range(self.length, self.length + n), strict=True))
            self.length += n  # from here on readers see them
            done += n
        for entry in replaced:
            if entry is not None:
                self._retire(entry)

    def remove(self, ids_M: np.ndarray) -> None:
        """Retire the entries of these ids; ids that are not here are passed over. One writer at a time."""
        for video_id in ids_M.tolist():
            entry = self._entry_of.pop(video_id, None)
            if entry is not None:
                self._retire(entry)

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        floor_Q1: np.ndarray,
        allowed_bits: np.ndarray | None,
        excluded_ids: Sequence[np.ndarray],
    ) -> Found:
        """Exact best by inner product, in no order: at most k, and of those only what scores above a query's floor.

        `allowed_bits` speaks for entries that have a base row; `excluded_ids` is one array for all queries, or Q.
        """
        if len(query_QD) <= QUERIES_AT_ONCE:
            return self._search(query_QD, k, floor_Q1, allowed_bits, excluded_ids)
        steps = range(0, len(query_QD), QUERIES_AT_ONCE)
        parts = [slice(start, start + QUERIES_AT_ONCE) for start in steps]
        each = len(excluded_ids) > 1
        pieces = [
            self._search(query_QD[part], k, floor_Q1[part], allowed_bits, excluded_ids[part] if each else excluded_ids)
            for part in parts
        ]
        width = max((ids.shape[1] for ids, _ in pieces), default=0)
        ids_QK = np.full((len(query_QD), width), NO_VIDEO, np.int64)
        score_QK = np.full((len(query_QD), width), -np.inf, np.float32)
        for part, (ids, scores) in zip(parts, pieces, strict=True):
            ids_QK[part, : ids.shape[1]], score_QK[part, : ids.shape[1]] = ids, scores
        return ids_QK, score_QK

    def marks(self) -> np.ndarray:
        """Mark by entry, the writer standing still."""
        marks = [block.alive_M for block in self._blocks]
        return np.concatenate(marks)[: self.length] if marks else np.zeros(0, bool)

    def take(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, vectors, base rows) of entries."""
        blocks = self._blocks or [Block.empty(self._dim)]
        columns = zip(*((b.ids_M, b.vectors_MD, b.base_rows_M) for b in blocks), strict=True)
        ids_M, vectors_MD, base_rows_M = (np.concatenate(column)[entries] for column in columns)
        return ids_M, vectors_MD, base_rows_M

    def _retire(self, entry: int) -> None:
        self._blocks[entry // BLOCK].alive_M[entry % BLOCK] = False

    def _search(
        self,
        query_QD: np.ndarray,
        k: int,
        floor_Q1: np.ndarray,
        allowed_bits: np.ndarray | None,
        excluded_ids: Sequence[np.ndarray],
    ) -> Found:
        pieces = [np.zeros((len(query_QD), 0), np.float32)]
        done = 0
        while (length := self.length) > done:  # again for what was published while the marks were read
            for number in range(done // BLOCK, -(-length // BLOCK)):
                block = self._blocks[number]
                part = slice(max(done - number * BLOCK, 0), min(length - number * BLOCK, BLOCK))
                score_QM = query_QD @ block.vectors_MD[part].T
                visible_M = block.alive_M[part].copy()
                if allowed_bits is not None and self._knows_base:
                    visible_M &= permitted(block.base_rows_M[part], allowed_bits)
                score_QM[:, ~visible_M] = -np.inf
                pieces.append(score_QM)
            done = length
        score_QM = pieces[1] if len(pieces) == 2 else np.concatenate(pieces, axis=1)
        for query, ids in enumerate(excluded_ids):
            entries = [self._entry_of.get(video_id) for video_id in ids.tolist()]
            gone = [entry for entry in entries if entry is not None and entry < done]
            score_QM[query if len(excluded_ids) > 1 else slice(None), gone] = -np.inf
        above_QM = score_QM > floor_Q1
        above = min(int(above_QM.sum(axis=1).max(initial=0)), k)
        if above == 0:
            return np.zeros((len(query_QD), 0), np.int64), np.zeros((len(query_QD), 0), np.float32)
        if len(query_QD) == 1 and above < k:  # the usual case: nothing to choose
            entry_K = np.flatnonzero(above_QM)
            return self._ids_at(entry_K[None]), score_QM[:, entry_K]
        entry_QK = np.argpartition(-score_QM, above - 1, axis=1)[:, :above]
        score_QK = np.take_along_axis(score_QM, entry_QK, 1)
        return np.where(np.isneginf(score_QK), NO_VIDEO, self._ids_at(entry_QK)), score_QK

    def _ids_at(self, entry_QK: np.ndarray) -> np.ndarray:
        ids_QK = np.zeros(entry_QK.shape, np.int64)
        for number in np.unique(entry_QK // BLOCK):
            here = entry_QK // BLOCK == number
            ids_QK[here] = self._blocks[number].ids_M[entry_QK[here] % BLOCK]
        return ids_QK


def permitted(base_rows_M: np.ndarray, allowed_bits: np.ndarray) -> np.ndarray:
    """True where a video is new (row 0) or the bit of its base row is set."""
    ok_M = base_rows_M == 0
    known = np.flatnonzero(~ok_M)
    ok_M[known] = are_set(allowed_bits, base_rows_M[known])
    return ok_M
