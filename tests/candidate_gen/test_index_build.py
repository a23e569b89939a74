"""Building: two-level clusters near flat ones, codes byte for byte FAISS's, lists on disk as FAISS's in memory, a
killed build that goes on, shards in any order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import pytest
import torch

from candidate_gen.index import IndexConfig, VideoIndex, build
from candidate_gen.index.check import recall_against_shards
from candidate_gen.index.clusters import Clusters
from candidate_gen.index.codes import Codebook, pack
from candidate_gen.index.kmeans import ITERATIONS, lloyd
from candidate_gen.index.lists import InvertedLists
from candidate_gen.index.stored import StoredVectors, create
from candidate_gen.index.trained import Trained, learn_space

faiss: Any = _faiss
DIM = 24


def videos(n: int, seed: int | None = None) -> np.ndarray:
    """(n, D) float32 of length 1, clustered, with strong and weak directions, as trained towers give."""
    rng = np.random.default_rng(seed)
    strength = 0.85 ** np.arange(DIM)
    x = rng.normal(size=(60, DIM))[rng.integers(0, 60, n)] + 0.5 * rng.normal(size=(n, DIM))
    x *= strength
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Corpus:
    """Shards of one matrix, rows shuffled over them; counts what is read."""

    def __init__(self, vector_ND: np.ndarray, shards: int) -> None:
        self._rows = np.array_split(np.random.default_rng(5).permutation(len(vector_ND)), shards)
        self._vector_ND, self.fingerprint, self.reads = vector_ND, "one", []
        self.counts = tuple(len(rows) for rows in self._rows)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append(number)
        rows = self._rows[number]
        return rows + 1, self._vector_ND[rows]


def test_two_level_clusters_leave_hardly_more_error_than_flat_k_means() -> None:
    x = videos(40_000)
    two_level = Clusters.train(x, 400, seed=3)
    flat = faiss.Kmeans(DIM, 400, niter=8, seed=3, min_points_per_centroid=1)
    flat.train(x)

    def error(centroids: np.ndarray, of: np.ndarray) -> float:
        return float(((x - centroids[of]) ** 2).sum(axis=1).mean())

    nearest = (x @ flat.centroids.T - (flat.centroids**2).sum(axis=1) / 2).argmax(axis=1)
    assert error(two_level.centroid_LD, two_level.assign(x)) < 1.1 * error(flat.centroids, nearest)


def test_k_means_moves_as_faiss_s_from_the_same_beginning() -> None:
    x = videos(20_000)  # more than are assigned together
    beginning = x[np.random.default_rng().choice(len(x), 60, replace=False)]
    theirs = faiss.Kmeans(DIM, 60, niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=10**6)
    theirs.train(x, init_centroids=beginning)
    ours = lloyd(torch.from_numpy(x), torch.from_numpy(beginning))
    # A vector halfway between two centroids may go either way in either library, which moves both a little.
    assert (np.abs(ours.numpy() - theirs.centroids).max(axis=1) < 1e-4).mean() > 0.7
    apart = [((x[:, None] - one_kD) ** 2).sum(axis=2).min(axis=1).mean() for one_kD in (ours.numpy(), theirs.centroids)]
    assert apart[0] == pytest.approx(apart[1], rel=1e-4)


def test_a_centroid_that_nobody_is_near_takes_half_of_a_large_one() -> None:
    x = videos(3_000)
    far = np.full((5, DIM), 50, np.float32) * np.arange(1, 6, dtype=np.float32)[:, None]
    moved = lloyd(torch.from_numpy(x), torch.from_numpy(np.concatenate([x[:5], far]))).numpy()
    nearest = (x @ moved.T - (moved**2).sum(axis=1) / 2).argmax(axis=1)
    assert (np.bincount(nearest, minlength=10) > 0).all()


def test_assignment_over_all_groups_is_the_nearest_centroid_and_over_few_nearly_so() -> None:
    x = videos(20_000)
    clusters = Clusters.train(x, 300, seed=1)
    exact = (x @ clusters.centroid_LD.T - (clusters.centroid_LD**2).sum(axis=1) / 2).argmax(axis=1)
    assert (clusters.assign(x, reach=10**6) == exact).mean() > 0.9999  # equal distances may go either way
    assert (clusters.assign(x) == exact).mean() > 0.93


@pytest.mark.parametrize("lists", [1, 7, 256, 300])
def test_every_number_of_lists_can_be_had_even_of_few_or_equal_vectors(lists: int) -> None:
    for x in (videos(lists), np.repeat(videos(3), 200, axis=0)):
        clusters = Clusters.train(x, lists, seed=1)
        assert clusters.lists == lists
        assert np.isfinite(clusters.centroid_LD).all()
        assert clusters.assign(x).max() < lists


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_are_faiss_s_byte_for_byte(bits: int) -> None:
    x = videos(320)
    codebook = Codebook.train(x, bits, seed=1)
    index = faiss.IndexPQFastScan(DIM, codebook.nibbles, 4)
    index.train(x)
    codebook.install(index)
    index.add(x)
    theirs = faiss.rev_swig_ptr(index.codes.get(), index.codes.nbytes())
    exact = index.pq.compute_codes(x)
    assert (codebook.encode(x) == exact).mean() > 0.999  # a value half way between two levels may go either way
    ours = pack(exact)
    assert ours.shape == (320 // 32, 32 * codebook.code_bytes)
    assert np.array_equal(ours.ravel(), theirs[: ours.size])


def test_eight_bits_leave_a_tenth_of_the_error_of_four_and_four_a_fifth_of_that_of_two() -> None:
    x = videos(20_000)

    def error(bits: int) -> float:
        codebook = Codebook.train(x, bits, seed=1)
        codes = codebook.encode(x)
        assert codes.shape == (len(x), DIM * bits // 8)
        levels = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(x), -1)
        values = codebook.value_MKd[np.arange(codebook.nibbles), levels]
        decoded = values.reshape(len(x), codebook.stages, DIM).sum(axis=1)
        return float(((decoded - x) ** 2).mean())

    assert error(8) < 0.1 * error(4)
    assert error(4) < 0.2 * error(2)


def test_lists_on_disk_answer_as_faiss_s_own_in_memory(tmp_path: Path) -> None:
    x, queries = videos(5000, 1), videos(40, 2)
    config = IndexConfig(kind="ivf", lists=50, code_bits=4)
    trained = VideoIndex.build([(np.arange(1, 5001), x)], 5001, config, tmp_path).trained
    width = len(trained.query_map_RD)
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(trained.clusters.centroid_LD)
    plain = faiss.IndexIVFPQ(quantizer, width, 50, trained.codebook.nibbles, 4, faiss.METRIC_INNER_PRODUCT)
    plain.by_residual, plain.is_trained = True, True
    trained.codebook.install(plain)
    mapped = np.ascontiguousarray(x @ trained.video_map_RD.T)
    lists, rows = trained.clusters.assign(mapped).astype(np.int64), np.arange(1, 5001)
    plain.add_core(5000, *(faiss.swig_ptr(a) for a in (mapped, rows, lists)))
    theirs = faiss.IndexIVFPQFastScan(plain)
    theirs.nprobe = 10
    expected_scores, expected = theirs.search(np.ascontiguousarray(queries @ trained.query_map_RD.T), 50)
    params = faiss.SearchParametersPreTransform(index_params=faiss.IVFSearchParameters(nprobe=10))
    ours = InvertedLists(tmp_path, trained, 5001)
    scores, found = ours.batched.index.search(queries, 50, params=params)
    assert (np.abs(scores - expected_scores) < 1e-5).mean() > 0.9  # vectors between two lists may go either way
    assert np.mean([np.isin(a, b).mean() for a, b in zip(found, expected, strict=True)]) > 0.99  # equal scores swap
    assert np.array_equal(np.sort(ours.rows()), rows)


@pytest.mark.parametrize(("kind", "worst"), [("float16", 0.0005), ("int8", 0.006), ("int4", 0.09)])
def test_stored_vectors_come_back_as_precise_as_their_kind(tmp_path: Path, kind: str, worst: float) -> None:
    x = videos(1000)
    create(tmp_path / "stored.faiss", x, 1001, kind)
    writing = StoredVectors(tmp_path / "stored.faiss", writable=True)
    order = np.random.default_rng().permutation(1000)
    writing.write(order + 1, x[order])
    writing.flush()
    assert np.abs(StoredVectors(tmp_path / "stored.faiss")[np.arange(1, 1001)] - x).max() < worst


def test_the_codes_space_keeps_products_and_the_asked_share_of_the_variance() -> None:
    x, queries = videos(5000, 1), videos(300, 2)
    kept = {}
    for share in (0.5, 0.9, 1.0):
        video_map, query_map = learn_space(x, None, share)
        assert np.allclose(video_map @ query_map.T, np.eye(len(video_map)), atol=1e-4)
        centred = x - x.mean(axis=0)
        kept_part = centred @ video_map.T @ query_map
        assert (kept_part**2).sum() >= (share - 1e-4) * (centred**2).sum()
        kept[share] = len(query_map)
    assert kept[0.5] < kept[0.9] < kept[1.0] == DIM
    video_map, query_map = learn_space(x, queries, 1.0)
    assert np.allclose((queries @ query_map.T) @ (x @ video_map.T).T, queries @ x.T, atol=1e-4)


def test_codes_are_finer_along_what_queries_look_at() -> None:
    """All queries look along one strong direction, as they do along an additive prior."""
    x = videos(20_000, 1)
    queries = 0.2 * videos(500, 2)
    queries[:, 3] += 1.0
    config = IndexConfig(kept_variance=1.0, code_bits=4)

    def error(sample_queries: np.ndarray | None) -> float:
        trained = Trained.fit(x, 64, config, sample_queries)
        lists, codes = trained.encode(x)
        levels = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(x), -1)
        residual = trained.codebook.value_MKd[np.arange(levels.shape[1]), levels, 0]
        seen = (queries @ trained.query_map_RD.T) @ (trained.clusters.centroid_LD[lists] + residual).T
        return float(((seen - queries @ x.T) ** 2).mean())

    assert error(queries) < 0.7 * error(None)


def test_shards_in_parallel_and_one_shard_give_the_same_answers(tmp_path: Path) -> None:
    x, queries = videos(9000, 1), videos(30, 2)
    config = IndexConfig(kind="ivf", exact_below=0, lists=60, probes=60)

    def backwards(work, numbers) -> Iterable[int]:
        return [work(number) for number in reversed(list(numbers))]

    build(Corpus(x, 7), 9001, config, tmp_path / "seven", parallel=backwards)
    build(Corpus(x, 1), 9001, config, tmp_path / "one")
    seven, one = (VideoIndex.open(tmp_path / name).search(queries, 50)[0] for name in ("seven", "one"))
    assert np.mean([np.isin(a, b).mean() for a, b in zip(seven, one, strict=True)]) > 0.97  # their samples differ


class KilledError(Exception):
    pass


def test_a_killed_build_goes_on_with_the_shards_that_are_missing(tmp_path: Path) -> None:
    corpus, config = Corpus(videos(6000, 1), 6), IndexConfig(kind="ivf", lists=40)

    def dies_after_three(work, numbers) -> Iterable[int]:
        for number in list(numbers)[:3]:
            yield work(number)
        raise KilledError

    with pytest.raises(KilledError):
        build(corpus, 6001, config, tmp_path / "index", parallel=dies_after_three)
    with pytest.raises(FileNotFoundError):
        VideoIndex.open(tmp_path / "index")
    corpus.reads.clear()
    build(corpus, 6001, config, tmp_path / "index")
    assert corpus.reads == [3, 4, 5]
    build(Corpus(videos(6000, 1), 6), 6001, config, tmp_path / "fresh")
    for path in (tmp_path / "fresh").iterdir():
        if path.name != "index.json":  # it holds how long the stages took
            assert path.read_bytes() == (tmp_path / "index" / path.name).read_bytes(), path.name
    corpus.reads.clear()
    corpus.fingerprint = "two"
    build(corpus, 6001, config, tmp_path / "index")
    assert set(corpus.reads) == set(range(6))


def test_an_index_can_take_over_the_lists_and_codes_of_another(tmp_path: Path) -> None:
    x = videos(6000, 1)
    first = VideoIndex.build([(np.arange(1, 6001), x)], 6001, IndexConfig(kind="ivf", lists=40), tmp_path / "first")
    config = IndexConfig(kind="ivf", lists=40, exact_below=0)
    corpus = Corpus(videos(2000, 3), 1)
    build(corpus, 2001, config, tmp_path / "second", trained=first.trained)
    second = VideoIndex(tmp_path / "second")
    assert np.array_equal(second.trained.clusters.centroid_LD, first.trained.clusters.centroid_LD)
    assert recall_against_shards(second, corpus, videos(20, 4), 20) > 0.9


def test_what_the_index_loses_is_counted_against_the_vectors_it_was_built_from(tmp_path: Path) -> None:
    x, queries = videos(6000, 1), videos(20, 2)
    corpus = Corpus(x, 3)
    build(corpus, 6001, IndexConfig(kind="ivf", lists=40, exact_below=0, probes=2), tmp_path)
    index = VideoIndex(tmp_path)
    exact = np.argsort(-(queries @ x.T), axis=1)[:, :50] + 1
    found, _ = index.search(queries, 50)
    shares = [len(set(a) & set(b)) / 50 for a, b in zip(exact, found, strict=True)]
    assert recall_against_shards(index, corpus, queries, 50) == pytest.approx(np.mean(shares))
    assert np.mean(shares) < 1.0
