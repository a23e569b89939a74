"""One set of promises kept by every source, then what each source is for."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.allowed import Allowed
from candidate_gen.covisit import CovisitConfig, Covisits
from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.sources import (
    AnnSource,
    CovisitSource,
    FollowedSource,
    FreshSource,
    PopularSource,
    Source,
    SourceQuery,
)
from candidate_gen.uploads import Uploads
from features.history import HistoryLog, HistoryWindow, empty_window
from features.schema import SIGNALS

N, DIM, NOW_MS, HOUR_MS = 600, 8, 1_700_000_000_000, 3_600_000
RNG = np.random.default_rng(0)
AUTHOR = np.concatenate([[0], RNG.integers(1, 30, N) + 2**60])
UPLOAD_MS = np.concatenate([[-1], NOW_MS - RNG.integers(-20, 400, N) * HOUR_MS])
UPLOAD_MS[5:9] = -1
VECTORS = RNG.normal(size=(N + 1, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
POPULAR = RNG.permutation(np.arange(1, N + 1))
UPLOADS = Uploads.build(AUTHOR, UPLOAD_MS, np.arange(N + 1) > 0)
INDEX = VideoIndex.build(
    [(np.arange(1, N + 1), VECTORS[1:])], N + 1, IndexConfig(), Path(tempfile.mkdtemp(prefix="reelrank-sources-"))
)
HISTORY = HistoryLog.build(
    n_users=50,
    user_row=RNG.integers(1, 51, 3000),
    video_row=RNG.integers(1, N + 1, 3000),
    ts_ms=NOW_MS - RNG.integers(1, 100, 3000) * HOUR_MS,
    signals=RNG.integers(0, 2, 3000) << SIGNALS.index("long_view"),
    watch_fraction=np.zeros(3000, np.float32),
)[0]
COVISIT = CovisitConfig(feedback={"long_view": 1.0}, window_h=48.0)
COVISITS = Covisits.count(HISTORY, np.arange(N + 1) > 0, COVISIT)
ANN, COVISITED, FOLLOWED, POPULARITY, FRESH = SOURCES = (
    AnnSource(INDEX, UPLOADS),
    CovisitSource(COVISITS, COVISIT),
    FollowedSource(UPLOADS),
    PopularSource({(None, None): POPULAR, ("search", None): POPULAR[::-1], ("search", 3): POPULAR[::2]}),
    FreshSource(UPLOADS),
)


def window_of(user: int) -> HistoryWindow:
    return HISTORY.windows(np.array([user]), HISTORY.user_start[[user + 1]], 50)


def query(
    allowed: np.ndarray | None = None,
    followed: tuple[int, ...] = (1, 2, 3),
    surface: str | None = None,
    segment: int = -1,
    user: int = 9,
) -> SourceQuery:
    return SourceQuery(
        user_vector_D=VECTORS[17],
        history=window_of(user),
        followed_authors=np.array(followed, np.int64) + 2**60,
        allowed=Allowed.of(np.arange(N + 1) > 0 if allowed is None else allowed),
        now_ms=NOW_MS,
        surface=surface,
        segment=segment,
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
    found = ANN.retrieve(query(), 30)
    assert 17 not in found.rows or AUTHOR[17] - 2**60 > 3
    assert not np.isin(AUTHOR[found.rows], query().followed_authors).any()
    exact = np.where(np.isin(AUTHOR, query().followed_authors), -np.inf, VECTORS @ VECTORS[17])
    exact[0] = -np.inf
    assert np.array_equal(found.rows, np.argsort(-exact)[:30])


def test_covisited_is_what_goes_with_the_users_likes_summed_by_a_plain_loop() -> None:
    for user in range(1, 30):
        window, expected = window_of(user), np.zeros(N + 1)
        likes = [video for video, bits in zip(window.video_row_BL[0], window.signals_BL[0], strict=True) if bits][::-1]
        for place, video in enumerate(likes):
            for at in range(COVISITS.start[video], COVISITS.start[video + 1]):
                expected[COVISITS.neighbour[at]] += COVISIT.recency**place * COVISITS.score[at]
        found = COVISITED.retrieve(query(user=user), 1000)
        assert len(found.rows) == (expected > 0).sum() > 20
        assert found.scores == pytest.approx(expected[found.rows], rel=1e-5)
    newcomer = replace(query(), history=empty_window(1, 50))
    assert len(COVISITED.retrieve(newcomer, 10).rows) == 0


def test_followed_authors_newest_uploads_come_first_and_none_from_the_future() -> None:
    found = FOLLOWED.retrieve(query(), 1000)
    expected = np.flatnonzero(np.isin(AUTHOR, query().followed_authors) & (UPLOAD_MS <= NOW_MS))
    assert set(found.rows) == set(expected)
    assert (np.diff(UPLOAD_MS[found.rows]) <= 0).all()
    assert len(FOLLOWED.retrieve(query(followed=()), 10).rows) == 0
    assert len(FOLLOWED.retrieve(query(followed=(999, -7)), 10).rows) == 0


def test_popular_takes_the_narrowest_order_there_is() -> None:
    def top(surface: str | None, segment: int) -> list[int]:
        return POPULARITY.retrieve(query(surface=surface, segment=segment), 5).rows.tolist()

    assert top("search", 3) == POPULAR[::2][:5].tolist()
    assert top("search", 4) == top("search", -1) == POPULAR[::-1][:5].tolist()
    assert top("new tab", 3) == top(None, -1) == POPULAR[:5].tolist()


def test_fresh_is_the_newest_that_is_out() -> None:
    found = FRESH.retrieve(query(), 20)
    out = np.where((UPLOAD_MS <= NOW_MS) & (UPLOAD_MS >= 0), UPLOAD_MS, -2)
    assert np.array_equal(np.sort(UPLOAD_MS[found.rows])[::-1], np.sort(out)[::-1][:20])


def test_what_is_new_is_sought_among_the_newest_uploads_however_little_is_allowed() -> None:
    n = (1 << 18) + 5
    uploads = Uploads.build(np.ones(n, np.int64), NOW_MS - n + np.arange(n), np.arange(n) > 0)
    for row, found in ((n - 1, [n - 1]), (n - (1 << 18), [n - (1 << 18)]), (2, [])):
        assert FreshSource(uploads).retrieve(query(np.arange(n) == row), 10).rows.tolist() == found
