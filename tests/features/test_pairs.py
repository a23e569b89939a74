"""Counters of a viewer with an author and with tags: arithmetic by hand, strangers, many contexts in one batch."""

from __future__ import annotations

import numpy as np
import pytest

from features.entities import SparseColumns
from features.pairs import (
    PAIRED,
    PROFILE_SCALE,
    PROFILE_STRENGTH,
    STRENGTH,
    WIDTH_PER_FEATURE,
    pair_features,
    profile_features,
)
from features.schema import SIGNALS

COLUMNS = SparseColumns(names=("author_id", "tags"), widths=(1, 2), table_rows=(100, 100))
LENGTHS = SparseColumns(names=("duration_bucket",), widths=(1,), table_rows=(17,))
WIDTH = len(PAIRED) * WIDTH_PER_FEATURE
CLICK, LIKE = SIGNALS.index("click"), SIGNALS.index("like")


def window(rows: list[tuple[int, list[int], bool, bool]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(author, tags, clicked, liked) oldest first -> sparse (1, L, 3), signals (1, L, S), length (1,)."""
    sparse, signals = np.zeros((1, length, 3), np.int64), np.zeros((1, length, len(SIGNALS)), np.float32)
    for at, (author, tags, clicked, liked) in enumerate(rows):
        sparse[0, at] = [author, *tags, -1, -1][:3]
        signals[0, at, [CLICK, LIKE]] = clicked, liked
    return sparse, signals, np.array([len(rows)])


def test_rates_are_what_the_pair_adds_to_the_viewers_own() -> None:
    sparse, signals, length = window(
        [(5, [1], True, False), (5, [2], True, True), (6, [2, 3], False, False), (7, [4], False, False)], length=6
    )
    candidates = np.array([[5, 3, 2], [9, 8, -1], [6, -1, -1]])
    found = pair_features(sparse, signals, length, candidates, np.zeros(3, np.int64), COLUMNS)
    assert found.shape == (3, WIDTH)
    author, tags = found[:, :WIDTH_PER_FEATURE], found[:, WIDTH_PER_FEATURE : 2 * WIDTH_PER_FEATURE]
    # The viewer clicks half, likes a quarter. Author 5: two impressions, two clicks, one like.
    assert author[0, 0] == pytest.approx((2 - 2 * 0.5) / (2 + STRENGTH))
    assert author[0, 2] == pytest.approx((1 - 2 * 0.25) / (2 + STRENGTH))
    assert author[0, 3] == pytest.approx(np.log1p(2) / 4)
    # Tag 3 was seen once, without a click; tag 2 twice, with one click: the mean of both.
    assert tags[0, 0] == pytest.approx(((0 - 1 * 0.5) / (1 + STRENGTH) + (1 - 2 * 0.5) / (2 + STRENGTH)) / 2)
    assert tags[0, 3] == pytest.approx((np.log1p(1) + np.log1p(2)) / 2 / 4)
    assert found[1].tolist() == [0.0] * WIDTH, "nothing is known of a stranger"
    assert tags[2].tolist() == [0.0] * WIDTH_PER_FEATURE, "a video without tags shares none with padding"


def test_several_contexts_in_one_batch_count_as_each_alone() -> None:
    rng = np.random.default_rng(1)
    B, L, N = 4, 9, 30
    sparse, signals = rng.integers(0, 6, (B, L, 3)), (rng.random((B, L, len(SIGNALS))) < 0.3).astype(np.float32)
    length, owner, candidates = np.array([9, 0, 3, 7]), rng.integers(0, B, N), rng.integers(-1, 6, (N, 3))
    together = pair_features(sparse, signals, length, candidates, owner, COLUMNS)
    for b in range(B):
        own = owner == b
        alone = pair_features(
            sparse[b : b + 1], signals[b : b + 1], length[b : b + 1], candidates[own], np.zeros(own.sum(), int), COLUMNS
        )
        np.testing.assert_allclose(together[own], alone, atol=1e-6)
    assert np.abs(together[owner == 1]).max() == 0.0, "an empty history"
    assert np.isfinite(together).all()


def test_neighbouring_buckets_of_a_length_count_as_one() -> None:
    sparse, signals = np.array([[[3], [5], [8], [9]]]), np.zeros((1, 4, len(SIGNALS)), np.float32)
    signals[0, :2, CLICK] = 1.0
    found = pair_features(sparse, signals, np.array([4]), np.array([[3], [7], [16]]), np.zeros(3, np.int64), LENGTHS)
    assert found[:, -1].tolist() == pytest.approx([np.log1p(2) / 4, np.log1p(3) / 4, 0.0])
    assert found[:, 2 * WIDTH_PER_FEATURE].tolist() == pytest.approx([(2 - 1) / 6, (1 - 1.5) / 7, 0.0])


def test_a_profile_points_to_what_was_clicked_more_than_usual() -> None:
    dense = np.array([[[2.0, 1, 0], [0.0, 0, 1], [-1.0, 0, 1], [9.0, 9, 9]]])  # the last is padding
    signals = np.zeros((1, 4, len(SIGNALS)), np.float32)
    signals[0, [0, 3], CLICK] = 1.0
    found = profile_features(dense, signals, np.array([3]), np.array([[3.0, 1, 0], [0.0, 0, 2]]), np.zeros(2, int))
    # A third was clicked, so the three events weigh 2/3, -1/3, -1/3.
    profile = np.array([2 * 2 / 3 + 0 + 1 / 3, 2 / 3, -2 / 3]) / (3 + PROFILE_STRENGTH) * PROFILE_SCALE
    np.testing.assert_allclose(found[0, [0, 3]], [3 * profile[0], profile[1]], rtol=1e-6)
    np.testing.assert_allclose(found[1, [0, 3]], [0.0, 2 * profile[2]], rtol=1e-6)
    assert (found[:, [1, 2, 4, 5]] == 0).all(), "nothing was viewed long or liked"


def test_profiles_of_several_contexts_are_those_of_each_alone() -> None:
    rng = np.random.default_rng(2)
    B, P, N, D = 4, 7, 25, 5
    dense, signals = rng.normal(size=(B, P, D)), (rng.random((B, P, len(SIGNALS))) < 0.4).astype(np.float32)
    length, owner, candidates = np.array([7, 0, 2, 5]), rng.integers(0, B, N), rng.normal(size=(N, D))
    together = profile_features(dense, signals, length, candidates, owner)
    for b in range(B):
        own, of_b = owner == b, slice(b, b + 1)
        alone = profile_features(dense[of_b], signals[of_b], length[of_b], candidates[own], np.zeros(own.sum(), int))
        np.testing.assert_allclose(together[own], alone, atol=1e-6)
    assert np.abs(together[owner == 1]).max() == 0.0, "an empty past"
    nobody = np.zeros(0, int)
    assert profile_features(dense, signals, length, candidates[:0], nobody).shape == together[:0].shape
