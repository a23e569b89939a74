"""What the feed is asked and what it answers: plain data, the same over gRPC, in replay and in golden requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from features.eligibility import Viewer


class Level(IntEnum):
    """How much of the funnel answered, from best to worst; the numbers are those of the proto."""

    FULL = 1
    FEATURES_MISSING = 2
    RETRIEVAL_ORDER = 3
    POPULAR = 4
    STATIC = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedRequest:
    """One page for one user."""

    user_id: int
    k: int = 10
    surface: str = ""
    """Empty: the bundle's first surface."""
    request_id: str = ""
    """Empty: a fresh one. It seeds exploration."""
    excluded_video_ids: Sequence[int] = ()
    blocked_author_ids: Sequence[int] = ()
    viewer: Viewer = field(default_factory=Viewer)
    """Who is watching; what is not said is filled in from the bundle's `filters.viewer`."""
    now_ms: int = 0
    """The instant of the request; 0 is the feed's clock. Only what happened strictly before it is seen."""
    page_token: bytes = b""
    """`next_page_token` of the page before; empty begins a session."""
    explore: bool = True
    """False: the best slate without sampling, and nothing else of the configuration changed."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """What one stage did: candidates in, candidates out, why the others left, and its wall time."""

    name: str
    received: int
    kept: int
    removed: dict[str, int]
    ms: float
    begin_ms: float = 0.0
    """Counted from the request's arrival."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedItem:
    """One slot of a slate, able to say how it came there."""

    video_id: int
    author_id: int
    slot: int
    sources: tuple[str, ...]
    reason: str
    connected: bool
    retrieval_score: float
    scores: tuple[float, ...]
    """Calibrated probabilities in the order of the response's tasks; empty when the ranker did not run."""
    predicted_watch_ms: float
    value: float
    value_terms: dict[str, float]
    propensity: float
    duration_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedResponse:
    """A slate, with the version and the level that made it."""

    request_id: str
    bundle_version: str
    policy_id: str
    cold: bool
    level: Level
    degraded_reason: str
    shortfall_reason: str
    tasks: tuple[str, ...]
    items: tuple[ServedItem, ...]
    stages: tuple[StageStats, ...]
    next_page_token: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidatesResponse:
    """Candidates (K) in blended order, without the ranker."""

    bundle_version: str
    cold: bool
    level: Level
    degraded_reason: str
    sources: tuple[str, ...]
    video_id_K: np.ndarray
    score_K: np.ndarray
    source_K: np.ndarray
    """Index into `sources`."""
    connected_K: np.ndarray
    reasons: tuple[str, ...]
    stages: tuple[StageStats, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedResponse:
    """Scores of the caller's own candidates (N), in the caller's order."""

    bundle_version: str
    cold: bool
    tasks: tuple[str, ...]
    probability_NT: np.ndarray
    watch_ms_N: np.ndarray
    value_N: np.ndarray
    unknown: np.ndarray
    """Positions of videos the bundle does not know."""
    stages: tuple[StageStats, ...]
    level: Level = Level.FULL
    degraded_reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One impression and its feedback; (request_id, slot) names it."""

    request_id: str
    slot: int
    user_id: int
    video_id: int
    ts_ms: int
    author_id: int | None = None
    watch_ms: int | None = None
    duration_ms: int | None = None
    signals: dict[str, bool] = field(default_factory=dict)
    """Only what was logged: a missing signal is unknown, not false."""


@dataclass(frozen=True, slots=True)
class LogOutcome:
    """What became of a list of events."""

    stored: int
    merged: int
    conflicting: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A row of the canonical `videos` table; None is not known."""

    video_id: int
    author_id: int | None = None
    upload_ts_ms: int | None = None
    duration_ms: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """Further columns of the canonical table by name, integers in decimal."""
    tags: tuple[int, ...] = ()
    content: np.ndarray | None = None
    """(D,) float32."""
    eligible: bool = True
    regions: tuple[str, ...] = ()
    """Empty: everywhere."""
    language: str | None = None
    min_age: int | None = None
    safety_level: int | None = None
    available_from_ms: int | None = None
    available_until_ms: int | None = None


@dataclass(frozen=True, slots=True)
class UpsertOutcome:
    """What became of a list of uploads."""

    added: int
    replaced: int


@dataclass(frozen=True, slots=True)
class RemoveOutcome:
    """What became of a list of removals."""

    removed: int
    unknown: int
