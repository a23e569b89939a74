"""What a viewer did with a candidate's author, its tags and videos of its length: counters of the pair.

Counted over the viewer's last PAST events, which end strictly before the request, by the function that training and
serving share: no table of pairs is kept, and a live event counts at the next request. B contexts, N candidates, P past
events, S counted signals, W slots of a feature, D distinct values.
"""

from __future__ import annotations

import numpy as np

from features.counters import COUNTED
from features.entities import SparseColumns
from features.schema import SIGNALS

PAST = 200
"""Events that are counted; attention reads fewer, and each of them costs it more."""
PAIRED: dict[str, int] = {"author_id": 0, "tags": 0, "duration_bucket": 2}
"""Sparse features of a video that a viewer's past is counted by, and how far apart two values may be that count as
the same (buckets have neighbours, ids have none). A feature that the spec has not got gives zeros."""
STRENGTH = 4.0
"""Pseudo-impressions at the viewer's own rate behind each rate."""
WIDTH_PER_FEATURE = len(COUNTED) + 1
PAIR_WIDTH = len(PAIRED) * WIDTH_PER_FEATURE
"""Columns: for each paired feature, what each counted signal's rate adds to the viewer's own, and the support."""


def pair_features(
    past_sparse_BPW: np.ndarray,
    signals_BPS: np.ndarray,
    length_B: np.ndarray,
    candidate_sparse_NW: np.ndarray,
    owner_N: np.ndarray,
    columns: SparseColumns,
) -> np.ndarray:
    """(N, PAIR_WIDTH) float32. Over the past events with a candidate's value: the share with a signal less the
    viewer's share over all events, shrunk by STRENGTH; and log1p of their number / 4. Of several values the mean.

    `signals_BPS` has all of SIGNALS; events at and beyond `length_B` are padding."""
    n_contexts, past = signals_BPS.shape[:2]
    out_NC = np.zeros((len(owner_N), PAIR_WIDTH), np.float32)
    if past == 0 or len(owner_N) == 0:
        return out_NC
    counted_BPS = signals_BPS[..., [SIGNALS.index(signal) for signal in COUNTED]]
    mask_BP = np.arange(past) < length_B[:, None]
    counted_BPS = counted_BPS * mask_BP[..., None]
    rate_BS = counted_BPS.sum(1) / np.maximum(length_B, 1)[:, None]
    ones_BP1 = mask_BP[..., None].astype(np.float32)
    tallied_BPS = np.concatenate([counted_BPS, ones_BP1], axis=2).astype(np.float32)
    for place, (name, reach) in enumerate(PAIRED.items()):
        if name not in columns.names:
            continue
        at = columns.slice(name)
        theirs_BPW, block_NC = past_sparse_BPW[..., at], out_NC[:, place * WIDTH_PER_FEATURE :][:, :WIDTH_PER_FEATURE]
        present_N = np.zeros(len(owner_N), np.float32)
        for slot in range(at.start, at.stop):
            value_N = candidate_sparse_NW[:, slot]
            known_N = value_N >= 0
            if n_contexts == 1:
                # All candidates look at one past: each distinct value does so once.
                distinct_D, which_N = np.unique(value_N, return_inverse=True)
                tally_NS = _tally(theirs_BPW, tallied_BPS, distinct_D, reach)[which_N]
            else:
                tally_NS = _tally(theirs_BPW[owner_N], tallied_BPS[owner_N], value_N, reach)
            count_N1 = tally_NS[:, -1:]
            surplus_NS = (tally_NS[:, :-1] - count_N1 * rate_BS[owner_N]) / (count_N1 + STRENGTH)
            block_NC += np.concatenate([surplus_NS, np.log1p(count_N1) / 4.0], axis=1) * known_N[:, None]
            present_N += known_N
        block_NC /= np.maximum(present_N, 1.0)[:, None]
    return out_NC


def _tally(theirs_XPW: np.ndarray, tallied_XPS: np.ndarray, value_N: np.ndarray, reach: int) -> np.ndarray:
    """Sums (N, S) over the past events near each value; X is N, or 1 past for all values."""
    same_NP = np.zeros((len(value_N), theirs_XPW.shape[1]), bool)
    for w in range(theirs_XPW.shape[2]):
        theirs_XP = theirs_XPW[..., w]
        if reach == 0:
            same_NP |= theirs_XP == value_N[:, None]
        else:
            same_NP |= np.abs(theirs_XP - value_N[:, None]) <= reach
    if len(theirs_XPW) == 1:
        return same_NP.astype(np.float32) @ tallied_XPS[0]
    return np.matmul(same_NP[:, None, :].astype(np.float32), tallied_XPS)[:, 0]
