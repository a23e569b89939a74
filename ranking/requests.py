"""From `Inputs` to what the frozen ranker computes on: requests in rows, several in one batch, and back.

B requests, N candidates of all of them, M the largest number of candidates of one, U distinct videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from features.entities import SparseColumns
from features.history import GAP_BUCKETS
from features.inputs import Inputs
from features.schema import SIGNALS
from ranking.config import RankerSizes
from ranking.frozen import Request
from ranking.tables import ExportedTables, TableLayout, Tables


@dataclass(frozen=True, slots=True)
class Places:
    """Where each of N candidates stands in the rows of its request."""

    owner_N: np.ndarray
    place_N: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, inputs: Inputs) -> Places:
        """Candidates of a request stand in the order they came in."""
        owner_N, n_requests = inputs.owner_N, len(inputs.surface_B)
        if n_requests == 1:
            return cls(owner_N, np.arange(len(owner_N)), (1, len(owner_N)))
        counts_B = np.bincount(owner_N, minlength=n_requests)
        order_N = np.argsort(owner_N, kind="stable")
        place_N = np.empty_like(order_N)
        place_N[order_N] = np.arange(len(owner_N)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        return cls(owner_N, place_N, (n_requests, int(counts_B.max())))

    def spread(self, values_N: np.ndarray) -> np.ndarray:
        """(N, ...) -> (B, M, ...), zeros where there is no candidate (a position of 0 is the unknown video)."""
        if self.shape[0] * self.shape[1] == len(values_N) and self.shape[0] == 1:
            return values_N[None]
        out = np.zeros((*self.shape, *values_N.shape[1:]), values_N.dtype)
        out[self.owner_N, self.place_N] = values_N
        return out

    def gather(self, values_BM: np.ndarray) -> np.ndarray:
        """The inverse of `spread`."""
        return values_BM[0] if self.shape[0] == 1 else values_BM[self.owner_N, self.place_N]


@dataclass(frozen=True, slots=True)
class Slots:
    """Rows of one side's tables by entity, -1 for absent, and how many slots are each feature's."""

    rows: torch.Tensor
    widths: tuple[int, ...]


def read_slots(inputs: Inputs, side: str, layout: TableLayout) -> Slots:
    """Of "user" or "video"; raises ValueError naming a feature whose row its table has not."""
    columns = inputs.user_columns if side == "user" else inputs.video_columns
    sparse_NW = inputs.user_sparse_BW if side == "user" else inputs.video_sparse_UW
    picked_W, widths = layout.pick(columns)
    slots_NW = sparse_NW[:, picked_W]
    limits_W = np.repeat(layout.rows, widths)
    if (slots_NW >= limits_W).any():
        n, w = np.argwhere(slots_NW >= limits_W)[0]
        name = str(np.repeat(layout.names, widths)[w])
        raise ValueError(
            f"ranker input {side} feature {name!r} is row {slots_NW[n, w]} at {n}; its table has {limits_W[w]} rows"
        )
    return Slots(_tensor(slots_NW.astype(np.int64, copy=False)), widths)


def to_tensors(inputs: Inputs, places: Places) -> dict[str, torch.Tensor]:
    """The fields of a `Request` that are not looked up, candidates laid out."""
    return {
        "user_dense_BD": _tensor(inputs.user_dense_BD),
        "surface_B": _tensor(inputs.surface_B),
        "video_dense_UD": _tensor(inputs.video_dense_UD),
        "history_BL": _tensor(inputs.history_BL),
        "history_events_BLS": _tensor(
            np.concatenate([inputs.history_signals_BLS, inputs.history_watch_BL[..., None]], axis=-1)
        ),
        "history_gap_BL": _tensor(inputs.history_gap_BL),
        "history_length_B": _tensor(inputs.history_length_B),
        "candidate_BM": _tensor(places.spread(inputs.candidate_N)),
        "candidate_dense_BMC": _tensor(places.spread(inputs.candidate_dense_NC)),
    }


def to_request(
    inputs: Inputs, places: Places, user: Tables | ExportedTables, video: Tables | ExportedTables
) -> Request:
    """Look the tables up and lay the candidates out."""
    of_user, of_video = read_slots(inputs, "user", user.layout), read_slots(inputs, "video", video.layout)
    return Request(
        user_BE=user.pooled(of_user.rows, of_user.widths),
        video_UE=video.pooled(of_video.rows, of_video.widths),
        **to_tensors(inputs, places),
    )


def together(requests: Sequence[Inputs]) -> Inputs:
    """Several as one, in order; each keeps its own videos, so nothing of one can reach another."""
    first = requests[0]
    n_videos = np.cumsum([0] + [len(r.video_sparse_UW) for r in requests])
    n_contexts = np.cumsum([0] + [len(r.surface_B) for r in requests])
    shift = {"history_BL": n_videos, "candidate_N": n_videos, "extra_X": n_videos, "owner_N": n_contexts}
    joined = {}
    for field in fields(Inputs):
        values = [getattr(r, field.name) for r in requests]
        if not isinstance(values[0], np.ndarray):
            if any(value != values[0] for value in values):
                raise ValueError(f"requests of one batch must agree on {field.name}")
            continue
        if field.name in shift:
            values = [value + by for value, by in zip(values, shift[field.name], strict=False)]
        joined[field.name] = np.concatenate(values)
    return replace(first, **joined)


def random_requests(sizes: RankerSizes, candidates_B: Sequence[int], seed: int, history_length: int = 50) -> Inputs:
    """Requests that mean nothing, of the sizes that the model takes: for comparing engines, compiling and timing.

    Each has its own candidates, none of them twice, and a history of which half is known."""
    rng, n = np.random.default_rng(seed), len(candidates_B)
    n_candidates, n_videos = sum(candidates_B), 1 + n * history_length + sum(candidates_B)

    def sparse(names: tuple[str, ...], rows: tuple[int, ...], count: int) -> tuple[np.ndarray, SparseColumns]:
        slots = np.stack([rng.integers(0, most, count) for most in rows], axis=1)
        return slots, SparseColumns(names=names, table_rows=rows, widths=(1,) * len(names))

    def dense(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    user_sparse_BW, user_columns = sparse(sizes.user_names, sizes.user_table_rows, n)
    video_sparse_UW, video_columns = sparse(sizes.video_names, sizes.video_table_rows, n_videos)
    known_BL = np.broadcast_to(np.arange(history_length) < history_length // 2, (n, history_length))
    return Inputs(
        user_sparse_BW=user_sparse_BW,
        user_dense_BD=dense(n, sizes.user_dense),
        user_columns=user_columns,
        surface_B=rng.integers(0, sizes.surface_rows, n),
        now_ms_B=np.zeros(n, np.int64),
        video_row_U=np.arange(n_videos),
        video_sparse_UW=video_sparse_UW,
        video_dense_UD=dense(n_videos, sizes.video_dense),
        video_columns=video_columns,
        history_BL=np.arange(1, 1 + n * history_length).reshape(n, -1) * known_BL,
        history_signals_BLS=(rng.random((n, history_length, len(SIGNALS))) < 0.2).astype(np.float32),
        history_watch_BL=rng.random((n, history_length), np.float32),
        history_ts_ms_BL=np.zeros((n, history_length), np.int64),
        history_gap_BL=rng.integers(0, GAP_BUCKETS, (n, history_length)) * known_BL,
        history_length_B=known_BL.sum(1),
        candidate_N=np.arange(1 + n * history_length, n_videos),
        owner_N=np.repeat(np.arange(n), candidates_B),
        candidate_dense_NC=dense(n_candidates, sizes.candidate_dense),
        slot_N=np.zeros(n_candidates, np.int64),
        extra_X=np.zeros(0, np.int64),
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
