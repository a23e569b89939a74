"""Who follows whom since when, asked at an instant: what is followed later is not known yet.

F pairs of a user and an author, N questions. A pair without a time was there before the log began, and so is known
to every dated impression, but not to one that precedes the log itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from features.entities import Entities
from features.history import UNDATED_TS_MS


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
    def build(cls, users: Entities, follows: pa.Table | None, events: pa.Table) -> Self:
        """From the table of follows; without one, from the follows that the events themselves report. Of a pair's
        times the first one counts; users that are not known, and authors that are not, are left out."""
        table = _reported(events) if follows is None else follows
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
        if len(self.author) == 0:
            return np.zeros(len(user_row_N), bool)
        authors = np.unique(self.author)
        owner = np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))
        keys = owner * len(authors) + np.searchsorted(authors, self.author)
        place_N = np.minimum(np.searchsorted(authors, author_id_N), len(authors) - 1)
        asked_N = np.asarray(user_row_N) * len(authors) + place_N
        at_N = np.minimum(np.searchsorted(keys, asked_N), len(keys) - 1)
        found_N = (keys[at_N] == asked_N) & (authors[place_N] == author_id_N)
        return found_N & (self.since_ms[at_N] < np.asarray(ts_ms_N))

    def save(self, folder: Path) -> None:
        """Write `follows_FIELD.npy` for each field into an existing folder."""
        for field in fields(self):
            np.save(folder / f"follows_{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Memory-map what `save` wrote."""
        return cls(**{f.name: np.load(folder / f"follows_{f.name}.npy", mmap_mode="r") for f in fields(cls)})


def _reported(events: pa.Table) -> pa.Table:
    follow = events["follow"].fill_null(0).to_numpy() > 0
    known = ~events["author_id"].is_null().to_numpy()
    return events.filter(pa.array(follow & known))
