"""Residual 4-bit product codes, packed as FAISS's fast-scan kernels read them.

A code is M nibbles: M = D gives every dimension four bits, M = D/2 every pair of dimensions. Kernels look up 32 codes
at once, so codes are stored in blocks of 32, transposed: for each pair of nibbles, 32 bytes that hold that pair of all
32 codes (FAISS, `pq4_pack_codes`; Andre, Kermarrec and Le Scouarnec, "Quicker ADC").

N vectors, D width, M nibbles a code.
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
    """One small k-means a group of D / M dimensions, over residuals."""

    def __init__(self, centroid_MKd: np.ndarray) -> None:
        self.nibbles, levels, width = centroid_MKd.shape
        if levels != 16:
            raise ValueError(f"codebook holds {levels} levels a nibble, 4-bit codes have 16")
        self.centroid_MKd = np.ascontiguousarray(centroid_MKd, dtype=np.float32)
        self.dim = self.nibbles * width
        self._pq = faiss.ProductQuantizer(self.dim, self.nibbles, 4)
        faiss.copy_array_to_vector(self.centroid_MKd.ravel(), self._pq.centroids)

    @classmethod
    def train(cls, residual_ND: np.ndarray, nibbles: int, seed: int) -> Codebook:
        """Learn from residuals of the training sample."""
        pq = faiss.ProductQuantizer(residual_ND.shape[1], nibbles, 4)
        pq.cp.seed, pq.cp.min_points_per_centroid = seed, 1
        pq.train(np.ascontiguousarray(residual_ND, dtype=np.float32))
        centroid_MKd = faiss.vector_to_array(pq.centroids).reshape(nibbles, 16, residual_ND.shape[1] // nibbles)
        if centroid_MKd.shape[2] == 1:
            centroid_MKd = np.sort(centroid_MKd, axis=1)  # `encode` counts the borders below a value
        return cls(centroid_MKd)

    @property
    def code_bytes(self) -> int:
        """Bytes of one code."""
        return self.nibbles // 2

    def encode(self, residual_ND: np.ndarray) -> np.ndarray:
        """(N, M / 2) uint8. One dimension a nibble is compared with its 15 borders: 6 times as fast as FAISS's search
        for the nearest of 16 levels."""
        if self.dim > self.nibbles:
            return self._pq.compute_codes(np.ascontiguousarray(residual_ND, dtype=np.float32))
        level_MK = self.centroid_MKd[:, :, 0]
        border_MK = (level_MK[:, 1:] + level_MK[:, :-1]) / 2
        level_NM = np.zeros(residual_ND.shape, np.uint8)
        for border_M in border_MK.T:
            level_NM += residual_ND > border_M
        return level_NM[:, 0::2] | (level_NM[:, 1::2] << 4)

    def install(self, index: Any) -> None:
        """Make a FAISS index decode with this codebook."""
        faiss.copy_array_to_vector(self.centroid_MKd.ravel(), index.pq.centroids)


def pack(code_NB: np.ndarray) -> np.ndarray:
    """Codes (N, M/2) with N a multiple of 32 -> blocks (N / 32, 16 M) uint8."""
    n, width = code_NB.shape
    block = code_NB.reshape(n // BLOCK, BLOCK, width).transpose(0, 2, 1)
    first, second = block[:, :, _ORDER], block[:, :, _ORDER + 16]
    low = (first & 15) | ((second & 15) << 4)
    high = (first >> 4) | (second & 0xF0)
    return np.concatenate([low, high], axis=2).reshape(n // BLOCK, width * BLOCK)
