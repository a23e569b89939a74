"""Who is asking: the user's row, their last L videos, what they have seen and whom they follow, at one instant.

The bundle's history and the live events are merged as the training data would have been, strictly before the
instant, and become model inputs through `features.inputs.assemble`: the function that training uses. One user here,
so B = 1; E events, K candidates, L history length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from features.history import HistoryWindow, empty_window
from features.inputs import Inputs, UserRows, assemble
from features.pairs import PAST
from features.schema import SIGNALS
from serving.bundle import FeedBundle
from serving.records import UserState

_HATE = np.uint8(1 << SIGNALS.index("hate"))
_DISLIKES = 64
"""Kept a user: older ones have faded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A request, hydrated."""

    user_id: int
    user_row: int
    """Row of the bundle's users; 0 for one it does not know."""
    now_ms: int
    surface: str | None
    surface_row: int
    history: HistoryWindow
    past: HistoryWindow
    """The longer window that counters of the viewer with authors and tags are taken over."""
    seen_rows: np.ndarray
    """(E,) int64 rows of videos, distinct, ascending, without 0."""
    followed_authors: np.ndarray
    """int64, ascending."""
    disliked_rows: np.ndarray
    """(N,) int64 rows of videos that the user gave negative feedback, the last of them, and when."""
    disliked_ts_ms: np.ndarray
    cold: bool
    """Neither the bundle nor the event log has met this user."""


def hydrate(bundle: FeedBundle, live: UserState, *, user_id: int, now_ms: int, surface: str | None) -> Query:
    """Look a user up at an instant; an unknown user is row 0 with whatever they did since."""
    user_row = int(bundle.users.rows_of(np.array([user_id]))[0])
    start, end = _base_range(bundle, user_row, now_ms)
    past_rows = np.asarray(bundle.history.video_row[start:end])
    seen = np.unique(np.concatenate([past_rows, bundle.videos.rows_of(live.seen_ids)]))
    disliked_rows, disliked_ts_ms = _disliked(bundle, live, start, end, now_ms)
    followed = np.concatenate([bundle.follows.of(user_row, now_ms), live.followed_authors])
    past = _merged_window(bundle, live, user_row, start, end, now_ms)
    return Query(
        user_id=user_id,
        user_row=user_row,
        now_ms=now_ms,
        surface=surface,
        surface_row=int(bundle.encoder.surface_rows([surface])[0]),
        history=past.last(bundle.encoder.spec.history_length),
        past=past.last(PAST),
        seen_rows=seen[seen > 0],
        followed_authors=np.unique(followed),
        disliked_rows=disliked_rows,
        disliked_ts_ms=disliked_ts_ms,
        cold=user_row == 0 and len(live.seen_ids) == 0,
    )


def model_inputs(bundle: FeedBundle, query: Query, candidate_rows_K: np.ndarray) -> Inputs:
    """Inputs of one user and K candidates, slot hidden: what `Dataset.inputs(with_slot=False)` gives in training."""
    user_rows = np.array([query.user_row])
    candidate_rows_K = np.asarray(candidate_rows_K, dtype=np.int64)
    return assemble(
        user=UserRows.take(bundle.users, user_rows),
        user_counters_BC=np.asarray(bundle.user_counters[user_rows]),
        surface_B=np.array([query.surface_row]),
        now_ms_B=np.array([query.now_ms]),
        history=query.history,
        past=query.past,
        videos=bundle.videos,
        candidate_rows_N=candidate_rows_K,
        owner_N=np.zeros(len(candidate_rows_K), np.int64),
        candidate_counters_NC=np.asarray(bundle.video_counters[candidate_rows_K]),
        candidate_upload_ts_ms_N=np.asarray(bundle.upload_ts_ms[candidate_rows_K]),
        slot_N=np.zeros(len(candidate_rows_K), np.int64),
        followed_N=np.isin(bundle.author_id[candidate_rows_K], query.followed_authors),
    )


def _base_range(bundle: FeedBundle, user_row: int, now_ms: int) -> tuple[int, int]:
    """Positions in the bundle's history log of the user's events strictly before the instant."""
    start, stop = (int(bundle.history.user_start[user_row + i]) for i in (0, 1))
    return start, start + int(np.searchsorted(bundle.history.ts_ms[start:stop], now_ms, side="left"))


def _disliked(bundle: FeedBundle, live: UserState, start: int, end: int, now_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and instants of negative feedback strictly before now, the newest last."""
    at = start + np.flatnonzero(bundle.history.signals[start:end] & _HATE)
    live_E = (live.signals_E & _HATE).astype(bool) & (live.ts_ms_E < now_ms)
    rows = np.concatenate([bundle.history.video_row[at], bundle.videos.rows_of(live.video_id_E[live_E])])
    ts_ms = np.concatenate([bundle.history.ts_ms[at], live.ts_ms_E[live_E]])
    distinct = np.unique(np.stack([rows, ts_ms]), axis=1) if len(rows) else np.zeros((2, 0), np.int64)
    last = np.argsort(distinct[1], kind="stable")[-_DISLIKES:]
    return distinct[0, last], distinct[1, last]


def _merged_window(
    bundle: FeedBundle, live: UserState, user_row: int, start: int, end: int, now_ms: int
) -> HistoryWindow:
    length = max(PAST, bundle.encoder.spec.history_length)
    base = bundle.history.windows(np.array([user_row]), np.array([end]), length)
    past_E = live.ts_ms_E < now_ms
    if not past_E.any():
        return base
    rows_E = bundle.videos.rows_of(live.video_id_E)
    past_E &= ~_already_in_bundle(bundle, start, end, rows_E, live.ts_ms_E)
    n_base = int(base.length_B[0])
    ts_ms = np.concatenate([base.ts_ms_BL[0, :n_base], live.ts_ms_E[past_E]])
    last = np.argsort(ts_ms, kind="stable")[-length:]
    merged = empty_window(1, length)
    merged.length_B[0] = len(last)
    for field, of_live in (
        ("video_row_BL", rows_E),
        ("signals_BL", live.signals_E),
        ("watch_fraction_BL", live.watch_fraction_E),
        ("ts_ms_BL", live.ts_ms_E),
    ):
        both = np.concatenate([getattr(base, field)[0, :n_base], of_live[past_E]])
        getattr(merged, field)[0, : len(last)] = both[last]
    return merged


def _already_in_bundle(bundle: FeedBundle, start: int, end: int, rows_E: np.ndarray, ts_ms_E: np.ndarray) -> np.ndarray:
    """Live events that a bundle built from the exported log holds too: same video, same instant. They count once."""
    tail = start + int(np.searchsorted(bundle.history.ts_ms[start:end], ts_ms_E.min(), side="left"))
    if tail == end:
        return np.zeros(len(rows_E), bool)
    same_video_EM = rows_E[:, None] == bundle.history.video_row[tail:end][None, :]
    return (same_video_EM & (ts_ms_E[:, None] == bundle.history.ts_ms[tail:end][None, :])).any(axis=1)
