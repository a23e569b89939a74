"""Chance that depends on what is drawn for, not on when: numbers made from ids and a seed by mixing bits.

A user's bootstrap counts and a request's random slate come out the same in whatever order, parts or processes the log
is read; nothing has to be kept. N keys, B resamples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.uint64]

_STEP = 0x9E3779B97F4A7C15
_WORD = 8


def mix(keys: npt.ArrayLike, salt: int = 0) -> Keys:
    """A bijection of the 64-bit numbers that passes for random (the finaliser of splitmix64), another for each salt."""
    x = np.asarray(keys).astype(np.uint64) + np.uint64((salt * _STEP + _STEP) & 0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(keys: npt.ArrayLike, salt: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a key."""
    return (mix(mix(keys), salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_keys(texts: pa.Array | pa.ChunkedArray) -> Keys:
    """A 64-bit key a string, the same on every machine and in every version; equal strings have equal keys."""
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    array = array.cast(pa.large_string())
    if not len(array):
        return np.zeros(0, dtype=np.uint64)
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    bytes_ = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    length_N = np.diff(offsets)
    width = max(-(-int(length_N.max()) // _WORD), 1) * _WORD
    padded = np.zeros((len(array), width), dtype=np.uint8)
    padded[np.arange(width) < length_N[:, None]] = bytes_[offsets[0] : offsets[-1]]
    key_N = mix(length_N)
    for word_N in padded.view("<u8").T:
        key_N = mix(key_N ^ word_N, 1)
    return key_N


def _poisson_table(bits: int = 16) -> npt.NDArray[np.uint8]:
    """The count of each 16-bit number: every k gets its share of the numbers, to within one of them."""
    share = np.exp(-1.0) / np.array([math.factorial(k) for k in range(12)], dtype=np.float64)
    edges = np.rint(np.cumsum(share) * 2**bits).astype(np.int64)
    return np.searchsorted(edges, np.arange(2**bits), side="right").astype(np.uint8)


_POISSON = _poisson_table()


def poisson_counts(keys: npt.ArrayLike, resamples: int, seed: int) -> npt.NDArray[np.uint8]:
    """(N, B): how often each key enters each resample, k ~ Poisson(1), four resamples from each mixed number."""
    base = mix(keys, seed)[:, None]
    words = np.arange(-(-resamples // 4), dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        mixed = mix(base + words * np.uint64(_STEP), seed + 1)
    return _POISSON[mixed.view("<u2")[:, :resamples]]
