"""Model inputs in numpy, assembled by one function for training and serving alike.

B contexts (a user at an instant), N candidates (each owned by one context), L history, U distinct videos of the
batch: every video, in a history or as a candidate, is embedded once and referred to by its position in U.

    contexts   0        1            candidates   owner 0 0 1
    history    a b c    b            video        d e a
    U = [unknown, a, b, c, d, e]     history_BL = [[1 2 3] [2 0 0]]   candidate_N = [4 5 1]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from features.entities import ByRow, Encoded, Entities, SparseColumns
from features.history import UNDATED_TS_MS, HistoryWindow, unpack_signals
from features.pairs import PAIR_WIDTH, pair_features, profile_features


@dataclass(frozen=True, slots=True)
class UserRows:
    """Encoded users of B contexts, as gathered from `Entities` or encoded on the fly."""

    sparse_BW: np.ndarray
    dense_BD: np.ndarray
    columns: SparseColumns

    @classmethod
    def take(cls, users: Entities, rows_B: np.ndarray) -> UserRows:
        """Gather rows (0 = unknown user)."""
        return cls(np.asarray(users.sparse[rows_B]), np.asarray(users.dense[rows_B]), users.columns)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch, framework-free."""

    user_sparse_BW: np.ndarray
    user_dense_BD: np.ndarray
    """Dense features of the user, counters last."""
    user_columns: SparseColumns
    surface_B: np.ndarray
    now_ms_B: np.ndarray
    """Instant of each request; UNDATED_TS_MS where it is not known."""
    video_row_U: np.ndarray
    """Which video of the catalogue each is: what its randomness in training hangs on."""
    video_sparse_UW: np.ndarray
    video_dense_UD: np.ndarray
    video_columns: SparseColumns
    history_BL: np.ndarray
    """Positions in U; 0 is padding."""
    history_signals_BLS: np.ndarray
    history_watch_BL: np.ndarray
    history_ts_ms_BL: np.ndarray
    """When each event was; UNDATED_TS_MS for padding and events without a time."""
    history_gap_BL: np.ndarray
    history_length_B: np.ndarray
    candidate_N: np.ndarray
    """Positions in U."""
    owner_N: np.ndarray
    """Context of each candidate."""
    candidate_dense_NC: np.ndarray
    """Features of (candidate, instant): counters of the video, counters of the pair, and at the end INSTANT_WIDTH
    columns that are no counters: age at the request, and whether the viewer follows the author."""
    slot_N: np.ndarray
    extra_X: np.ndarray
    """Positions in U of further videos (sampled negatives)."""


AGE_WIDTH = 2
"""Age features: log1p of hours since upload, and whether the upload time is known."""
INSTANT_WIDTH = AGE_WIDTH + 1
"""Last columns of `candidate_dense_NC`: age, and whether the viewer follows the author."""


def age_features(now_ms_N: np.ndarray, upload_ts_ms_N: np.ndarray) -> np.ndarray:
    """(N, AGE_WIDTH) float32; an upload time of UNKNOWN_UPLOAD (negative), or a request without a time,
    gives zeros."""
    known = (upload_ts_ms_N >= 0) & (now_ms_N != UNDATED_TS_MS)
    hours = np.where(known, np.maximum(now_ms_N - upload_ts_ms_N, 0), 0) / 3.6e6
    return np.stack([np.log1p(hours) / 5.0, known], axis=1).astype(np.float32)


UNKNOWN_UPLOAD = -1


