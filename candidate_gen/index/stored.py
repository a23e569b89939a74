"""The vectors themselves, by row, compressed: what exact scores are computed from.

A file is what FAISS writes for an IndexScalarQuantizer: a short header, then n_rows codes. The header is written first
and the codes by row in any order, so that many processes fill one file; readers map it, so that processes share pages.

D width, n rows.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

faiss: Any = _faiss

_KINDS = {
    "float16": faiss.ScalarQuantizer.QT_fp16,
    "int8": faiss.ScalarQuantizer.QT_8bit,
    "int4": faiss.ScalarQuantizer.QT_4bit,
}
_NTOTAL_AT = 8
"""Byte of the header that holds ntotal: after the four-letter type and the width."""


def create(path: Path, sample_ND: np.ndarray, n_rows: int, kind: str) -> None:
    """An empty file for n_rows vectors; the value range of each dimension is the sample's."""
    quantizer = faiss.IndexScalarQuantizer(sample_ND.shape[1], _KINDS[kind], faiss.METRIC_INNER_PRODUCT)
    quantizer.train(np.ascontiguousarray(sample_ND, dtype=np.float32))
    header = bytearray(faiss.serialize_index(quantizer).tobytes())
    struct.pack_into("<q", header, _NTOTAL_AT, n_rows)
    struct.pack_into("<Q", header, len(header) - 8, n_rows * quantizer.code_size)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_rows * quantizer.code_size)


class StoredVectors:
    """Vectors by row, mapped; threads share it."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = path
        try:
            self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a FAISS index: {error}; build the index again") from error
        if type(self.index) is not faiss.IndexScalarQuantizer:
            raise ValueError(f"{path} holds {type(self.index).__name__}, not vectors; build the index again")
        self.n_rows, self.dim, width = self.index.ntotal, self.index.d, self.index.code_size
        header = path.stat().st_size - self.n_rows * width
        if header < 0:
            raise ValueError(f"{path} is shorter than its {self.n_rows:,} vectors; build the index again")
        mode = "r+" if writable else "r"
        self._code_RB = np.memmap(path, mode=mode, dtype=np.uint8, offset=header, shape=(self.n_rows, width))

    def write(self, rows: np.ndarray, vector_ND: np.ndarray) -> None:
        """Encode vectors into their rows."""
        self._code_RB[rows] = self.index.sa_encode(np.ascontiguousarray(vector_ND, dtype=np.float32))

    def flush(self) -> None:
        """Hand what was written to the disk."""
        self._code_RB.flush()

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D) float32; a row that is not indexed decodes to nothing in particular."""
        return self.index.sa_decode(np.ascontiguousarray(self._code_RB[rows]))
