"""Many queries that each exclude rows of their own: answered as each would be alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.index import VideoIndex, exact, search

sys.path.insert(0, str(Path(__file__).parent))
from test_video_index import ENGINES, QUERIES, VECTORS, N, opened

INDEXED = np.arange(N + 1) % 10 != 0


@pytest.fixture(scope="module", params=ENGINES)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return opened(request.param, tmp_path_factory.mktemp("index"))


def own_lists(rng: np.random.Generator) -> list[np.ndarray]:
    """Nothing, a few, half of the nearest, nearly all of them, rows that do not exist, and everything."""
    nearest_QN = np.argsort(-(QUERIES @ VECTORS.T), axis=1)
    counts = [0, 5, 400, 3000, 300, 50, 0, 1, 900]
    lists = [rng.choice(row[: 2 * n], n) for row, n in zip(nearest_QN[:-1], counts, strict=True)]
    lists[4] = np.append(lists[4], [-1, 0, N + 1, 2**40])
    return [*lists, np.arange(N + 1)]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.02, 0.0])
@pytest.mark.parametrize("k", [1, 7, 100, 4500])
def test_each_query_gets_k_of_what_it_may_see_and_nothing_else(index: VideoIndex, share: float, k: int) -> None:
    rng = np.random.default_rng()
    allowed, lists = rng.random(N + 1) < share, own_lists(rng)
    rows_QK, score_QK = index.search(QUERIES, k, allowed=index.allow(allowed), excluded_rows=lists)
    assert rows_QK.shape == score_QK.shape == (len(QUERIES), k)
    for query, excluded, rows, score in zip(QUERIES, lists, rows_QK, score_QK, strict=True):
        permitted = set(np.flatnonzero(allowed & INDEXED)) - set(excluded)
        n = min(k, len(permitted))
        assert len(set(rows[:n])) == n
        assert set(rows[:n]) <= permitted
        assert (rows[n:] == -1).all()
        assert np.isneginf(score[n:]).all()
        assert (np.diff(score[:n]) <= 0).all()
        assert np.allclose(index.vectors[rows[:n]] @ query, score[:n], atol=1e-5)
    assert index.underfilled == 0


@pytest.mark.parametrize("share", [1.0, 0.4, 0.02])
def test_a_query_among_many_is_answered_as_alone_or_better(index: VideoIndex, share: float) -> None:
    rng = np.random.default_rng()
    allowed, lists = index.allow(rng.random(N + 1) < share), own_lists(rng)
    _, together = index.search(QUERIES, 20, allowed=allowed, excluded_rows=lists)
    for number, excluded in enumerate(lists):
        _, alone = index.search(QUERIES[number : number + 1], 20, allowed=allowed, excluded_rows=excluded)
        assert (together[number] >= alone[0] - 1e-5).all()


def test_the_size_of_blocks_changes_no_answer(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng()
    filters, lists = [index.allow(rng.random(N + 1) < share) for share in (1.0, 0.4, 0.02)], own_lists(rng)
    wholes = [index.search(QUERIES, 20, allowed=one, excluded_rows=lists) for one in filters]
    for module, name, small in (
        (exact, "MIN_BLOCK", 301),
        (exact, "scores_at_once", lambda _: 0),
        (exact, "QUERIES_AT_ONCE", 3),
        (search, "SCAN_BLOCK", 17),
    ):
        monkeypatch.setattr(module, name, small)
    for one, (rows, scores) in zip(filters, wholes, strict=True):
        found, again = index.search(QUERIES, 20, allowed=one, excluded_rows=lists)
        assert np.allclose(scores, again, atol=1e-5)
        differ = rows != found
        assert np.allclose(scores[differ], again[differ], atol=1e-5)
        assert (found[differ] >= 0).all()


def test_lists_that_do_not_fit_the_queries_are_named(index: VideoIndex) -> None:
    some = np.array([1, 2])
    with pytest.raises(ValueError, match="excluded_rows holds 2 entries for 10 queries"):
        index.search(QUERIES, 3, excluded_rows=[some, some])
    with pytest.raises(ValueError, match="one dimension"):
        index.search(QUERIES[:1], 3, excluded_rows=[some[:, None]])
