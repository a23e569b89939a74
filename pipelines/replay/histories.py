"""Users as a server would have known them at the instant of a logged request: their events strictly before it.

E events of a log. Feedback that reached the server later than the next request is taken to have been there: a log says
when a video was shown, not when the news of it arrived.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from features.history import watch_fraction
from features.schema import SIGNALS
from serving.records import NOTHING_KNOWN, UserState
from serving.store import StoreConfig

_NUMBERS = ("watch_ms", "duration_ms")


class Histories:
    """All of a log's events by user and time; about 40 bytes an event in memory."""

    def __init__(self, log: pl.LazyFrame, recent: int = StoreConfig().recent_events) -> None:
        """`recent`: how many of its events a server keeps for the models."""
        there = set(log.collect_schema().names())
        columns = ("user_id", "video_id", "author_id", "ts_ms", *_NUMBERS, *SIGNALS)
        wanted = [pl.col(c) if c in there else pl.lit(None, pl.Int64).alias(c) for c in columns]
        # The export's order breaks ties of time, as acknowledgement does in a server.
        table = log.select(wanted).sort("user_id", "ts_ms", maintain_order=True).collect()
        self._recent = recent
        self._users, first = np.unique(table["user_id"].to_numpy(), return_index=True)
        self._edges = np.append(first, len(table))
        self._video_id_E, self._ts_ms_E = table["video_id"].to_numpy(), table["ts_ms"].to_numpy()
        self._author_id_E = table["author_id"].fill_null(0).to_numpy()
        numbers = [table[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in _NUMBERS]
        self._watch_fraction_E = watch_fraction(*numbers)
        given = table.select(pl.col(SIGNALS).fill_null(0) > 0).to_numpy()
        self._signals_E = np.packbits(given, axis=1, bitorder="little")[:, 0]
        self._follows_E = given[:, SIGNALS.index("follow")] & (self._author_id_E != 0)

    def at(self, user_id: int, ts_ms: int) -> UserState:
        """What is known of a user just before an instant."""
        place = int(np.searchsorted(self._users, user_id))
        if place == len(self._users) or self._users[place] != user_id:
            return NOTHING_KNOWN
        start, stop = int(self._edges[place]), int(self._edges[place + 1])
        stop = start + int(np.searchsorted(self._ts_ms_E[start:stop], ts_ms, side="left"))
        last, before = slice(max(start, stop - self._recent), stop), slice(start, stop)
        return UserState(
            video_id_E=self._video_id_E[last],
            ts_ms_E=self._ts_ms_E[last],
            signals_E=self._signals_E[last],
            watch_fraction_E=self._watch_fraction_E[last],
            seen_ids=np.unique(self._video_id_E[before]),
            followed_authors=np.unique(self._author_id_E[before][self._follows_E[before]]),
        )
