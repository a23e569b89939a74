"""What a log holds, as arrays: the requests with what could be shown, and the rows that were.

R requests, C candidates of all requests one after another (`offsets` [R + 1] cuts them), N shown rows, U users.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipelines.replay.keys import Keys, text_keys
from pipelines.replay.spill import Part

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRequests:
    """Requests under evaluation and what the logger chose from, ordered by request_id."""

    request_id: list[str]
    user_id: Ints
    ts_ms: Ints
    surface: list[str | None]
    offsets: Ints
    """Request i's candidates are `video_ids[offsets[i]:offsets[i + 1]]`."""
    video_ids: Ints
    session_ids: list[list[int]] | None = None
    """Videos that each request's session had shown before, where the log says."""
    part: Part = field(default_factory=Part)
    """Which part of the log these are; files of scores are divided alike."""

    def keys(self) -> Keys:
        """One 64-bit key a request, made from its id."""
        return text_keys(pa.array(self.request_id, type=pa.string()))

    def request_of_candidate(self) -> Ints:
        """Index of the request each candidate belongs to."""
        return np.repeat(np.arange(len(self.request_id)), np.diff(self.offsets))


@dataclass(frozen=True, kw_only=True, slots=True)
class Slates:
    """Shown rows ordered by (request, slot), slots running 0, 1, 2 ... within a request."""

    request: Ints
    """Index of the request, ascending, [N]."""
    slot: Ints
    """Place in the slate from 0, [N]."""
    user: Ints
    """Index of the user from 0, [N]."""
    logged: Floats
    """Probability with which the logger put this video here given the slots above, [N]."""
    candidate: Ints
    """Flat index of the shown video among all candidates, [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Some of a log's requests, whole: what is judged at a time."""

    requests: LoggedRequests
    slates: Slates
    user_ids_U: Ints
    """Ids of the users that `slates.user` counts, ascending."""
    rewards: dict[str, Floats]
    """One reward a shown row, by metric; a guardrail's reward may be NaN where the log does not say."""
    rows: pl.DataFrame
    """The shown rows' canonical columns, in the same order; what slices are cut by."""
