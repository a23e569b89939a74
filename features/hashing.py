"""Ids to embedding rows: XXH64 with a stated seed, equal in every process, language and version.

N values. `hash_int64` is XXH64 of the eight little-endian bytes of each id, written in numpy so that a million ids
take milliseconds; a test holds it to the xxhash library. Python's own `hash` is never used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)


def hash_int64(ids_N: np.ndarray, seed: int) -> np.ndarray:
    """XXH64 of each signed 64-bit id (N,) -> uint64 (N,). Source: the xxHash specification, input of eight bytes."""
    x = np.ascontiguousarray(ids_N, dtype=np.int64).view(np.uint64)
    with np.errstate(over="ignore"):
        h = np.uint64(seed) + _P5 + np.uint64(8)
        h = h ^ (_rotl(x * _P2, 31) * _P1)
        h = _rotl(h, 27) * _P1 + _P4
        h = (h ^ (h >> np.uint64(33))) * _P2
        h = (h ^ (h >> np.uint64(29))) * _P3
        return h ^ (h >> np.uint64(32))


def hash_strings(values: Sequence[str | None], seed: int) -> np.ndarray:
    """XXH64 of each UTF-8 string (N,) -> uint64 (N,); None hashes to 0."""
    memo: dict[str | None, int] = {None: 0}
    for value in set(values):
        if value is not None:
            memo[value] = xxhash.xxh64_intdigest(value.encode(), seed=seed)
    return np.array([memo[value] for value in values], dtype=np.uint64)


def bucket(hashes_N: np.ndarray, rows: int) -> np.ndarray:
    """Hashes (N,) uint64 -> embedding rows 1 .. rows-1 (N,) int64; row 0 is kept for missing and unknown values."""
    return (hashes_N % np.uint64(rows - 1)).astype(np.int64) + 1


def collision_rate(ids_N: np.ndarray, rows: int, seed: int) -> float:
    """Share of distinct ids that share their row with another one: what a table of `rows` rows costs this id space."""
    distinct = np.unique(ids_N)
    if distinct.size == 0:
        return 0.0
    _, counts = np.unique(bucket(hash_int64(distinct, seed), rows), return_counts=True)
    return float(counts[counts > 1].sum() / distinct.size)


def _rotl(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))
