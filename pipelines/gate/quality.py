"""Rules about what the models say: is the ranker right, is retrieval, does either say too much to be honest?

N rows, Q queries, K returned.
"""

from __future__ import annotations

import numpy as np

from features.dataset import Dataset
from pipelines.evaluate_ranking import auc_gap, evaluate_tasks
from pipelines.evaluate_retrieval import popularity_recall, tower_recall
from pipelines.gate.config import GateConfig
from pipelines.gate.paired import compare, compare_gauc
from pipelines.gate.sides import Answers, Question
from pipelines.gate.verdict import Verdict
from pipelines.metrics import gini, normalised_entropy
from pipelines.replay.bootstrap import Resamples
from ranking.tasks import TASKS, task_labels

BASELINES = ("popularity", "factorisation machine")
"""Of `evaluate_protocol`; those that end in "+ undated" count, too."""


def ranking_rules(
    dataset: Dataset,
    question: Question,
    answers: Answers,
    validation_rows: np.ndarray,
    metrics: dict,
    config: GateConfig,
) -> list[Verdict]:
    """What the ranker must show by itself."""
    found, verdicts = [], []
    rows = question.rows_N
    for row in evaluate_tasks(dataset, rows, answers.tasks, answers.probability_NT, validation_rows):
        if "auc" not in row or row["positives"] < config.min_positives:
            continue
        found.append(row)
        label_N, logged = _labels(dataset, rows, row["task"])
        gap, error = auc_gap(label_N[logged], answers.of_task(row["task"])[logged], np.zeros(logged.sum()))
        slack = max(config.max_calibration_error, row["calibration_two_se"])
        verdicts += [
            Verdict(f"{row['task']}: AUC better than chance by two standard errors", row["auc"], 0.5 + 2 * error, None,
                    gap > 2 * error,
                    look_at="the labels the ranker was trained on, and whether its scores differ at all"),
            Verdict(f"{row['task']}: calibration within {slack:.2f} of 1", row["calibration"], 1.0, None,
                    abs(row["calibration"] - 1.0) <= slack,
                    look_at="the validation day that calibrated it, and whether each head has its own task"),
        ]  # fmt: skip
    return verdicts + _against_baselines(found, metrics, config)


def _against_baselines(found: list[dict], metrics: dict, config: GateConfig) -> list[Verdict]:
    gauc = next((row["gauc"] for row in found if row["task"] == "long_view"), None)
    known = {row["name"]: row["gauc"] for row in metrics["primary"] if row["name"].startswith(BASELINES)}
    if gauc is None or "popularity" not in known:
        return []
    floor = known["popularity"] + config.min_gauc_over_popularity
    best = max(known.values())
    ceiling = 1.0 - config.max_error_cut_over_baseline * (1.0 - best)
    return [
        Verdict("long_view: GAUC above popularity's", gauc, floor, None, gauc > floor,
                look_at="the labels the ranker was trained on; a count of long views does better"),
        Verdict("long_view: GAUC not too good to be true beside the best baseline", gauc, ceiling, None,
                gauc <= ceiling, f"the best baseline has {best:.4f}", look_at=_LEAK),
    ]  # fmt: skip


def ranking_against_live(
    dataset: Dataset,
    question: Question,
    candidate: Answers,
    live: Answers,
    live_metrics: dict,
    config: GateConfig,
) -> list[Verdict]:
    """The ranker beside the live one's on the same impressions."""
    recorded = {row["task"]: row.get("gauc") for row in live_metrics.get("ranking", [])}
    resamples, verdicts = Resamples(config.resamples, config.seed), []
    user_N = _user_ids(dataset, dataset.examples.user_row[question.rows_N])
    for task in candidate.tasks:
        label_N, logged = _labels(dataset, question.rows_N, task)
        y, users = label_N[logged], user_N[logged]
        if task not in live.tasks or min(y.sum(), (1 - y).sum()) < config.min_positives:
            continue
        ours, theirs = candidate.of_task(task)[logged], live.of_task(task)[logged]
        by_rank = compare_gauc(y, ours, theirs, users, resamples)
        by_loss = compare(users, _log_loss(y, ours), _log_loss(y, theirs), np.ones(len(y)), resamples)
        rise = config.max_log_loss_rise * by_loss.live
        # An input that has seen the label lifts the live bundle's answers, too: what it once showed counts as well.
        honest = min(by_rank.live, recorded.get(task) or 1.0)
        ceiling = 1.0 - config.max_error_cut * (1.0 - honest)
        verdicts += [
            Verdict(f"{task}: GAUC not below the live bundle's", by_rank.candidate,
                    by_rank.live - config.max_gauc_drop, by_rank.live,
                    not by_rank.difference.high < -config.max_gauc_drop, str(by_rank),
                    "what changed since the live bundle in labels, features and the ranker's training"),
            Verdict(f"{task}: log loss not above the live bundle's", by_loss.candidate, by_loss.live + rise,
                    by_loss.live, not by_loss.difference.low > rise, str(by_loss),
                    "calibration.json, and the days the ranker was trained on"),
            Verdict(f"{task}: GAUC not too good to be true beside the live bundle's", by_rank.candidate, ceiling,
                    honest, by_rank.candidate <= ceiling, look_at=_LEAK),
        ]  # fmt: skip
    return verdicts


