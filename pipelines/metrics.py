"""Ranking, calibration and watch-time metrics, each exact in float64 and safe under ties.

Rows are one impression each; `groups` (usually users) need not be sorted. Shapes: N rows, Q queries, K results.
Equal scores carry no information about order, so a tie counts one half (AUC) or its average over all orders (nDCG).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """P(a positive outscores a negative), ties one half; NaN when one class is missing."""
    y, s = _columns(labels, scores)
    return gauc(y, s, np.zeros(len(y), dtype=np.int64))


def gauc(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike,
    weight: Literal["positives", "impressions"] = "positives",
) -> float:
    """Mean AUC inside the groups that have both classes, weighted by their positives or rows; NaN without any."""
    found = auc_by_group(labels, scores, groups)
    both = np.isfinite(found.auc_G)
    if not both.any():
        return float("nan")
    weight_G = found.positives_G if weight == "positives" else found.rows_G
    return float(np.average(found.auc_G[both], weights=weight_G[both]))


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAuc:
    """G groups, ascending."""

    group_G: npt.NDArray[np.int64]
    auc_G: Floats
    """NaN where a class is missing."""
    positives_G: Floats
    rows_G: npt.NDArray[np.int64]


def auc_by_group(labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike) -> GroupAuc:
    """The AUC inside each group, ties one half."""
    y, s = _columns(labels, scores)
    group = _group_codes(groups, len(y))
    rows = np.bincount(group)
    positives = np.bincount(group, weights=y).astype(np.float64)
    negatives = rows - positives
    rank_sum = np.bincount(group, weights=y * _average_ranks(group, s)) if len(y) else np.zeros(0)
    per_group = np.full(len(rows), np.nan)
    both = (positives > 0) & (negatives > 0)
    p, n = positives[both], negatives[both]
    per_group[both] = (rank_sum[both] - p * (p + 1) / 2) / (p * n)
    return GroupAuc(group_G=np.unique(np.asarray(groups).ravel()), auc_G=per_group, positives_G=positives, rows_G=rows)


def ndcg_at_k(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike,
    k: int,
    *,
    ties: Literal["average", "random"] = "average",
    seed: int = 0,
    without_positives: Literal["zero", "skip"] = "zero",
) -> float:
    """Mean nDCG@k over groups, gain = label, discount 1/log2(rank + 1).

    `ties="average"` is the expectation over every order of equal scores; `ties="random"` draws one order from `seed`.
    A group without a positive counts as 0, or is left out with `without_positives="skip"`.
    """
    y, s = _columns(labels, scores)
    group = _group_codes(groups, len(y))
    if ties == "random":
        s = -_random_positions(group, s, seed).astype(np.float64)
    found = _dcg(y, s, group, k)
    ideal = _dcg(y, y, group, k)
    has_positive = ideal > 0
    per_group = np.divide(found, ideal, out=np.zeros_like(found), where=has_positive)
    if without_positives == "skip":
        per_group = per_group[has_positive]
    return float(per_group.mean()) if len(per_group) else float("nan")


def kuairand_primary(
    labels: npt.ArrayLike, scores: npt.ArrayLike, users: npt.ArrayLike, seed: int = 0
) -> tuple[float, float, float]:
    """(GAUC, nDCG@5, their mean) by KuaiRand's long_view protocol.

    Videos are ranked within each user's logged impressions and ties are broken at random, once, for both metrics. GAUC
    weights users with both classes by their positives; nDCG@5 counts users without positives as 0.
    """
    y, s = _columns(labels, scores)
    group = _group_codes(users, len(y))
    order = -_random_positions(group, s, seed).astype(np.float64)
    g = gauc(y, order, group, weight="positives")
    n = ndcg_at_k(y, order, group, 5)
    return g, n, (g + n) / 2


def log_loss(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean negative log likelihood in nats; probabilities are kept one machine epsilon away from 0 and 1."""
    y, p = _columns(labels, probabilities)
    eps = np.finfo(np.float64).eps
    p = np.clip(p, eps, 1 - eps)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def normalised_entropy(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Log loss over the entropy of the base rate: 1 is what the constant base rate scores, lower is better."""
    y, p = _columns(labels, probabilities)
    rate = y.mean() if len(y) else float("nan")
    if not 0 < rate < 1:
        return float("nan")
    return log_loss(y, p) / float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def calibration(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Mean prediction over mean label: above 1 promises too much; NaN when no label is positive."""
    y, p = _columns(labels, predictions)
    return float(p.mean() / y.mean()) if len(y) and y.mean() != 0 else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """Equal-mass bins of a calibration curve, in order of prediction."""

    predicted: Floats
    """Mean prediction of each bin."""
    observed: Floats
    """Mean label of each bin."""
    rows: npt.NDArray[np.int64]
    """Rows in each bin."""


def reliability(labels: npt.ArrayLike, predictions: npt.ArrayLike, bins: int = 20) -> Reliability:
    """The calibration curve over bins of equal mass. Equal predictions share a bin, so row order cannot leak in."""
    y, p = _columns(labels, predictions)
    middle = _average_ranks(np.zeros(len(p), dtype=np.int64), p) - 0.5
    bin_of = np.minimum((middle / max(len(p), 1) * bins).astype(np.int64), bins - 1)
    rows = np.bincount(bin_of, minlength=bins)
    kept = rows > 0
    return Reliability(
        predicted=np.bincount(bin_of, weights=p, minlength=bins)[kept] / rows[kept],
        observed=np.bincount(bin_of, weights=y, minlength=bins)[kept] / rows[kept],
        rows=rows[kept],
    )


def expected_calibration_error(labels: npt.ArrayLike, predictions: npt.ArrayLike, bins: int = 20) -> float:
    """Mean |predicted - observed| over equal-mass bins, weighted by rows."""
    curve = reliability(labels, predictions, bins)
    if not curve.rows.size:
        return float("nan")
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.rows))


