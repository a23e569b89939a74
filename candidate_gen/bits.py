"""Packed rows: bit r & 7 of byte r >> 3 is row r, the layout that faiss's IDSelectorBitmap reads."""

from __future__ import annotations

import numpy as np


def are_set(bits: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each row's bit is set."""
    return (bits[rows_N >> 3] >> (rows_N & 7).astype(np.uint8)) & 1 == 1


def switch(bits: np.ndarray, rows_N: np.ndarray, on: bool) -> None:
    """Set or clear rows' bits in place; a row may come twice."""
    masks = np.left_shift(1, rows_N & 7).astype(np.uint8)
    if on:
        np.bitwise_or.at(bits, rows_N >> 3, masks)
    else:
        np.bitwise_and.at(bits, rows_N >> 3, ~masks)


def count_set(bits: np.ndarray) -> int:
    """How many rows."""
    words = len(bits) // 8 * 8
    return int(np.bitwise_count(bits[:words].view(np.uint64)).sum() + np.bitwise_count(bits[words:]).sum())
