"""Exact search over every vector, filtered inside the scan: small catalogues on the CPU, large ones where an
accelerator has the memory.

Counted, not measured, for 100 million videos x 64 in float16 on one H100 (80 GB, 3.3 TB/s): vectors take 12.8 GB,
their rows .8 GB, the mask of a filter .1 GB. A batch of Q queries reads the vectors once, 12.8 GB or 3.9 ms; each query
writes its 100 million float16 scores and reads or writes them some five times more (mask, selection), 1.2 GB or .4 ms.
So one query alone takes about 4 ms, and 32 together about 16, half a millisecond each: requests are combined
(`candidate_gen.together`). int8 would halve the smaller part only, and torch multiplies int8 with int8 queries alone.

Q queries, K results, D width, n rows held, V rows of the catalogue.
"""

from __future__ import annotations

import numpy as np
import torch

from candidate_gen.index.device import scores_at_once
from candidate_gen.index.filters import RowFilter
from candidate_gen.index.stored import StoredVectors

QUERIES_AT_ONCE, RESCORED_AT_ONCE = 256, 1 << 19
MIN_BLOCK = 65_536
"""Rows scored together, at least: fewer make poor matrix products."""
RESCORED = 2
"""Half precision finds so many times k rows; their float32 products decide which come back, and in what order."""
_KEPT = 4
"""Filters whose masks stay on the device."""


class ExactScan:
    """The decoded vectors of some rows on a device; nothing else in it changes, threads share it."""

    def __init__(self, vectors: StoredVectors, rows: np.ndarray, device: str, dtype: torch.dtype) -> None:
        """`rows` ascend. `dtype` of the vectors held: float32 or float16."""
        self._device = torch.device(device)
        self._row_n = torch.from_numpy(rows).to(self._device)
        self._vector_nD = torch.empty((len(rows), vectors.dim), dtype=dtype, device=self._device)
        for begin in range(0, len(rows), MIN_BLOCK):
            piece = torch.from_numpy(vectors[rows[begin : begin + MIN_BLOCK]])
            self._vector_nD[begin : begin + len(piece)] = piece
        self._masks: tuple[tuple[RowFilter, torch.Tensor], ...] = ()

    def search(
        self, query_QD: np.ndarray, k: int, allowed: RowFilter, excluded: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (Q, k) int64 and scores (Q, k) float32 of the best allowed rows that are not excluded (one array for all
        queries, or one a query); best first, padded with -1 and -inf."""
        parts, step = [], max(1, min(QUERIES_AT_ONCE, RESCORED_AT_ONCE // k))
        for start in range(0, len(query_QD), step):
            part = slice(start, start + step)
            own = excluded[part] if len(excluded) > 1 else excluded
            query = torch.from_numpy(query_QD[part]).to(self._device)
            parts.append(self._best(query, k, None if allowed.everything else self._mask(allowed), own))
        rows, scores = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return rows, scores

    def _best(
        self, query_QD: torch.Tensor, k: int, barred_n: torch.Tensor | None, excluded: tuple[np.ndarray, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, dtype = len(self._row_n), self._vector_nD.dtype
        half = dtype != torch.float32
        wanted = min(RESCORED * k if half else k, n)
        best = torch.full((len(query_QD), wanted), -torch.inf, dtype=dtype, device=self._device)
        at = torch.zeros((len(query_QD), wanted), dtype=torch.int64, device=self._device)
        low_QD, (own_query, own_at) = query_QD.to(dtype), self._places(excluded)
        block = max(MIN_BLOCK, scores_at_once(self._device) // len(query_QD))
        for begin in range(0, n, block):
            score = low_QD @ self._vector_nD[begin : begin + block].T
            if barred_n is not None:
                score.masked_fill_(barred_n[begin : begin + block], -torch.inf)
            here = (own_at >= begin) & (own_at < begin + block)
            if len(excluded) > 1:
                score[own_query[here], own_at[here] - begin] = -torch.inf
            else:
                score[:, own_at[here] - begin] = -torch.inf
            top = score.topk(min(wanted, score.shape[1]), dim=1)
            best, place = torch.cat([best, top.values], dim=1).topk(wanted, dim=1)
            at = torch.cat([at, begin + top.indices], dim=1).gather(1, place)
        if half:
            precise = torch.einsum("qd,qmd->qm", query_QD, self._vector_nD[at].float())
            best, place = precise.masked_fill(best == -torch.inf, -torch.inf).topk(min(k, wanted), dim=1)
            at = at.gather(1, place)
        row = self._row_n[at].masked_fill(best == -torch.inf, -1)
        short = k - row.shape[1]
        pad = torch.nn.functional.pad
        return pad(row, (0, short), value=-1), pad(best, (0, short), value=-torch.inf)

    def _mask(self, allowed: RowFilter) -> torch.Tensor:
        """(n,) bool of the rows that do not pass; kept by the filter itself, since what changes gets a new one."""
        for held, mask in self._masks:
            if held is allowed:
                return mask
        byte_n = torch.from_numpy(allowed.bits).to(self._device)[self._row_n >> 3]
        mask = ((byte_n >> (self._row_n & 7).to(torch.uint8)) & 1) == 0
        self._masks = ((allowed, mask), *self._masks[: _KEPT - 1])
        return mask

    def _places(self, excluded: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(number of the array, place among the rows held) of every excluded row that is held."""
        number = torch.from_numpy(np.repeat(np.arange(len(excluded)), [len(rows) for rows in excluded]))
        gone, number = torch.from_numpy(np.concatenate(excluded)).to(self._device), number.to(self._device)
        at = torch.searchsorted(self._row_n, gone).clamp_(max=len(self._row_n) - 1)
        held = self._row_n[at] == gone
        return number[held], at[held]