def mae(actual: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Mean absolute error, in the unit of the inputs."""
    a, p = _columns(actual, predicted)
    return float(np.abs(a - p).mean()) if len(a) else float("nan")


def xauc(actual: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Share of the pairs with different actual values that the prediction orders rightly, predicted ties one half.

    Exact over all pairs in O(N log^2 N): two actual values differ first at some bit of their rank, and the pairs that
    part at one bit are the positives and negatives of an AUC within the groups that share the higher bits.
    """
    a, p = _columns(actual, predicted)
    values, rank = np.unique(a, return_inverse=True)
    right = comparable = 0.0
    for bit in range(max(len(values) - 1, 0).bit_length()):
        group, upper = rank >> (bit + 1), (rank >> bit) & 1
        groups = int(group.max()) + 1
        positives = np.bincount(group, weights=upper, minlength=groups)
        negatives = np.bincount(group, minlength=groups) - positives
        rank_sum = np.bincount(group, weights=upper * _average_ranks(group, p), minlength=groups)
        right += float((rank_sum - positives * (positives + 1) / 2).sum())
        comparable += float(positives @ negatives)
    return right / comparable if comparable else float("nan")


def recall_at_k(
    topk_ids_QK: npt.ArrayLike, relevant_ids: Sequence[npt.ArrayLike], ks: Sequence[int]
) -> dict[int, float]:
    """Mean share of a query's relevant ids among its first k results, over the queries that have relevant ids.

    Results are best first and padded with -1; an id repeated among the results counts once, at its first place.
    """
    top = np.asarray(topk_ids_QK, dtype=np.int64)
    if top.ndim != 2 or len(top) != len(relevant_ids):
        raise ValueError(f"topk_ids has shape {top.shape}; expected one row for each of {len(relevant_ids)} queries")
    if max(ks) > top.shape[1]:
        raise ValueError(f"recall@{max(ks)} asked of {top.shape[1]} results a query: retrieve more or ask for less")
    relevant = [np.unique(np.asarray(ids, dtype=np.int64)) for ids in relevant_ids]
    sizes = np.array([len(ids) for ids in relevant])
    if not sizes.sum():
        return {k: float("nan") for k in ks}
    ids, code = np.unique(np.concatenate(relevant), return_inverse=True)
    pairs = np.repeat(np.arange(len(relevant)), sizes) * len(ids) + code  # sorted: queries in order, ids unique inside
    at = np.minimum(np.searchsorted(ids, top), len(ids) - 1)
    cell = np.arange(len(top))[:, None] * len(ids) + at
    pair = np.minimum(np.searchsorted(pairs, cell), len(pairs) - 1)
    query, rank = np.nonzero((ids[at] == top) & (pairs[pair] == cell) & (top != -1))
    first = np.full(len(pairs), top.shape[1], dtype=np.int64)
    np.minimum.at(first, pair[query, rank], rank)
    owner = pairs // len(ids)
    asked = sizes > 0
    return {
        k: float((np.bincount(owner, weights=first < k, minlength=len(top))[asked] / sizes[asked]).mean()) for k in ks
    }


def coverage(recommended_ids: npt.ArrayLike, catalogue_size: int) -> float:
    """Share of the catalogue that was recommended to anybody; -1 is padding."""
    ids = np.unique(np.asarray(recommended_ids, dtype=np.int64))
    return float((ids != -1).sum() / catalogue_size)


def gini(exposures: npt.ArrayLike) -> float:
    """Concentration of exposure: 0 when all get the same, towards 1 when one gets all. Pass zeros for the unexposed."""
    x = np.sort(np.asarray(exposures, dtype=np.float64).ravel())
    if not x.size or x.sum() == 0:
        return float("nan")
    rank = np.arange(1, len(x) + 1)
    return float((2 * rank - len(x) - 1) @ x / (len(x) * x.sum()))


def _columns(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Floats, Floats]:
    y = np.asarray(labels, dtype=np.float64).ravel()
    s = np.asarray(scores, dtype=np.float64).ravel()
    if len(y) != len(s):
        raise ValueError(f"{len(y)} labels but {len(s)} scores: one score a row is needed")
    if np.isnan(y).any() or np.isnan(s).any():
        raise ValueError("labels or scores hold NaN: drop rows whose label was not logged, and mend the model")
    return y, s


def _group_codes(groups: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    code = np.unique(np.asarray(groups).ravel(), return_inverse=True)[1]
    if len(code) != rows:
        raise ValueError(f"{len(code)} groups but {rows} rows: one group a row is needed")
    return code


def _average_ranks(group: npt.NDArray[np.int64], values: Floats) -> Floats:
    """Rank (from 1, ascending) of each row inside its group; equal values share the mean of their ranks."""
    order = np.lexsort((values, group))
    g, v = group[order], values[order]
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_tie = new_group | np.r_[True, v[1:] != v[:-1]]
    start = np.flatnonzero(new_tie)
    stop = np.r_[start[1:], len(v)]
    before = np.flatnonzero(new_group)[np.cumsum(new_group)[start] - 1]
    ranks = np.empty(len(v))
    ranks[order] = np.repeat((start + 1 + stop) / 2 - before, stop - start)
    return ranks


def _random_positions(group: npt.NDArray[np.int64], scores: Floats, seed: int) -> npt.NDArray[np.int64]:
    """Place of each row when its group is sorted by falling score, equal scores in an order drawn from `seed`."""
    order = np.lexsort((np.random.default_rng(seed).random(len(scores)), -scores, group))
    place = np.empty(len(scores), dtype=np.int64)
    place[order] = np.arange(len(scores))
    return place


def _dcg(gains: Floats, scores: Floats, group: npt.NDArray[np.int64], k: int) -> Floats:
    """DCG@k of each group, averaged over the orders of equal scores: a tied block shares its gain over its places."""
    if not len(gains):
        return np.zeros(0)
    order = np.lexsort((-scores, group))
    g, s = group[order], scores[order]
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_tie = new_group | np.r_[True, s[1:] != s[:-1]]
    place = np.arange(len(g)) - np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    discount = np.where(place < k, 1 / np.log2(place + 2.0), 0.0)
    block = np.cumsum(new_tie) - 1
    shared = np.bincount(block, weights=gains[order]) * np.bincount(block, weights=discount) / np.bincount(block)
    return np.bincount(g[new_tie], weights=shared).astype(np.float64)
