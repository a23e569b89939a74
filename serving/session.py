"""The session a page continues: what it has shown, carried by the caller in an opaque token.

A token is the ids of the videos shown, in order, under a checksum: no server has to remember a session, and a page
never repeats a video whichever server answers. N videos shown before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ranking.arrange import NO_TOPIC, Shown
from serving.bundle import FeedBundle
from serving.limits import InvalidRequestError

MAX_SHOWN = 10_000
"""Videos a session may show: 80 kB of token."""
REMEMBERED = 20
"""Last videos of the session that authors, topics and near copies are compared with."""
_FORMAT, _HEAD = b"\x01", 5


@dataclass(frozen=True, slots=True)
class Session:
    """What was shown before this page, oldest first."""

    video_id_N: np.ndarray

    @classmethod
    def read(cls, token: bytes) -> Session:
        """Of `next_page_token` of the page before; empty begins one. Raises InvalidRequestError."""
        if not token:
            return cls(np.zeros(0, np.int64))
        body = token[_HEAD:]
        if token[:1] != _FORMAT or len(body) % 8 or xxhash.xxh32_digest(body) != token[1:_HEAD]:
            raise InvalidRequestError("page_token: not one that a page gave; leave it empty to begin a session")
        if len(body) > 8 * MAX_SHOWN:
            raise InvalidRequestError(f"page_token: {len(body) // 8} videos shown, allowed are {MAX_SHOWN}: begin anew")
        return cls(np.frombuffer(body, "<i8").astype(np.int64))

    def token(self, shown: Sequence[int]) -> bytes:
        """For the page after one that shows these."""
        body = np.concatenate([self.video_id_N, np.array(shown, np.int64)]).astype("<i8").tobytes()
        return _FORMAT + xxhash.xxh32_digest(body) + body

    @property
    def remembered(self) -> np.ndarray:
        """The last of them, which pages are compared with."""
        return self.video_id_N[-REMEMBERED:]

    def shown(self, bundle: FeedBundle) -> Shown | None:
        """What the rules compare with; None in a first page."""
        rows = bundle.videos.rows_of(self.remembered)
        rows = rows[rows > 0]
        if len(rows) == 0:
            return None
        return Shown(bundle.author_id[rows], topics(bundle, rows), bundle.vectors[rows])


def topics(bundle: FeedBundle, rows_N: np.ndarray) -> np.ndarray:
    """(N,) int64: first value of the bundle's topic feature as a row of its embedding table, NO_TOPIC without one."""
    name = bundle.config.topic_feature
    if name is None:
        return np.full(len(rows_N), NO_TOPIC)
    return np.asarray(bundle.videos.sparse[rows_N][:, bundle.videos.columns.slice(name).start]).astype(np.int64)
