"""Metrics equal an independent oracle on random cases, and visible arithmetic on small ones."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from pipelines import metrics

CASES = 1000
"""Random cases a metric is compared on, to 1e-9."""


def random_case(seed: int):
    """Rows with ties, users without rows of one class, users with one row; every tenth case has no positive."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 60))
    users = rng.integers(0, max(rows // 12, 1), rows)
    labels = (rng.random(rows) < rng.choice([0.1, 0.5])).astype(float) * (seed % 10 > 0)
    scores = np.round(rng.random(rows), int(rng.integers(1, 4)))
    return labels, scores, users


def test_auc_and_gauc_equal_scikit_learn_on_random_ties():
    for seed in range(CASES):
        labels, scores, users = random_case(seed)
        if 0 < labels.sum() < len(labels):
            assert metrics.auc(labels, scores) == pytest.approx(oracle.roc_auc_score(labels, scores), abs=1e-9)
        per_user, positives, rows = [], [], []
        for user in np.unique(users):
            mine = users == user
            if 0 < labels[mine].sum() < mine.sum():
                per_user.append(oracle.roc_auc_score(labels[mine], scores[mine]))
                positives.append(labels[mine].sum())
                rows.append(mine.sum())
        for weight, weights in (("positives", positives), ("impressions", rows)):
            found = metrics.gauc(labels, scores, users, weight=weight)
            if per_user:
                assert found == pytest.approx(np.average(per_user, weights=weights), abs=1e-9)
            else:
                assert math.isnan(found)


def test_ndcg_equals_scikit_learn_on_random_ties():
    for seed in range(CASES):
        labels, scores, users = random_case(seed)
        expected = []
        for user in np.unique(users):
            mine = users == user
            if labels[mine].sum() == 0:
                expected.append(0.0)
            elif mine.sum() == 1:  # scikit-learn refuses a list of one; a single positive is ranked first
                expected.append(1.0)
            else:
                expected.append(oracle.ndcg_score(labels[None, mine], scores[None, mine], k=5))
        assert metrics.ndcg_at_k(labels, scores, users, 5) == pytest.approx(np.mean(expected), abs=1e-9)


def test_ndcg_equals_torchmetrics_where_no_scores_tie():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = (rng.random(12) < 0.3).astype(float)
        scores = rng.permutation(12) / 12
        expected = retrieval_normalized_dcg(torch.tensor(scores), torch.tensor(labels).long(), top_k=5).item()
        assert metrics.ndcg_at_k(labels, scores, np.zeros(12), 5) == pytest.approx(expected, abs=1e-6)  # float32


def test_log_loss_and_normalised_entropy_equal_scikit_learn():
    for seed in range(CASES):
        labels, scores, _ = random_case(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = oracle.log_loss(labels, scores, labels=[0.0, 1.0])
        assert metrics.log_loss(labels, scores) == pytest.approx(loss, abs=1e-9)
        rate = labels.mean()
        if 0 < rate < 1:
            entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
            assert metrics.normalised_entropy(labels, scores) == pytest.approx(loss / entropy, rel=1e-9)
        else:
            assert math.isnan(metrics.normalised_entropy(labels, scores))


def test_xauc_equals_counting_every_pair():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        actual, predicted = rng.integers(0, 9, 25).astype(float), rng.integers(0, 6, 25).astype(float)
        right = comparable = 0.0
        for i in range(25):
            for j in range(25):
                if actual[i] > actual[j]:
                    comparable += 1
                    right += 1.0 if predicted[i] > predicted[j] else 0.5 if predicted[i] == predicted[j] else 0.0
        assert metrics.xauc(actual, predicted) == pytest.approx(right / comparable, abs=1e-9)


def test_gauc_by_hand():
    #         user 1: positives beat 1 of 1       user 2: a tie = 1/2, and a win    user 3: one class, left out
    labels = [1, 0, 1, 0, 0, 1, 1]
    scores = [0.9, 0.1, 0.5, 0.5, 0.2, 0.3, 0.4]
    users = [1, 1, 2, 2, 2, 3, 3]
    assert metrics.gauc(labels, scores, users) == pytest.approx((1 * 1.0 + 1 * 0.75) / 2)
    assert metrics.gauc(labels, scores, users, weight="impressions") == pytest.approx((2 * 1.0 + 3 * 0.75) / 5)


def test_ndcg_by_hand():
    # ranked: 0, 1, 1, with the second and third tied; the ideal list is 1, 1, 0
    found = (1 / math.log2(3) + 1 / math.log2(4)) / (1 / math.log2(2) + 1 / math.log2(3))
    assert metrics.ndcg_at_k([1, 0, 1], [0.4, 0.9, 0.4], [7, 7, 7], 5) == pytest.approx(found)
    # at k = 2 one of the two tied positives is inside, whichever
    at_2 = (1 / math.log2(3)) / (1 / math.log2(2) + 1 / math.log2(3))
    assert metrics.ndcg_at_k([1, 0, 1], [0.4, 0.9, 0.4], [7, 7, 7], 2) == pytest.approx(at_2)
    # a user without positives counts as 0, or not at all
    assert metrics.ndcg_at_k([1, 0], [1, 1], [1, 2], 5) == pytest.approx((1 + 0) / 2)
    assert metrics.ndcg_at_k([1, 0], [1, 1], [1, 2], 5, without_positives="skip") == pytest.approx(1.0)


def test_constant_scores_leak_no_order():
    """The positives come first in the log; a metric that reads row order would call constant scores perfect."""
    labels = np.tile([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 2000)
    users = np.repeat(np.arange(2000), 6)
    scores = np.zeros(12000)
    one_of_six_in_five = sum(1 / math.log2(r + 1) for r in range(1, 6)) / 6
    assert metrics.gauc(labels, scores, users) == pytest.approx(0.5)
    assert metrics.ndcg_at_k(labels, scores, users, 5) == pytest.approx(one_of_six_in_five)
    drawn = metrics.ndcg_at_k(labels, scores, users, 5, ties="random", seed=3)
    assert drawn == pytest.approx(one_of_six_in_five, abs=0.03)
    g, n, primary = metrics.kuairand_primary(labels, scores, users, seed=1)
    assert g == pytest.approx(0.5, abs=0.03)
    assert n == pytest.approx(one_of_six_in_five, abs=0.03)
    assert primary == (g + n) / 2
    assert metrics.expected_calibration_error(labels, scores + 1 / 6) == pytest.approx(0, abs=1e-12)


def test_kuairand_primary_by_hand():
    # user 1 ranks 1, 0: AUC 1, nDCG 1. user 2 ranks 0, 1: AUC 0, nDCG 1/log2(3). user 3 has no positive: nDCG 0
    g, n, primary = metrics.kuairand_primary([1, 0, 1, 0, 0], [2, 1, 1, 2, 5], [1, 1, 2, 2, 3])
    assert g == pytest.approx((1 * 1 + 1 * 0) / 2)
    assert n == pytest.approx((1 + 1 / math.log2(3) + 0) / 3)
    assert primary == pytest.approx((g + n) / 2)


def test_row_order_changes_no_metric():
    labels, scores, users = random_case(11)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    for metric in (metrics.gauc, lambda y, s, u: metrics.ndcg_at_k(y, s, u, 5)):
        before, after = metric(labels, scores, users), metric(labels[shuffled], scores[shuffled], users[shuffled])
        assert before == pytest.approx(after, abs=1e-12)


def test_calibration_by_hand():
    labels, predictions = [1, 0, 0, 1], [0.2, 0.2, 0.8, 0.8]
    assert metrics.calibration(labels, predictions) == pytest.approx((0.2 + 0.2 + 0.8 + 0.8) / (1 + 0 + 0 + 1))
    # two bins of two rows: |.2 - 1/2| and |.8 - 1/2|
    assert metrics.expected_calibration_error(labels, predictions, bins=2) == pytest.approx((0.3 * 2 + 0.3 * 2) / 4)
    curve = metrics.reliability(labels, predictions, bins=2)
    assert curve.rows.tolist() == [2, 2]
    assert curve.observed.tolist() == [0.5, 0.5]


def test_recall_by_hand():
    results = [[5, 9, 5, 2], [1, 2, 3, -1], [4, 4, 4, 4]]
    relevant = [[2, 5, 77], [], [8]]  # the second query asks for nothing and is left out
    found = metrics.recall_at_k(results, relevant, [1, 3, 4])
    assert found == {1: pytest.approx((1 / 3 + 0) / 2), 3: pytest.approx((1 / 3) / 2), 4: pytest.approx((2 / 3) / 2)}


def test_recall_equals_sets_on_random_cases():
    rng = np.random.default_rng(5)
    results = np.array([rng.permutation(50)[:20] for _ in range(80)])
    relevant = [rng.permutation(50)[: rng.integers(0, 8)] for _ in range(80)]
    for k, found in metrics.recall_at_k(results, relevant, [1, 5, 20]).items():
        expected = [
            len(set(r[:k].tolist()) & set(t.tolist())) / len(t)
            for r, t in zip(results, relevant, strict=True)
            if len(t)
        ]
        assert found == pytest.approx(np.mean(expected), abs=1e-12)


def test_coverage_gini_and_mae_by_hand():
    assert metrics.coverage([[1, 2, -1], [2, 3, 3]], catalogue_size=6) == pytest.approx(3 / 6)
    assert metrics.gini([4, 4, 4, 4]) == pytest.approx(0)
    assert metrics.gini([0, 0, 0, 8]) == pytest.approx(3 / 4)
    assert metrics.mae([1, 5], [2, 2]) == pytest.approx((1 + 3) / 2)


def test_wrong_lengths_and_nan_are_refused():
    with pytest.raises(ValueError, match="3 labels but 2 scores"):
        metrics.auc([1, 0, 1], [0.1, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        metrics.gauc([1, 0], [0.1, np.nan], [1, 1])
    with pytest.raises(ValueError, match="recall@10 asked of 3"):
        metrics.recall_at_k([[1, 2, 3]], [[1]], [10])
