"""What a viewer did with a candidate's author and with its tags before the instant: counters of the pair.

Counted over the window of the history, which ends strictly before the request, by the function that training and
serving share: no table of pairs is kept, and a live event counts at the next request. B contexts, N candidates, L
history, S signals, W slots of a feature.
"""

from __future__ import annotations

import numpy as np

from features.counters import COUNTED
from features.entities import SparseColumns
from features.schema import SIGNALS

PAIRED: tuple[str, ...] = ("author_id", "tags", "duration_bucket")
"""Sparse features of a video that a viewer's past is counted by; one that the spec has not got gives zeros."""
STRENGTH = 4.0
"""Pseudo-impressions at the viewer's own rate behind each rate."""
WIDTH_PER_FEATURE = len(COUNTED) + 1
PAIR_WIDTH = len(PAIRED) * WIDTH_PER_FEATURE
"""Columns: for each paired feature, what each counted signal's rate adds to the viewer's own, and the support."""


def pair_features(
    history_sparse_BLW: np.ndarray,
    signals_BLS: np.ndarray,
    length_B: np.ndarray,
    candidate_sparse_NW: np.ndarray,
    owner_N: np.ndarray,
    columns: SparseColumns,
) -> np.ndarray:
    """(N, PAIR_WIDTH) float32. Of a candidate's own events (those of its author, or that share a tag), the share
    with a signal less the viewer's share over the window, shrunk by STRENGTH; and log1p of their number / 4."""
    n_contexts, length = signals_BLS.shape[:2]
    out_NC = np.zeros((len(owner_N), PAIR_WIDTH), np.float32)
    if length == 0 or len(owner_N) == 0:
        return out_NC
    counted_BLS = signals_BLS[..., [SIGNALS.index(signal) for signal in COUNTED]]
    rate_BS = counted_BLS.sum(1) / np.maximum(length_B, 1)[:, None]
    mask_BL = np.arange(length) < length_B[:, None]

    def of_owner(x_B: np.ndarray) -> np.ndarray:
        # One context's window serves all its candidates as it stands; only several contexts need a gather.
        return x_B if n_contexts == 1 else x_B[owner_N]

    gathered_NLS = of_owner(counted_BLS)
    for place, name in enumerate(PAIRED):
        if name not in columns.names:
            continue
        at = columns.slice(name)
        same_NL = np.zeros((len(owner_N), length), bool)
        theirs_NLW = of_owner(history_sparse_BLW[..., at])
        for slot in range(at.start, at.stop):
            mine_N = candidate_sparse_NW[:, slot]
            for w in range(theirs_NLW.shape[-1]):
                same_NL |= (theirs_NLW[..., w] == mine_N[:, None]) & (mine_N >= 0)[:, None]
        same_NL &= of_owner(mask_BL)
        count_N = same_NL.sum(1).astype(np.float32)
        if n_contexts == 1:
            positive_NS = same_NL.astype(np.float32) @ gathered_NLS[0]
        else:
            positive_NS = np.matmul(same_NL[:, None, :].astype(np.float32), gathered_NLS)[:, 0]
        start = place * WIDTH_PER_FEATURE
        surplus_NS = positive_NS - count_N[:, None] * of_owner(rate_BS)
        out_NC[:, start : start + len(COUNTED)] = surplus_NS / (count_N[:, None] + STRENGTH)
        out_NC[:, start + len(COUNTED)] = np.log1p(count_N) / 4.0
    return out_NC
