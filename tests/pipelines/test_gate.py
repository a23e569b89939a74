"""The gate's figures and rules, on answers whose quality is known because it was made."""

from __future__ import annotations

import math

import numpy as np
import pytest

from features.dataset import Dataset
from pipelines.gate import GateConfig, Verdict, passed, refusal, to_rows
from pipelines.gate.paired import compare, compare_gauc
from pipelines.gate.quality import ranking_against_live, ranking_rules, retrieval_against_live, table_rules
from pipelines.gate.sides import Answers, Question
from pipelines.gate.soundness import unseen_days
from pipelines.metrics import auc_by_group, gauc
from pipelines.recipes import Split
from pipelines.replay.bootstrap import Resamples
from ranking.tasks import TASKS, task_labels

CONFIG = GateConfig(min_positives=100)
METRICS = {"primary": [{"name": "popularity", "gauc": 0.55}, {"name": "factorisation machine", "gauc": 0.6}]}


@pytest.fixture(scope="module")
def dataset(toy_task) -> Dataset:
    return Dataset.load(toy_task.folder)


@pytest.fixture(scope="module")
def question(dataset: Dataset) -> Question:
    return Question.draw(dataset, dataset.dates[-2:], "long_view", (5, 20), CONFIG)


def answers(dataset: Dataset, question: Question, *, skill: float, seed: int = 0, shift: float = 0.0) -> Answers:
    """A ranker that knows so much of each label, calibrated but for `shift` of the log-odds; retrieval likewise."""
    rng = np.random.default_rng(seed)
    label_NT = np.nan_to_num(task_labels(dataset.examples.take(question.rows_N)))
    probability_NT = np.empty(label_NT.shape)
    for t, y in enumerate(label_NT.T):
        rate = np.clip(y.mean(), 0.01, 0.99)
        # Two normals a distance `skill` apart: the log-odds of their mixture are linear, so this is calibrated.
        x = skill * y + rng.normal(size=len(y))
        odds = math.log(rate / (1 - rate)) + skill * (x - skill / 2) + shift
        probability_NT[:, t] = 1 / (1 + np.exp(-odds))
    score_QR = rng.normal(size=(len(question.queries), len(question.video_rows_R)))
    for q, wanted in enumerate(question.queries.relevant):
        score_QR[q, wanted] += skill
    return Answers(TASKS, probability_NT, np.argsort(-score_QR, axis=1)[:, : max(question.ks)])


def broken(verdicts: list[Verdict]) -> list[str]:
    return [v.rule for v in verdicts if not v.passed]


def beside(dataset: Dataset, question: Question, candidate: Answers, live: Answers, recorded: dict | None = None):
    return [
        *ranking_against_live(dataset, question, candidate, live, recorded or {}, CONFIG),
        *retrieval_against_live(dataset, question, candidate, live, CONFIG),
    ]


def test_the_auc_of_each_group_is_that_of_its_pairs():
    labels, scores, groups = [1, 0, 1, 1, 0, 0], [0.9, 0.1, 0.2, 0.5, 0.5, 0.7], [7, 7, 7, 9, 9, 11]
    found = auc_by_group(labels, scores, groups)
    assert found.group_G.tolist() == [7, 9, 11]
    np.testing.assert_allclose(found.auc_G, [(1 + 1) / 2, 0.5, np.nan])
    assert gauc(labels, scores, groups) == (2 * 1.0 + 1 * 0.5) / 3


def test_the_difference_is_resampled_by_user_and_for_both_bundles_alike():
    rng = np.random.default_rng(3)
    user_N = rng.integers(0, 300, 4_000)
    hard_U = rng.normal(0, 5, 300)  # what both bundles share cancels
    live_N = hard_U[user_N] + rng.normal(size=4_000)
    candidate_N, weight_N = live_N - 0.1 + 0.3 * rng.normal(size=4_000), rng.random(4_000)
    resamples = Resamples(400, seed=1)
    found = compare(user_N, candidate_N, live_N, weight_N, resamples)
    assert found.candidate == pytest.approx(np.average(candidate_N, weights=weight_N))
    counts_UB = resamples.counts(np.arange(300)).astype(np.float64)
    drawn = []
    for b in range(400):
        weights = weight_N * counts_UB[user_N, b]
        drawn.append(np.average(candidate_N, weights=weights) - np.average(live_N, weights=weights))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high))
    alone = compare(user_N, live_N, np.zeros(4_000), weight_N, resamples).difference
    assert high - low < 0.1 * (alone.high - alone.low)


def test_gauc_compares_users_who_have_both_classes_weighted_by_their_positives():
    y = np.array([1, 0, 1, 1, 0, 1, 0, 0])
    users = np.array([5, 5, 5, 6, 6, 8, 9, 9])
    ours, theirs = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.5, 0.1, 0.2]), np.full(8, 0.5)
    found = compare_gauc(y, ours, theirs, users, Resamples(50, seed=1))
    assert (found.candidate, found.live) == ((2 * 1.0 + 1 * 0.0) / 3, 0.5)


