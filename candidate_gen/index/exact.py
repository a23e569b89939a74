"""Exact search over every vector, filtered inside the scan: small catalogues on the CPU, large ones where an
accelerator has the memory (100 million x 64 in float16 are 12.8 GB).

Written in PyTorch and not on faiss-gpu, whose indexes ignore selectors (faiss#3924), so that a filter there could only
come after the search. Q queries, K results, D width, n rows held, V rows of the catalogue.
"""

from __future__ import annotations

import numpy as np
import torch

from candidate_gen.index.stored import StoredVectors

BLOCK = 4_194_304
"""Rows scored together: a block of float32 scores takes 16 MiB a query."""


class ExactScan:
    """The decoded vectors of some rows on a device; nothing in it changes, threads share it."""

    def __init__(self, vectors: StoredVectors, rows: np.ndarray, device: str) -> None:
        self._device = torch.device(device)
        dtype = torch.float32 if self._device.type == "cpu" else torch.float16
        self._row_n = torch.from_numpy(rows).to(self._device)
        self._vector_nD = torch.empty((len(rows), vectors.dim), dtype=dtype, device=self._device)
        for begin in range(0, len(rows), 65_536):
            piece = torch.from_numpy(vectors[rows[begin : begin + 65_536]])
            self._vector_nD[begin : begin + len(piece)] = piece

    def search(
        self, query_QD: np.ndarray, k: int, bits: np.ndarray | None, excluded: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (Q, k) int64 and scores (Q, k) float32 of the best whose bit is set (None: of all) and that are not
        excluded (one array for all queries, or one a query); best first, padded with -1 and -inf."""
        query = torch.from_numpy(query_QD).to(self._device, self._vector_nD.dtype)
        best = torch.full((len(query), k), -torch.inf, device=self._device)
        row = torch.full((len(query), k), -1, dtype=torch.int64, device=self._device)
        own_query, own_at = self._places(excluded)
        barred_n = self._barred(bits, own_at if len(excluded) == 1 else own_at[:0])
        for begin in range(0, len(self._row_n), BLOCK):
            score = (query @ self._vector_nD[begin : begin + BLOCK].T).float()
            if barred_n is not None:
                score.masked_fill_(barred_n[begin : begin + BLOCK], -torch.inf)
            if len(excluded) > 1:
                here = (own_at >= begin) & (own_at < begin + BLOCK)
                score[own_query[here], own_at[here] - begin] = -torch.inf
            top = score.topk(min(k, score.shape[1]), dim=1)
            best, at = torch.cat([best, top.values], dim=1).topk(k, dim=1)
            row = torch.cat([row, self._row_n[begin + top.indices]], dim=1).gather(1, at)
        return row.masked_fill(best == -torch.inf, -1).cpu().numpy(), best.cpu().numpy()

    def _barred(self, bits: np.ndarray | None, excluded_at: torch.Tensor) -> torch.Tensor | None:
        """(n,) bool of the rows that must not come back to any query."""
        if bits is None and not len(excluded_at):
            return None
        barred_n = torch.zeros(len(self._row_n), dtype=torch.bool, device=self._device)
        if bits is not None:
            byte_n = torch.from_numpy(bits).to(self._device)[self._row_n >> 3]
            barred_n |= ((byte_n >> (self._row_n & 7).to(torch.uint8)) & 1) == 0
        barred_n[excluded_at] = True
        return barred_n

    def _places(self, excluded: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(number of the array, place among the rows held) of every excluded row that is held."""
        number = torch.from_numpy(np.repeat(np.arange(len(excluded)), [len(rows) for rows in excluded]))
        gone, number = torch.from_numpy(np.concatenate(excluded)).to(self._device), number.to(self._device)
        at = torch.searchsorted(self._row_n, gone).clamp_(max=len(self._row_n) - 1)
        held = self._row_n[at] == gone
        return number[held], at[held]
