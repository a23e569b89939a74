"""The corpus reads its shards in order, and exact answers are those of a full sort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.vectors import Corpus, exact_answers, numbered
from candidate_gen.index.check import exact_top


def plain(vector_ND: np.ndarray, query_QD: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(query_QD @ vector_ND.T), axis=1, kind="stable")[:, :k]


def test_blocks_follow_the_shards_and_stop_at_n(corpus_folder: Path):
    corpus = Corpus.open(corpus_folder)
    whole = np.concatenate([np.load(shard) for shard in corpus.shards])
    assert len(corpus) == 1_500 + 700 + 1_800
    starts, blocks = zip(*corpus.blocks(2_300, size=400), strict=True)
    assert starts == (0, 400, 800, 1_200, 1_500, 1_900, 2_200)
    np.testing.assert_array_equal(np.concatenate(blocks), whole[:2_300])
    np.testing.assert_array_equal(corpus.matrix(1_600), whole[:1_600].astype(np.float32))


def test_more_videos_than_the_shards_hold_is_refused(corpus_folder: Path):
    with pytest.raises(ValueError, match=r"holds 4,000 videos, 4,001 were asked for"):
        list(Corpus.open(corpus_folder).blocks(4_001))


def test_a_folder_without_shards_or_with_other_types_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="found none"):
        Corpus.open(tmp_path)
    np.save(tmp_path / "videos-00000.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="float32"):
        Corpus.open(tmp_path)


def test_streamed_exact_answers_are_those_of_a_full_sort(corpus_folder: Path):
    corpus = Corpus.open(corpus_folder)
    query_QD, vector_ND = corpus.queries(40), corpus.matrix(len(corpus))
    number_QK, score_QK = exact_top(numbered(corpus.blocks(len(corpus), size=333)), query_QD, 25)
    expected_QK = plain(vector_ND, query_QD, 25)
    product_QN = query_QD @ vector_ND.T
    np.testing.assert_allclose(score_QK, np.take_along_axis(product_QN, expected_QK, 1), rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(product_QN, number_QK, 1), score_QK, rtol=1e-5)
    assert (np.sort(number_QK) == np.sort(expected_QK)).mean() > 0.99  # equal scores may change places


def test_fewer_videos_than_k_are_padded(corpus_folder: Path):
    corpus = Corpus.open(corpus_folder)
    number_QK, score_QK = exact_top(numbered(corpus.blocks(7, size=3)), corpus.queries(4), 9)
    assert (np.sort(number_QK)[:, 2:] == np.arange(7)).all()
    assert (number_QK[:, 7:] == -1).all()
    assert np.isneginf(score_QK[:, 7:]).all()


def test_cached_answers_belong_to_these_vectors_and_these_queries(corpus_folder: Path, tmp_path: Path):
    corpus = Corpus.open(corpus_folder)
    first = exact_answers(corpus, 1_500, corpus.queries(5), 10, tmp_path)
    np.testing.assert_array_equal(exact_answers(corpus, 1_500, corpus.queries(5), 10, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1
    exact_answers(corpus, 1_501, corpus.queries(5), 10, tmp_path)
    exact_answers(corpus, 1_500, corpus.queries(6), 10, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
