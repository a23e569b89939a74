"""From somebody's interaction file to sequences, and from sequences to leave-one-out windows.

N interactions by user, then order, file order kept among equals; U users, W windows, B windows of a batch, P positions.
A window reads the items [begin, end) and is to predict, from each of them, the one that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from features.history import UNDATED_TS_MS
from pipelines.sequential.reading import read_columns

MIN_EVALUATED = 3
"""Interactions of a user who is evaluated: one to start from, one to validate on, one to test on."""
MS = {"s": 1000, "ms": 1, "": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Which columns say who, what and when, and which rows count."""

    user: str = "user_id"
    item: str = "item_id"
    order: str = "timestamp"
    """Rows of one user are sorted by this, equal ones stay in file order; empty: file order alone."""
    where: str = ""
    """COLUMN=VALUE: other rows are left out."""
    time_unit: str = ""
    """s or ms when `order` is a time, so that gaps can be used; empty when it is but an order."""
    core: int = 0
    """Users and items with fewer interactions are left out until none is left; 0 keeps all."""

    def __post_init__(self) -> None:
        if self.time_unit not in MS:
            raise ValueError(f"SourceConfig.time_unit {self.time_unit!r}: give s or ms, or leave it empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Every user's items in order. User u owns positions start[u] .. start[u+1]-1."""

    start_U: np.ndarray
    """(U + 1,) int64."""
    item_N: np.ndarray
    """(N,) int64 in 0 .. n_items-1."""
    ts_ms_N: np.ndarray
    """(N,) int64; UNDATED_TS_MS when the order is no time."""
    n_items: int

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.start_U) - 1

    def windows(self, role: Literal["train", "refit", "validation", "test"], length: int, *, all_of: bool = False):
        """Windows of at most `length` items that end before the last, the second or the third to last item.

        train: the third to last is the last target; refit: the second to last; users too short to be evaluated train
        with all they have. `all_of` cuts the older items of long sequences into windows as well.
        """
        size_U = np.diff(self.start_U)
        evaluated_U = size_U >= MIN_EVALUATED
        held_out_U = np.where(evaluated_U, {"train": 2, "refit": 1, "validation": 1, "test": 0}[role], 0)
        end_U = self.start_U[1:] - 1 - held_out_U
        kept_U = end_U > self.start_U[:-1]
        if role in ("validation", "test"):
            kept_U &= evaluated_U
        user_W, end_W = np.flatnonzero(kept_U), end_U[kept_U]
        if all_of:
            pieces_W = -(-(end_W - self.start_U[user_W]) // length)
            user_W, end_W = np.repeat(user_W, pieces_W), np.repeat(end_W, pieces_W)
            piece_W = np.arange(len(user_W)) - np.repeat(np.cumsum(pieces_W) - pieces_W, pieces_W)
            end_W = end_W - piece_W * length
        first_W = self.start_U[user_W]
        return Windows(begin_W=np.maximum(first_W, end_W - length), end_W=end_W, first_W=first_W)


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Stretches of users' sequences."""

    begin_W: np.ndarray
    end_W: np.ndarray
    """The last target; one behind the last item that is read."""
    first_W: np.ndarray
    """Where the user's sequence begins."""

    def __len__(self) -> int:
        return len(self.end_W)

    def take(self, chosen: np.ndarray) -> Windows:
        """Some of the windows."""
        return Windows(begin_W=self.begin_W[chosen], end_W=self.end_W[chosen], first_W=self.first_W[chosen])

    @property
    def size_W(self) -> np.ndarray:
        """Items that each window reads."""
        return self.end_W - self.begin_W


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowBatch:
    """Windows side by side, padded behind."""

    item_BP: np.ndarray
    target_BP: np.ndarray
    """The item after each."""
    valid_BP: np.ndarray
    """bool."""
    event_ms_BP: np.ndarray
    next_ms_BP: np.ndarray
    """When the target was: the instant at which a recommender would have been asked."""


def collate(sequences: Sequences, windows: Windows) -> WindowBatch:
    """Arrays of a batch, as wide as its longest window; padding holds item 0 and no time."""
    at_BP = windows.begin_W[:, None] + np.arange(int(windows.size_W.max()))[None, :]
    valid_BP = at_BP < windows.end_W[:, None]
    at_BP = np.where(valid_BP, at_BP, 0)
    after_BP = np.where(valid_BP, at_BP + 1, 0)
    return WindowBatch(
        item_BP=np.where(valid_BP, sequences.item_N[at_BP], 0),
        target_BP=np.where(valid_BP, sequences.item_N[after_BP], 0),
        valid_BP=valid_BP,
        event_ms_BP=np.where(valid_BP, sequences.ts_ms_N[at_BP], UNDATED_TS_MS),
        next_ms_BP=np.where(valid_BP, sequences.ts_ms_N[after_BP], UNDATED_TS_MS),
    )


def load(file: Path, source: SourceConfig) -> Sequences:
    """Read, filter and sort a file; raises ValueError or FileNotFoundError that say what to mend."""
    frame = read_columns(file, source.user, source.item, source.order, source.where)
    if not len(frame):
        raise ValueError(f"{file}: no rows" + (f" where {source.where}" if source.where else ""))
    user_N, item_N = _codes(frame["user"]), _codes(frame["item"])
    order_N = frame["order"].to_numpy() if source.order and "order" in frame.columns else np.zeros(len(frame))
    if source.core:
        kept_N = _core(user_N, item_N, source.core)
        if not kept_N.any():
            raise ValueError(f"{file}: no user and item have {source.core} interactions each; lower source.core")
        user_N, item_N, order_N = user_N[kept_N], item_N[kept_N], order_N[kept_N]
        user_N, item_N = _codes(pl.Series(user_N)), _codes(pl.Series(item_N))
    by_user = np.lexsort((np.arange(len(order_N)), order_N, user_N))
    counts_U = np.bincount(user_N)
    if not (counts_U >= MIN_EVALUATED).any():
        raise ValueError(f"{file}: no user has {MIN_EVALUATED} interactions, so nothing can be held out")
    ts_ms_N = np.full(len(order_N), UNDATED_TS_MS, dtype=np.int64)
    if source.time_unit:
        ts_ms_N = (order_N[by_user] * MS[source.time_unit]).astype(np.int64)
    return Sequences(
        start_U=np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64),
        item_N=item_N[by_user].astype(np.int64),
        ts_ms_N=ts_ms_N,
        n_items=int(item_N.max()) + 1,
    )


def describe(sequences: Sequences) -> dict[str, float]:
    """Counts for the report."""
    size_U = np.diff(sequences.start_U)
    return {
        "users": sequences.n_users,
        "items": sequences.n_items,
        "interactions": len(sequences.item_N),
        "mean_length": round(float(size_U.mean()), 2),
        "evaluated_users": int((size_U >= MIN_EVALUATED).sum()),
    }


def _codes(values: pl.Series) -> np.ndarray:
    """0 .. n-1 in the order of the values, whatever their type."""
    return np.unique(values.to_numpy(), return_inverse=True)[1]


def _core(user_N: np.ndarray, item_N: np.ndarray, core: int) -> np.ndarray:
    """(N,) bool: rows that are left when users and items below `core` rows are dropped until none is."""
    kept_N = np.ones(len(user_N), dtype=bool)
    while True:
        of_user, of_item = np.bincount(user_N[kept_N]), np.bincount(item_N[kept_N])
        wanted_N = kept_N.copy()
        wanted_N[kept_N] = (of_user[user_N[kept_N]] >= core) & (of_item[item_N[kept_N]] >= core)
        if wanted_N.sum() == kept_N.sum():
            return kept_N
        kept_N = wanted_N
