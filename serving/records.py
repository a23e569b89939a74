"""What stores keep and give: a user's live events, a slate as it was shown, and what it was drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class UserState:
    """One user's live events: the most recent ones (E, oldest first), and every video and follow ever logged."""

    video_id_E: np.ndarray
    ts_ms_E: np.ndarray
    signals_E: np.ndarray
    """uint8 masks in the bit order of SIGNALS."""
    watch_fraction_E: np.ndarray
    seen_ids: np.ndarray
    followed_authors: np.ndarray


NOTHING_KNOWN = UserState(
    *(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.uint8, np.float32, np.int64, np.int64))
)


@dataclass(frozen=True, slots=True)
class ServedRow:
    """One slot of a slate as it was shown: what makes an event valid replay data."""

    request_id: str
    slot: int
    user_id: int
    video_id: int
    ts_ms: int
    surface: str | None
    source: str
    connected: bool
    policy_id: str
    propensity: float
    bundle_version: str


@dataclass(frozen=True, slots=True)
class Shortlist:
    """What a slate was drawn from: with it replay can say how likely another feed would have been to show the same.

    Only what could be drawn is kept, not the whole pool: a video that the sampler never considered has no chance in the
    log, so no log of this feed says what it would have earned. 8 bytes a video.
    """

    request_id: str
    user_id: int
    ts_ms: int
    surface: str | None
    video_id_K: np.ndarray
    """(K,) int64, in the order of the pool, which decides among equal values."""
    session_id_N: np.ndarray
    """(N,) int64, the videos of the session that the page was compared with, oldest first."""
