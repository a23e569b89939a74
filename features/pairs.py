"""What a viewer did with a candidate's author, its tags, videos of its length, and videos that look like it.

Counted over the viewer's last PAST events, which end strictly before the request, by the function that training and
serving share: no table of pairs is kept, and a live event counts at the next request. B contexts, N candidates, P past
events, S counted signals, W slots of a feature, V distinct values, D dense width of a video.
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
BLOCKS = 2
"""Of a video's dense features: the first (a number, such as its length) and all others (its content) by themselves."""
PROFILE_STRENGTH = 20.0
"""Pseudo-events without a lesson behind a profile."""
PROFILE_SCALE = 8.0
"""Brings products with a profile to the size of the other columns."""
GRID, DENSE_REACH, EXACT_EVENTS = 4096.0, 16.0, 256
"""Profiles are counted in whole numbers of 1/GRID, of dense features up to DENSE_REACH: sums over EXACT_EVENTS of
them stay below 2^24, which float32 holds exactly, and their products with a candidate's below 2^53."""
IN_CACHE = 16
"""Contexts whose past is rounded and summed before it leaves the cache."""
PAIR_WIDTH = len(PAIRED) * WIDTH_PER_FEATURE + BLOCKS * len(COUNTED)
"""Columns: for each paired feature, what each counted signal's rate adds to the viewer's own, and the support; then
for each block and counted signal the product with the viewer's profile."""


def profile_features(
    past_dense_BPD: np.ndarray,
    signals_BPS: np.ndarray,
    length_B: np.ndarray,
    candidate_dense_ND: np.ndarray,
    owner_N: np.ndarray,
) -> np.ndarray:
    """(N, BLOCKS * len(COUNTED)) float32: candidate times profile, block by block. A viewer's profile is the mean of
    (signal - the viewer's rate) * dense features over the past: the first step of a logistic regression of the
    viewer's own, in the features of videos.

    All sums are exact, so that one viewer with a thousand candidates and a batch of impressions get the same bits,
    whatever the order in which a matrix product adds. At most EXACT_EVENTS events."""
    counted_BPS, mask_BP, rate_BS = _counted(signals_BPS, length_B)
    told_BPC = np.concatenate([counted_BPS, mask_BP[..., None]], axis=2, dtype=np.float32)
    sums_BCD = np.empty((*told_BPC.shape[::2], past_dense_BPD.shape[2]))
    for begin in range(0, len(length_B), IN_CACHE):
        at = slice(begin, begin + IN_CACHE)
        sums_BCD[at] = np.matmul(told_BPC[at].transpose(0, 2, 1), _on_grid(past_dense_BPD[at]))
    candidate_ND = _on_grid(candidate_dense_ND).astype(np.float64)
    if len(length_B) == 1:
        first_NC = candidate_ND[:, :1] * sums_BCD[0, :, 0]
        others_NC = candidate_ND[:, 1:] @ sums_BCD[0, :, 1:].T
    else:
        sums_NCD = _of_owner(sums_BCD, owner_N)
        first_NC = candidate_ND[:, :1] * sums_NCD[..., 0]
        others_NC = np.matmul(sums_NCD[..., 1:], candidate_ND[:, 1:, None])[..., 0]
    out_NKC = np.stack([first_NC, others_NC], axis=1)
    lesson_NKS = out_NKC[..., :-1] - rate_BS[owner_N][:, None, :] * out_NKC[..., -1:]
    scale_N = PROFILE_SCALE / GRID**2 / (length_B[owner_N] + PROFILE_STRENGTH)
    return (lesson_NKS * scale_N[:, None, None]).reshape(len(owner_N), BLOCKS * len(COUNTED)).astype(np.float32)


def _on_grid(dense: np.ndarray) -> np.ndarray:
    """Dense features as whole numbers of 1/GRID, float32."""
    whole = np.clip(dense, -DENSE_REACH, DENSE_REACH, dtype=np.float32)
    whole *= GRID
    return np.rint(whole, out=whole)


def pair_features(
    past_sparse_BPW: np.ndarray,
    signals_BPS: np.ndarray,
    length_B: np.ndarray,
    candidate_sparse_NW: np.ndarray,
    owner_N: np.ndarray,
    columns: SparseColumns,
) -> np.ndarray:
    """(N, len(PAIRED) * WIDTH_PER_FEATURE) float32. Over the past events with a candidate's value: the share with a
    signal less the viewer's share over all events, shrunk by STRENGTH; and log1p of their number / 4. Of several
    values the mean.

    `signals_BPS` has all of SIGNALS; events at and beyond `length_B` are padding."""
    n_contexts = len(length_B)
    out_NC = np.zeros((len(owner_N), len(PAIRED) * WIDTH_PER_FEATURE), np.float32)
    counted_BPS, mask_BP, rate_BS = _counted(signals_BPS, length_B)
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
            if not known_N.any():
                continue
            if n_contexts == 1:
                # All candidates look at one past: each distinct value does so once.
                distinct_V, which_N = np.unique(value_N, return_inverse=True)
                tally_NS = _tally(theirs_BPW, tallied_BPS, distinct_V, reach)[which_N]
            else:
                theirs_NPW, tallied_NPS = _of_owner(theirs_BPW, owner_N), _of_owner(tallied_BPS, owner_N)
                tally_NS = _tally(theirs_NPW, tallied_NPS, value_N, reach)
            count_N1 = tally_NS[:, -1:]
            surplus_NS = (tally_NS[:, :-1] - count_N1 * rate_BS[owner_N]) / (count_N1 + STRENGTH)
            block_NC += np.concatenate([surplus_NS, np.log1p(count_N1) / 4.0], axis=1) * known_N[:, None]
            present_N += known_N
        block_NC /= np.maximum(present_N, 1.0)[:, None]
    return out_NC


def _counted(signals_BPS: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counted signals without padding (B, P, S), the mask of events (B, P), and each viewer's rates (B, S)."""
    mask_BP = np.arange(signals_BPS.shape[1]) < length_B[:, None]
    counted_BPS = signals_BPS[..., [SIGNALS.index(signal) for signal in COUNTED]] * mask_BP[..., None]
    rate_BS = counted_BPS.sum(1) / np.maximum(length_B, 1)[:, None]
    return counted_BPS, mask_BP, rate_BS.astype(np.float32)


def _of_owner(x_B: np.ndarray, owner_N: np.ndarray) -> np.ndarray:
    """The context's entry for each candidate; without a copy where each context has one, as in training."""
    if len(owner_N) == len(x_B) and (owner_N == np.arange(len(x_B))).all():
        return x_B
    return x_B[owner_N]


def _tally(theirs_XPW: np.ndarray, tallied_XPS: np.ndarray, value_N: np.ndarray, reach: int) -> np.ndarray:
    """Sums (N, S) over the past events near each value; X is N, or 1 past for all values."""
    same_NP = np.zeros((len(value_N), theirs_XPW.shape[1]), bool)
    for w in range(theirs_XPW.shape[2]):
        theirs_XP = theirs_XPW[..., w]
        if w and not (theirs_XP >= 0).any():
            break  # values fill the slots from the left
        if reach == 0:
            same_NP |= theirs_XP == value_N[:, None]
        else:
            same_NP |= np.abs(theirs_XP - value_N[:, None]) <= reach
    if len(theirs_XPW) == 1:
        return same_NP.astype(np.float32) @ tallied_XPS[0]
    return np.matmul(same_NP[:, None, :].astype(np.float32), tallied_XPS)[:, 0]
