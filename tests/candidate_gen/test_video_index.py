"""The index: never a filtered row, k results wherever k exist, the same after loading, damaged files refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from candidate_gen.index import IndexConfig, VideoIndex

N, DIM = 4000, 16
CONFIGS = {
    "flat": IndexConfig(kind="flat"),
    "ivf": IndexConfig(kind="ivf", exact_below=40, lists=32, probes=2),
}


def catalogue() -> np.ndarray:
    """(N+1, D) float32 of length 1 in 40 clusters; row 0 zeros."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, DIM))[rng.integers(0, 40, N)] + 0.4 * rng.normal(size=(N, DIM))
    return np.vstack([np.zeros(DIM), x / np.linalg.norm(x, axis=1, keepdims=True)]).astype(np.float32)


VECTORS = catalogue()
QUERIES = np.ascontiguousarray(VECTORS[np.arange(50, 60)])


def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row but those divisible by 10, a thousand at a time, in no order."""
    rows = np.random.default_rng(0).permutation(np.arange(1, N + 1))
    rows = rows[rows % 10 != 0]
    for start in range(0, len(rows), 1000):
        yield rows[start : start + 1000], VECTORS[rows[start : start + 1000]]


@pytest.fixture(scope="module", params=list(CONFIGS))
def index(request: pytest.FixtureRequest) -> VideoIndex:
    return VideoIndex.build(chunks(), N + 1, CONFIGS[request.param])


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.005, 0.0])
def test_no_filtered_row_comes_back_and_every_allowed_one_can(index: VideoIndex, share: float) -> None:
    rng = np.random.default_rng(9)
    allowed = rng.random(N + 1) < share
    allowed[0] = True  # a careless caller: row 0 is not indexed, so it must not come back all the same
    excluded = np.flatnonzero(allowed)[::3]
    permitted = {row for row in np.flatnonzero(allowed) if row % 10 and row not in set(excluded)}
    for k in (7, len(permitted), len(permitted) + 5):
        rows, scores = index.search(QUERIES, k, allowed=allowed, excluded_rows=excluded)
        assert rows.shape == scores.shape == (len(QUERIES), k)
        for found, score in zip(rows, scores, strict=True):
            real = found[found >= 0]
            assert len(real) == len(set(real)) == min(k, len(permitted))
            assert set(real) <= permitted
            assert (found[len(real) :] == -1).all()
            assert np.isneginf(score[len(real) :]).all()
            assert (np.diff(score[: len(real)]) <= 0).all()


def test_scores_are_inner_products_and_the_flat_index_is_exact() -> None:
    index = VideoIndex.build(chunks(), N + 1, CONFIGS["flat"])
    rows, scores = index.search(QUERIES, 20)
    indexed = np.arange(N + 1) % 10 != 0
    exact = QUERIES @ VECTORS.astype(np.float16).astype(np.float32).T
    exact[:, ~indexed] = -np.inf
    assert np.allclose(scores, np.sort(exact, axis=1)[:, ::-1][:, :20], atol=1e-5)
    assert np.allclose(np.take_along_axis(exact, rows, 1), scores, atol=1e-5)
    assert index.recall_against_exact(QUERIES, 20) == 1.0


def test_more_probes_find_more_until_all_lists_find_everything() -> None:
    def recall(probes: int) -> float:
        config = IndexConfig(kind="ivf", exact_below=0, lists=32, probes=probes, refine=8)
        return VideoIndex.build(chunks(), N + 1, config).recall_against_exact(QUERIES, 100)

    few, all_lists = recall(1), recall(32)
    assert few < all_lists
    assert all_lists > 0.99


def test_auto_is_exact_for_a_small_catalogue_and_inverted_for_a_large_one() -> None:
    small = VideoIndex.build(chunks(), N + 1, IndexConfig())
    large = VideoIndex.build(chunks(), N + 1, IndexConfig(exact_below=1000))
    assert (small._kind, large._kind) == ("flat", "ivf")
    assert len(small) == len(large) == N * 9 // 10


def test_a_loaded_index_answers_as_the_saved_one(index: VideoIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    loaded = VideoIndex.load(tmp_path)
    allowed = np.random.default_rng(1).random(N + 1) < 0.6
    for options in ({}, {"allowed": allowed}, {"excluded_rows": np.array([1, 2, 3])}):
        for before, after in zip(
            index.search(QUERIES, 30, **options), loaded.search(QUERIES, 30, **options), strict=True
        ):
            assert np.array_equal(before, after)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.faiss", "index.json", "vectors.npy"]
    assert np.allclose(loaded.vectors_RD[51], VECTORS[51], atol=1e-3)
    assert not loaded.vectors_RD[[0, 10]].any()


def test_files_that_disagree_are_refused_by_name(index: VideoIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    path = tmp_path / "index.json"
    good = path.read_text()
    for field, value in (("dim", 8), ("ntotal", 5), ("n_rows", N), ("kind", "pickle"), ("format", 9), ("dim", "16")):
        path.write_text(json.dumps({**json.loads(good), field: value}))
        with pytest.raises(ValueError, match="build the index again"):
            VideoIndex.load(tmp_path)
    path.write_text(good[:-20])
    with pytest.raises(ValueError, match=r"index\.json does not describe an index"):
        VideoIndex.load(tmp_path)
    path.write_text(good)
    whole = (tmp_path / "index.faiss").read_bytes()
    (tmp_path / "index.faiss").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"index\.faiss is not a FAISS index"):
        VideoIndex.load(tmp_path)


def test_a_faiss_type_that_is_not_expected_is_refused(tmp_path: Path) -> None:
    VideoIndex.build(chunks(), N + 1, CONFIGS["flat"]).save(tmp_path)
    other = faiss.IndexHNSWFlat(DIM, 8)
    other.add(VECTORS[1 : N * 9 // 10 + 1])  # type: ignore[call-arg]
    faiss.write_index(other, str(tmp_path / "index.faiss"))
    with pytest.raises(ValueError, match="IndexHNSWFlat"):
        VideoIndex.load(tmp_path)


def test_bad_vectors_and_bad_queries_say_what_is_wrong() -> None:
    rows = np.array([1, 2])
    with pytest.raises(ValueError, match="no vectors to index"):
        VideoIndex.build(iter([]), 5, IndexConfig())
    with pytest.raises(ValueError, match="come once"):
        VideoIndex.build([(rows, VECTORS[rows]), (rows, VECTORS[rows])], 5, IndexConfig())
    with pytest.raises(ValueError, match="come once"):
        VideoIndex.build([(np.array([0]), VECTORS[:1])], 5, IndexConfig())
    with pytest.raises(ValueError, match="NaN"):
        VideoIndex.build([(rows, np.full((2, DIM), np.nan, np.float32))], 5, IndexConfig())
    index = VideoIndex.build([(rows, VECTORS[rows])], 5, IndexConfig())
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        index.search(np.zeros((1, 3), np.float32), 2)
    with pytest.raises(ValueError, match="`allowed` has 4 rows, the index 5"):
        index.search(VECTORS[:1], 2, allowed=np.ones(4, bool))
