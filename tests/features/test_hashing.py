"""Hashes are XXH64, equal to the library's, for any signed 64-bit id."""

from __future__ import annotations

import numpy as np
import xxhash

from features.hashing import bucket, collision_rate, hash_int64, hash_strings


def test_numpy_hash_equals_the_xxhash_library_over_the_whole_int64_range():
    rng = np.random.default_rng()
    ids = np.concatenate([rng.integers(-(2**63), 2**63 - 1, 500), [0, -1, 2**31, 2**53 + 1, -(2**63), 2**63 - 1]])
    for seed in (0, 20260101):
        expected = [xxhash.xxh64_intdigest(int(i).to_bytes(8, "little", signed=True), seed=seed) for i in ids]
        assert hash_int64(ids, seed).tolist() == expected


def test_strings_hash_like_the_library_and_none_like_nothing():
    de = xxhash.xxh64_intdigest(b"de", seed=7)
    assert hash_strings(["de", None, "de"], 7).tolist() == [de, 0, de]


def test_buckets_leave_row_zero_to_the_unknown():
    rows = bucket(hash_int64(np.arange(10_000), 1), 17)
    assert rows.min() == 1
    assert rows.max() == 16


def test_collision_rate_counts_the_ids_that_share_a_row():
    ids = np.arange(1_000)
    assert collision_rate(ids, 2, 0) == 1.0
    rows = bucket(hash_int64(ids, 0), 4_096)
    sharing = sum((rows == row).sum() for row in set(rows.tolist()) if (rows == row).sum() > 1)
    assert collision_rate(ids, 4_096, 0) == sharing / 1_000
