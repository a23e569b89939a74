"""Residual product codes of 4-bit nibbles, packed as FAISS's fast-scan kernels read them.

A dimension has 8 bits (a nibble, and a second one for what the first leaves), 4, or 2 (pairs of dimensions share a
nibble). Kernels look up 32 codes at once, so codes are stored in blocks of 32, transposed: for each pair of nibbles, 32
bytes that hold that pair of all 32 codes (FAISS, `pq4_pack_codes`; Andre, Kermarrec and Le Scouarnec, "Quicker ADC").

N vectors, R dimensions, M nibbles a code, d dimensions a nibble.
"""

from __future__ import annotations

from typing import Any

import faiss as _faiss
import numpy as np

faiss: Any = _faiss

BLOCK = 32
"""Codes a block."""
_ORDER = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
"""Which codes of a half block stand side by side: the kernel's 16-bit sums come out of its lanes in this order."""


class Codebook:
    """Sixteen values a nibble; a code stands for the sum of its nibbles' values."""

    def __init__(self, value_MKd: np.ndarray, dim: int) -> None:
        self.nibbles, levels, width = value_MKd.shape
        self.stages, odd = divmod(self.nibbles * width, dim)
        if levels != 16 or odd or self.stages not in (1, 2) or (self.stages == 2 and width > 1):
            raise ValueError(f"codebook has shape {value_MKd.shape}, which is none of {dim} dimensions")
        self.dim, self.value_MKd = dim, np.ascontiguousarray(value_MKd, dtype=np.float32)
        self._pairs = faiss.ProductQuantizer(dim, self.nibbles, 4) if width > 1 else None
        if self._pairs is not None:
            faiss.copy_array_to_vector(self.value_MKd.ravel(), self._pairs.centroids)

    @classmethod
    def train(cls, residual_NR: np.ndarray, bits: int, seed: int) -> Codebook:
        """Learn from residuals of the training sample; `bits` a dimension: 2, 4 or 8."""
        dim = residual_NR.shape[1]
        if bits == 2:
            return cls(_values(residual_NR, dim // 2, seed), dim)
        first = cls(_values(residual_NR, dim, seed), dim)
        if bits == 4:
            return first
        left_NR = residual_NR - np.take_along_axis(first._level_KR, first._levels(residual_NR, 0), axis=0)
        return cls(np.concatenate([first.value_MKd, _values(left_NR, dim, seed)]), dim)

    @property
    def code_bytes(self) -> int:
        """Bytes of one code."""
        return self.nibbles // 2

    def encode(self, residual_NR: np.ndarray) -> np.ndarray:
        """(N, M / 2) uint8. A dimension of its own is compared with its 15 borders: 6 times as fast as FAISS's search
        for the nearest of 16 values."""
        if self._pairs is not None:
            return self._pairs.compute_codes(np.ascontiguousarray(residual_NR, dtype=np.float32))
        level_NM, left_NR = [], residual_NR
        for stage in range(self.stages):
            level_NM.append(self._levels(left_NR, stage))
            if stage + 1 < self.stages:
                left_NR = left_NR - np.take_along_axis(self._level_KR, level_NM[-1], axis=0)
        level = np.concatenate(level_NM, axis=1)
        return level[:, 0::2] | (level[:, 1::2] << 4)

    @property
    def _level_KR(self) -> np.ndarray:
        """The first nibbles' values, by level."""
        return np.ascontiguousarray(self.value_MKd[: self.dim, :, 0].T)

    def _levels(self, value_NR: np.ndarray, stage: int) -> np.ndarray:
        level_RK = self.value_MKd[stage * self.dim : (stage + 1) * self.dim, :, 0]
        level_NR = np.zeros(value_NR.shape, np.uint8)
        for border_R in ((level_RK[:, 1:] + level_RK[:, :-1]) / 2).T:
            level_NR += value_NR > border_R
        return level_NR

    def install(self, index: Any) -> None:
        """Make a FAISS index decode with this codebook."""
        faiss.copy_array_to_vector(self.value_MKd.ravel(), index.pq.centroids)


def _values(residual_NR: np.ndarray, nibbles: int, seed: int) -> np.ndarray:
    """(M, 16, d) float32, ascending where d is 1: `encode` counts the borders below a value."""
    pq = faiss.ProductQuantizer(residual_NR.shape[1], nibbles, 4)
    pq.cp.seed, pq.cp.min_points_per_centroid = seed, 1
    pq.train(np.ascontiguousarray(residual_NR, dtype=np.float32))
    value_MKd = faiss.vector_to_array(pq.centroids).reshape(nibbles, 16, residual_NR.shape[1] // nibbles)
    return np.sort(value_MKd, axis=1) if value_MKd.shape[2] == 1 else value_MKd


def pack(code_NB: np.ndarray) -> np.ndarray:
    """Codes (N, M/2) with N a multiple of 32 -> blocks (N / 32, 16 M) uint8."""
    n, width = code_NB.shape
    block = code_NB.reshape(n // BLOCK, BLOCK, width).transpose(0, 2, 1)
    first, second = block[:, :, _ORDER], block[:, :, _ORDER + 16]
    low = (first & 15) | ((second & 15) << 4)
    high = (first >> 4) | (second & 0xF0)
    return np.concatenate([low, high], axis=2).reshape(n // BLOCK, width * BLOCK)
