"""The fast paths of collation give exactly what their plain definitions give."""

from __future__ import annotations

import numpy as np
import pytest

from features.history import GAP_BUCKETS, UNDATED_TS_MS, gap_bucket, unpack_signals
from features.inputs import MARKED_A_ROW, _distinct
from features.schema import SIGNALS


@pytest.mark.parametrize("highest", [0, 50, 300 * MARKED_A_ROW, 2**40])
def test_distinct_videos_are_those_of_a_sort(highest):
    rows = np.random.default_rng(1).integers(0, highest + 1, 300)
    found, expected = _distinct(rows), np.unique(rows, return_inverse=True)
    for ours, numpys in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, numpys)
        assert ours.dtype == numpys.dtype


def test_gaps_fall_into_the_log2_bucket_of_their_seconds():
    rng = np.random.default_rng(2)
    powers_ms = 1000 * 2 ** np.arange(26)
    gaps_ms = np.concatenate([[0, 1, 999], powers_ms - 1, powers_ms, powers_ms + 1, rng.integers(0, 2**38, 5000)])
    logs = 1 + np.floor(np.log2(np.maximum(gaps_ms / 1000, 1)))
    later = np.full(len(gaps_ms), 2**41)
    found = gap_bucket(later, later - gaps_ms, np.ones(len(gaps_ms), bool))
    np.testing.assert_array_equal(found, np.minimum(logs, GAP_BUCKETS - 1))
    assert gap_bucket(later[:2], np.array([UNDATED_TS_MS, 5]), np.array([True, False])).tolist() == [0, 0]


def test_signals_unpack_bit_by_bit():
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    unpacked = unpack_signals(bits)
    for s in range(len(SIGNALS)):
        np.testing.assert_array_equal(unpacked[..., s], (bits >> s) & 1)
    assert unpacked.dtype == np.float32
