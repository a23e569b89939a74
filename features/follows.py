"""Who follows whom since when, asked at an instant: what is followed later is not known yet.

F pairs of a user and an author, N questions. A pair without a time was there before the log began, and so is known
to every dated impression, but not to one that precedes the log itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from features.entities import Entities
from features.history import UNDATED_TS_MS
from features.lookup import RowIndex

FOREVER_MS = np.iinfo(np.int64).max
"""Since when somebody follows whom they do not follow."""


@dataclass(frozen=True, slots=True)
class Follows:
    """Distinct pairs by user, authors ascending. User row u owns positions start[u] .. start[u+1]-1."""

    start: np.ndarray
    """(users + 2,) int64; row 0 (the unknown user) follows nobody."""
    author: np.ndarray
    """(F,) int64 ids."""
    since_ms: np.ndarray
    """(F,) int64, UNDATED_TS_MS for a follow that was there before the log began."""

    @classmethod
    def build(cls, users: Entities, table: pa.Table) -> Self:
        """From a table of follows, or what the events report of them (user_id, author_id, ts_ms). Of a pair's times the
        first one counts; users that are not known are left out."""
        user_row = users.rows_of(table["user_id"].to_numpy())
        author = table["author_id"].to_numpy()
        since_ms = table["ts_ms"].fill_null(UNDATED_TS_MS).to_numpy()
        order = np.lexsort((since_ms, author, user_row))
        user_row, author, since_ms = user_row[order], author[order].astype(np.int64), since_ms[order].astype(np.int64)
        first = np.ones(len(order), bool)
        first[1:] = (user_row[1:] != user_row[:-1]) | (author[1:] != author[:-1])
        first &= user_row > 0
        counts = np.bincount(user_row[first], minlength=len(users) + 1)
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), author[first], since_ms[first])

    def of(self, user_row: int, now_ms: int) -> np.ndarray:
        """Authors that one user follows at an instant, ascending."""
        own = slice(int(self.start[user_row]), int(self.start[user_row + 1]))
        return np.asarray(self.author[own][self.since_ms[own] < now_ms])

    def at(self, user_row_N: np.ndarray, author_id_N: np.ndarray, ts_ms_N: np.ndarray) -> np.ndarray:
        """Whether each user followed that author strictly before that instant (N,) bool."""
        return self.asker(author_id_N)(user_row_N, np.arange(len(author_id_N)), ts_ms_N)

    def asker(self, author_id_V: np.ndarray) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """A function of (user rows (N,), positions in `author_id_V` (N,), times (N,)) that answers as `at` does: the
        authors of a catalogue are looked up once, not at each of its impressions."""
        if len(self.author) == 0:
            return lambda user_row_N, author_N, ts_ms_N: np.zeros(len(user_row_N), bool)
        authors, place_F = np.unique(self.author, return_inverse=True)
        key_F = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start)) * (len(authors) + 1) + place_F
        pairs, since_ms = RowIndex(key_F), np.append(FOREVER_MS, self.since_ms)
        place_V = np.minimum(np.searchsorted(authors, author_id_V), len(authors) - 1)
        place_V = np.where(authors[place_V] == author_id_V, place_V, len(authors))  # a place that no key has

        def ask(user_row_N: np.ndarray, author_N: np.ndarray, ts_ms_N: np.ndarray) -> np.ndarray:
            asked_N = np.asarray(user_row_N) * (len(authors) + 1) + place_V[author_N]
            return since_ms[pairs.rows(asked_N)] < np.asarray(ts_ms_N)

        return ask

    def save(self, folder: Path) -> None:
        """Write `follows_FIELD.npy` for each field into an existing folder."""
        for field in fields(self):
            np.save(folder / f"follows_{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Memory-map what `save` wrote."""
        return cls(**{f.name: np.load(folder / f"follows_{f.name}.npy", mmap_mode="r") for f in fields(cls)})


def reported(events: pa.Table) -> pa.Table:
    """user_id, author_id and ts_ms of the follows that events report: a table for `Follows.build`."""
    given = (events["follow"].fill_null(0).to_numpy() > 0) & events["author_id"].is_valid().to_numpy()
    return events.select(["user_id", "author_id", "ts_ms"]).filter(pa.array(given))