def assemble(
    *,
    user: UserRows,
    user_counters_BC: np.ndarray,
    surface_B: np.ndarray,
    now_ms_B: np.ndarray,
    history: HistoryWindow,
    videos: Encoded,
    candidate_rows_N: np.ndarray,
    owner_N: np.ndarray,
    candidate_counters_NC: np.ndarray,
    candidate_upload_ts_ms_N: np.ndarray,
    slot_N: np.ndarray,
    past: HistoryWindow | None = None,
    followed_N: np.ndarray | None = None,
    extra_rows_X: np.ndarray | None = None,
) -> Inputs:
    """Gather and deduplicate. Rows are rows of `videos` (0 = unknown); slots are rows of the slot table. `past` is
    the longer window that pairs are counted over, of which `history` is the end; without it, and without
    `followed_N`, nothing is known of a viewer and an author."""
    extra = np.zeros(0, np.int64) if extra_rows_X is None else extra_rows_X
    mentioned = np.concatenate([[0], history.video_row_BL.ravel(), candidate_rows_N, extra])
    distinct_U, position = _distinct(mentioned)
    n_history, n_candidates = history.video_row_BL.size, len(candidate_rows_N)
    age_NA = age_features(np.asarray(now_ms_B)[owner_N], candidate_upload_ts_ms_N)
    owner_N = np.asarray(owner_N, dtype=np.int64)
    video_sparse_UW, video_dense_UD = np.asarray(videos.sparse[distinct_U]), np.asarray(videos.dense[distinct_U])
    history_BL = position[1 : 1 + n_history].reshape(history.video_row_BL.shape)
    candidate_N = position[1 + n_history : 1 + n_history + n_candidates]
    pair_NC = np.zeros((n_candidates, PAIR_WIDTH), np.float32)
    if past is not None and n_candidates:
        signals_BPS, rows_BP = unpack_signals(past.signals_BL), past.video_row_BL
        about = (signals_BPS, past.length_B)
        sparse_NW, dense_ND = video_sparse_UW[candidate_N], video_dense_UD[candidate_N]
        pair_NC = np.concatenate(
            [
                pair_features(_gather(videos.sparse, rows_BP), *about, sparse_NW, owner_N, videos.columns),
                profile_features(_gather(videos.dense, rows_BP), *about, dense_ND, owner_N),
            ],
            axis=1,
        )
    followed_N1 = np.zeros((n_candidates, 1)) if followed_N is None else np.asarray(followed_N)[:, None]
    return Inputs(
        user_sparse_BW=user.sparse_BW,
        user_dense_BD=np.concatenate([user.dense_BD, user_counters_BC], axis=1).astype(np.float32),
        user_columns=user.columns,
        surface_B=surface_B,
        now_ms_B=np.asarray(now_ms_B, dtype=np.int64),
        video_row_U=distinct_U,
        video_sparse_UW=video_sparse_UW,
        video_dense_UD=video_dense_UD,
        video_columns=videos.columns,
        history_BL=history_BL,
        history_signals_BLS=unpack_signals(history.signals_BL),
        history_watch_BL=history.watch_fraction_BL,
        history_ts_ms_BL=history.ts_ms_BL,
        history_gap_BL=history.gap_bucket(now_ms_B),
        history_length_B=history.length_B,
        candidate_N=candidate_N,
        owner_N=owner_N,
        candidate_dense_NC=np.concatenate(
            [candidate_counters_NC, pair_NC, age_NA, followed_N1], axis=1, dtype=np.float32
        ),
        slot_N=slot_N,
        extra_X=position[1 + n_history + n_candidates :],
    )


def _gather(table: ByRow, rows_BP: np.ndarray) -> np.ndarray:
    """(B, P, width): a catalogue that grows takes plain lists of rows alone."""
    flat = np.asarray(table[rows_BP.ravel()])
    return flat.reshape(*rows_BP.shape, flat.shape[1])


def _distinct(rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique(rows_M, return_inverse=True)` of rows >= 0. Marking them in an array as long as the highest costs a
    step a video, sorting them some twenty a row: so small batches of large catalogues are sorted."""
    highest = int(rows_M.max())
    if highest > MARKED_A_ROW * len(rows_M):
        return np.unique(rows_M, return_inverse=True)
    seen = np.zeros(highest + 1, bool)
    seen[rows_M] = True
    distinct_U = np.flatnonzero(seen)
    place = np.empty(highest + 1, np.int64)
    place[distinct_U] = np.arange(len(distinct_U))
    return distinct_U, place[rows_M]


MARKED_A_ROW = 32
"""Videos of the catalogue a mentioned row up to which marking is faster than sorting."""


@dataclass(frozen=True, slots=True)
class Collated:
    """A training batch before tensors: inputs and what the loss compares them with."""

    inputs: Inputs
    targets: dict[str, np.ndarray]
