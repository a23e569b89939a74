"""One set of promises kept by every source, then what each source is for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.sources import (
    AnnSource,
    FollowedSource,
    FreshSource,
    PopularSource,
    Source,
    SourceQuery,
    Uploads,
)

N, DIM, NOW_MS, HOUR_MS = 600, 8, 1_700_000_000_000, 3_600_000
RNG = np.random.default_rng(0)
AUTHOR = np.concatenate([[0], RNG.integers(1, 30, N) + 2**60])
UPLOAD_MS = np.concatenate([[-1], NOW_MS - RNG.integers(-20, 400, N) * HOUR_MS])
UPLOAD_MS[5:9] = -1
VECTORS = RNG.normal(size=(N + 1, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
POPULAR = RNG.permutation(np.arange(1, N + 1))
UPLOADS = Uploads.build(AUTHOR, UPLOAD_MS)
INDEX = VideoIndex.build(
    [(np.arange(1, N + 1), VECTORS[1:])], N + 1, IndexConfig(), Path(tempfile.mkdtemp(prefix="reelrank-sources-"))
)
SOURCES: list[Source] = [
    AnnSource(INDEX, UPLOADS),
    FollowedSource(UPLOADS, UPLOAD_MS),
    PopularSource(POPULAR, {"search": POPULAR[::-1]}),
    FreshSource(UPLOAD_MS),
]


def query(allowed: np.ndarray | None = None, followed: tuple[int, ...] = (1, 2, 3), surface: str | None = None):
    return SourceQuery(
        user_vector_D=VECTORS[17],
        followed_authors=np.array(followed, np.int64) + 2**60,
        allowed=np.ones(N + 1, bool) if allowed is None else allowed,
        now_ms=NOW_MS,
        surface=surface,
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
class TestEverySource:
    @pytest.mark.parametrize("share", [1.0, 0.3, 0.01, 0.0])
    @pytest.mark.parametrize("k", [0, 1, 40, 5000])
    def test_only_allowed_rows_none_twice_at_most_k(self, source: Source, share: float, k: int) -> None:
        allowed = np.random.default_rng(k).random(N + 1) < share
        allowed[0] = False
        found = source.retrieve(query(allowed), k)
        assert len(found.rows) == len(found.scores) <= k
        assert allowed[found.rows].all()
        assert len(np.unique(found.rows)) == len(found.rows)
        assert found.rows.dtype == np.int64
        assert found.scores.dtype == np.float32

    def test_best_first_and_a_smaller_k_is_a_prefix(self, source: Source) -> None:
        many, few = source.retrieve(query(), 50), source.retrieve(query(), 10)
        assert (np.diff(many.scores) <= 0).all()
        assert np.array_equal(many.rows[:10], few.rows)
        assert len(few.rows) == 10

    def test_the_same_query_gets_the_same_answer(self, source: Source) -> None:
        first, second = source.retrieve(query(), 100), source.retrieve(query(), 100)
        assert np.array_equal(first.rows, second.rows)
        assert np.array_equal(first.scores, second.scores)


def test_the_nearest_videos_are_unconnected() -> None:
    found = SOURCES[0].retrieve(query(), 30)
    assert 17 not in found.rows or AUTHOR[17] - 2**60 > 3
    assert not np.isin(AUTHOR[found.rows], query().followed_authors).any()
    exact = np.where(np.isin(AUTHOR, query().followed_authors), -np.inf, VECTORS @ VECTORS[17])
    exact[0] = -np.inf
    assert np.array_equal(found.rows, np.argsort(-exact)[:30])


def test_followed_authors_newest_uploads_come_first_and_none_from_the_future() -> None:
    found = SOURCES[1].retrieve(query(), 1000)
    expected = np.flatnonzero(np.isin(AUTHOR, query().followed_authors) & (UPLOAD_MS <= NOW_MS))
    assert set(found.rows) == set(expected)
    assert (np.diff(UPLOAD_MS[found.rows]) <= 0).all()
    assert len(SOURCES[1].retrieve(query(followed=()), 10).rows) == 0
    assert len(SOURCES[1].retrieve(query(followed=(999, -7)), 10).rows) == 0


def test_popular_follows_the_order_of_the_surface_and_falls_back_to_everybodys() -> None:
    assert np.array_equal(SOURCES[2].retrieve(query(), 5).rows, POPULAR[:5])
    assert np.array_equal(SOURCES[2].retrieve(query(surface="search"), 5).rows, POPULAR[::-1][:5])
    assert np.array_equal(SOURCES[2].retrieve(query(surface="new tab"), 5).rows, POPULAR[:5])


def test_fresh_is_the_newest_that_is_out() -> None:
    found = SOURCES[3].retrieve(query(), 20)
    out = np.where((UPLOAD_MS <= NOW_MS) & (UPLOAD_MS >= 0), UPLOAD_MS, -2)
    assert np.array_equal(np.sort(UPLOAD_MS[found.rows])[::-1], np.sort(out)[::-1][:20])
