"""A base index with hard ids, and what a live index over it must answer: a dict and an exact search.

D = 16 wide; ids are opaque signed 64-bit numbers.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from candidate_gen.delta import NO_VIDEO
from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.live import LiveConfig, LiveIndex

DIM, BASE = 16, 300
_NOTHING = np.zeros(0, np.int64)
CONFIG = LiveConfig(compact_at=0, index=IndexConfig(kind="flat"))
"""Overlays here are scanned as the delta is."""
INDEXED = LiveConfig(compact_at=0, index=IndexConfig(kind="flat", exact_below=0))
"""The same with an index for every overlay."""
EDGES = [-(2**63) + 1, -(2**53) - 1, -(2**31) - 1, -1, 0, 1, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1]
FRESH = [-(2**63) + 2, -2, 2, 2**31 + 1, 2**53 + 2, 2**53 + 3, 2**62, 2**63 - 2]
"""Ids that the base does not know, next to ones that it knows."""


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, as float16 keeps them."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16).astype(np.float32)


def base_ids() -> np.ndarray:
    """(BASE+1,) ascending from row 1."""
    rest = np.random.default_rng(1).integers(-(2**62), 2**62, BASE - len(EDGES))
    return np.concatenate([[0], np.sort(np.concatenate([EDGES, rest]))]).astype(np.int64)


IDS_V = base_ids()
VECTORS_VD = unit(np.random.default_rng(2).normal(size=(BASE + 1, DIM)))
_FOLDER = TemporaryDirectory(prefix="live-base-")
INDEX = VideoIndex.build([(np.arange(1, BASE + 1), VECTORS_VD[1:])], BASE + 1, CONFIG.index, Path(_FOLDER.name))


class Truth:
    """What is there, by id."""

    def __init__(self) -> None:
        self.vectors = dict(zip(IDS_V[1:].tolist(), VECTORS_VD[1:], strict=True))

    def upsert(self, ids: np.ndarray, vectors: np.ndarray, eligible: np.ndarray) -> None:
        """The last of an id counts; one that is not eligible is not there."""
        for video_id, vector, is_eligible in zip(ids.tolist(), vectors, eligible.tolist(), strict=True):
            self.vectors.pop(video_id, None)
            if is_eligible:
                self.vectors[video_id] = vector

    def remove(self, ids: np.ndarray) -> None:
        """Unknown ids are no error."""
        for video_id in ids.tolist():
            self.vectors.pop(video_id, None)

    def check(self, live: LiveIndex, queries: np.ndarray, k: int, **filters: Any) -> None:
        """The same videos with the same scores, whatever order equal scores come in. What is excluded: one array for
        all queries, or a list of one array a query."""
        found_QK, score_QK = live.search(queries, k, **filters)
        assert found_QK.shape == score_QK.shape == (len(queries), k)
        assert found_QK.dtype == np.int64
        for q in range(len(queries)):
            own = {name: one[q] if isinstance(one, list) else one for name, one in filters.items()}
            self._check_one(queries[q], found_QK[q], score_QK[q], self._hidden(**own))

    def _hidden(
        self,
        excluded_ids: np.ndarray = _NOTHING,
        excluded_rows: np.ndarray = _NOTHING,
        allowed: np.ndarray | None = None,
    ) -> set[int]:
        hidden = {*excluded_ids.tolist(), *IDS_V[excluded_rows].tolist()}
        return hidden if allowed is None else hidden | set(IDS_V[1:][~allowed[1:]].tolist())

    def _check_one(self, query: np.ndarray, found: np.ndarray, score: np.ndarray, hidden: set[int]) -> None:
        ids = np.array([video_id for video_id in self.vectors if video_id not in hidden], np.int64)
        vectors = np.array([self.vectors[video_id] for video_id in ids.tolist()]).reshape(len(ids), DIM)
        exact = dict(zip(ids.tolist(), (vectors @ query).tolist(), strict=True))
        n = min(len(found), len(exact))
        assert (found[n:] == NO_VIDEO).all()
        assert np.isneginf(score[n:]).all()
        assert len(set(found[:n].tolist())) == n, "a video came twice"
        assert [exact[video_id] for video_id in found[:n].tolist()] == close_to(score[:n])
        assert sorted(exact.values(), reverse=True)[:n] == close_to(score[:n])


def close_to(values: np.ndarray) -> object:
    """Up to float32 sums in another order."""
    return pytest.approx(values.tolist(), abs=2e-6)


def opened(folder: Path, config: LiveConfig = CONFIG) -> LiveIndex:
    """The live index of a folder over the base."""
    return LiveIndex(folder, INDEX, IDS_V, config)