def test_an_equal_candidate_is_not_refused_and_a_worse_one_is_with_both_numbers(dataset: Dataset, question: Question):
    live = answers(dataset, question, skill=1.0)
    assert broken(beside(dataset, question, live, live)) == []
    worse = beside(dataset, question, answers(dataset, question, skill=-0.2, seed=1), live)
    verdict = next(v for v in worse if v.rule == "click: GAUC not below the live bundle's")
    assert not verdict.passed
    assert verdict.candidate < verdict.bound == verdict.live - CONFIG.max_gauc_drop
    text = refusal(worse)
    assert (
        f"{verdict.rule}: found {verdict.candidate:.4f}, wanted {verdict.bound:.4f}, live has {verdict.live:.4f}"
        in text
    )
    assert "look at what changed since the live bundle" in text
    assert "recall@20 not below the live bundle's" in broken(worse)


def test_other_probabilities_in_the_same_order_are_refused_by_log_loss_alone(dataset: Dataset, question: Question):
    live, promising = (answers(dataset, question, skill=1.0, shift=shift) for shift in (0.0, 1.0))
    verdicts = beside(dataset, question, promising, live)
    assert {rule.split(": ")[1] for rule in broken(verdicts)} == {"log loss not above the live bundle's"}


def test_what_is_too_good_to_be_true_is_refused_also_where_live_profits_from_the_leak(
    dataset: Dataset, question: Question
):
    live, leaking = (answers(dataset, question, skill=skill) for skill in (1.0, 4.0))
    rule = "click: GAUC not too good to be true beside the live bundle's"
    assert rule in broken(beside(dataset, question, leaking, live))
    assert rule not in broken(beside(dataset, question, leaking, leaking))
    assert rule in broken(beside(dataset, question, leaking, leaking, {"ranking": [{"task": "click", "gauc": 0.75}]}))
    alone = ranking_rules(dataset, question, leaking, dataset.rows_on(dataset.dates[:1]), METRICS, CONFIG)
    assert "long_view: GAUC not too good to be true beside the best baseline" in broken(alone)


def test_a_ranker_must_beat_chance_and_popularity_and_mean_what_it_says(dataset: Dataset, question: Question):
    validation = dataset.rows_on(dataset.dates[:1])
    good, chance, shifted = (
        ranking_rules(dataset, question, answers(dataset, question, skill=s, shift=shift), validation, METRICS, CONFIG)
        for s, shift in ((1.0, 0.0), (0.0, 0.0), (1.0, 1.5))
    )
    assert broken(good) == []
    assert "long_view: GAUC above popularity's" in broken(chance)
    assert "click: AUC better than chance by two standard errors" in broken(chance)
    assert any(rule.startswith("click: calibration within") for rule in broken(shifted))


def test_one_list_for_everybody_costs_coverage_and_an_author_who_has_it_all_is_noticed(
    dataset: Dataset, question: Question
):
    live = answers(dataset, question, skill=1.0)
    same = Answers(TASKS, live.probability_NT, np.tile(live.top_QK[:1], (len(live.top_QK), 1)))
    rules = broken(retrieval_against_live(dataset, question, same, live, CONFIG))
    assert "coverage: share of the videos in users' top 5" in rules
    author_R = np.asarray(dataset.author_id)[question.video_rows_R]
    favourite = np.bincount(np.unique(author_R, return_inverse=True)[1]).argmax()
    by_author = np.argsort(author_R != np.unique(author_R)[favourite], kind="stable")
    one = Answers(TASKS, live.probability_NT, np.tile(by_author[: max(question.ks)], (len(live.top_QK), 1)))
    rules = broken(retrieval_against_live(dataset, question, one, live, CONFIG))
    assert "concentration: Gini of authors' places in users' top 5" in rules


def test_coded_tables_are_held_against_the_float_ones(dataset: Dataset, question: Question):
    good, coarse = (answers(dataset, question, skill=skill) for skill in (1.0, 0.8))
    assert broken(table_rules(dataset, question.rows_N, good, good.probability_NT, CONFIG)) == []
    assert len(broken(table_rules(dataset, question.rows_N, coarse, good.probability_NT, CONFIG))) == 1


def test_only_days_after_the_live_bundles_own_are_compared():
    split = Split(train=("2026-01-03",), validation=("2026-01-04",), test=("2026-01-05", "2026-01-06"))

    def unseen(*validation: str):
        return unseen_days(split, {"split": {"train": ["2026-01-01"], "validation": list(validation)}})

    assert unseen("2026-01-04")[0] == split.test
    assert unseen("2026-01-05")[0] == ("2026-01-06",)
    days, verdict = unseen("2026-01-06")
    assert days == ()
    assert not verdict.passed
    assert "its last one is 2026-01-06" in verdict.note


def test_verdicts_are_json_without_nan():
    rows = to_rows([Verdict("r", float("nan"), np.float32(0.5), None, bool(np.bool_(True)))])
    assert rows[0]["candidate"] is None
    assert rows[0]["bound"] == 0.5
    assert passed([Verdict("r", 1.0, 1.0, None, True)])