def table_rules(
    dataset: Dataset, rows_N: np.ndarray, answers: Answers, floats_NT: np.ndarray, config: GateConfig
) -> list[Verdict]:
    """Coded tables beside the float tables they were made from, on the same rows (every row of `answers`)."""
    losses = {}
    for t, task in enumerate(answers.tasks):
        label_N, logged = _labels(dataset, rows_N, task)
        y = label_N[logged]
        if min(y.sum(), (1 - y).sum()) >= config.min_positives:
            coded, exact = answers.probability_NT[logged, t], floats_NT[logged, t]
            losses[task] = normalised_entropy(y, coded) - normalised_entropy(y, exact)
    if not losses:
        return []
    worst = max(losses, key=losses.__getitem__)
    return [
        Verdict("coded tables: normalised entropy over the float tables'", losses[worst], config.max_table_loss, None,
                losses[worst] <= config.max_table_loss, f"worst of {len(losses)} tasks: {worst}",
                "the recipe's `tables`: fewer bits than the embeddings bear")
    ]  # fmt: skip


def retrieval_rules(question: Question, answers: Answers, metrics: dict, config: GateConfig) -> list[Verdict]:
    """What retrieval must show by itself."""
    retrieval = metrics["retrieval"]
    k = retrieval["index_recall"]["k"]
    recall, floor = tower_recall(retrieval, k), popularity_recall(retrieval, k) * config.min_recall_over_popularity
    lists = len(np.unique(answers.top_QK[:, : question.k])) / question.k
    enough = min(config.min_lists, 0.5 * len(question.video_rows_R) / question.k, 0.5 * len(question.queries))
    return [
        Verdict("length of the shortest vector of a user or video", answers.shortest, _UNIT_LENGTH, None,
                answers.shortest >= _UNIT_LENGTH, look_at="the towers' weights: they say nothing of somebody"),
        Verdict(f"two-tower recall@{k} above {config.min_recall_over_popularity:g} x popularity", recall, floor, None,
                recall > floor, look_at="the towers' training loss, and metrics.json's retrieval rows"),
        Verdict(f"distinct videos in users' top {question.k}, in lists of {question.k}", lists, enough, None,
                lists >= enough, look_at="the towers' weights: users' vectors hardly differ"),
    ]  # fmt: skip


def retrieval_against_live(
    dataset: Dataset, question: Question, candidate: Answers, live: Answers, config: GateConfig
) -> list[Verdict]:
    """Recall, coverage and concentration beside the live bundle's on the same queries."""
    resamples, verdicts = Resamples(config.resamples, config.seed), []
    users = _user_ids(dataset, question.queries.user_row_Q)
    for k in question.ks:
        ours, theirs = (_recall(answers.top_QK[:, :k], question) for answers in (candidate, live))
        found = compare(users, ours, theirs, np.ones(len(users)), resamples)
        drop = config.max_recall_drop * found.live
        verdicts.append(
            Verdict(f"recall@{k} not below the live bundle's", found.candidate, found.live - drop, found.live,
                    not found.difference.high < -drop, str(found),
                    "the towers' training loss and what changed in their features")
        )  # fmt: skip
    (ours, our_gini), (theirs, their_gini) = (_spread(dataset, question, answers) for answers in (candidate, live))
    floor, ceiling = config.min_coverage_of_live * theirs, their_gini + config.max_gini_rise
    k = question.k
    return [
        *verdicts,
        Verdict(f"coverage: share of the videos in users' top {k}", ours, floor, theirs, ours >= floor,
                look_at="the towers: popular videos crowd out the rest (logQ correction, id dropout)"),
        Verdict(f"concentration: Gini of authors' places in users' top {k}", our_gini, ceiling, their_gini,
                our_gini <= ceiling, look_at="the towers' author embedding, and a change of the catalogue"),
    ]  # fmt: skip


_UNIT_LENGTH = 0.99
"""Vectors are normalised, so that a shorter one is no rounding."""
_LEAK = (
    "the inputs for one that knows the label: a counter or history that includes the impression itself, a column "
    "written after it"
)


def _labels(dataset: Dataset, rows_N: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and which of them were logged."""
    label_N = task_labels(dataset.examples.take(rows_N))[:, TASKS.index(task)].astype(np.float64)
    return label_N, ~np.isnan(label_N)


def _user_ids(dataset: Dataset, row_N: np.ndarray) -> np.ndarray:
    """Ids; users that the tables do not know are one."""
    return np.concatenate([[0], dataset.users.ids])[row_N]


def _log_loss(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def _recall(top_QK: np.ndarray, question: Question) -> np.ndarray:
    """(Q,) share of each query's relevant videos that was returned."""
    pairs = zip(question.queries.relevant, top_QK, strict=True)
    return np.array([np.isin(wanted, found).mean() for wanted, found in pairs])


def _spread(dataset: Dataset, question: Question, answers: Answers) -> tuple[float, float]:
    """(coverage of the videos, Gini over their authors) of users' first k."""
    shown = answers.top_QK[:, : question.k].ravel()
    author_R = np.unique(np.asarray(dataset.author_id)[question.video_rows_R], return_inverse=True)[1]
    places = np.bincount(author_R[shown], minlength=author_R.max() + 1)
    return len(np.unique(shown)) / len(question.video_rows_R), gini(places)
