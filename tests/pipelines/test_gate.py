"""The gate says no to what is worse, and both numbers with it."""

from __future__ import annotations

from copy import deepcopy

from pipelines.gate import judge, passed
from pipelines.recipes import GateConfig

GOOD = {
    "fingerprint": "f",
    "retrieval": {
        "index_recall": {"k": 100, "of_exact": 0.99},
        "rows": [
            {"name": "two towers, exact", "recall@100": 0.30},
            {"name": "popularity, whole log", "recall@100": 0.10},
        ],
    },
    "ranking": [
        {"task": "click", "positives": 5000, "auc": 0.75, "calibration": 1.02, "calibration_two_se": 0.028},
        {"task": "hate", "positives": 4},
    ],
}


def broken(metrics: dict, live: dict | None = None) -> list[str]:
    return [v.rule for v in judge(metrics, live, GateConfig()) if not v.passed]


def test_a_sound_candidate_passes_and_tasks_without_positives_are_not_judged():
    assert passed(judge(GOOD, None, GateConfig()))


def test_retrieval_below_popularity_is_refused():
    bad = deepcopy(GOOD)
    bad["retrieval"]["rows"][0]["recall@100"] = 0.09
    verdict = next(v for v in judge(bad, None, GateConfig()) if not v.passed)
    assert (verdict.candidate, verdict.bound) == (0.09, 0.10)


def test_a_lossy_index_a_miscalibrated_head_and_a_constant_score_are_refused():
    bad = deepcopy(GOOD)
    bad["retrieval"]["index_recall"]["of_exact"] = 0.5
    bad["ranking"][0] |= {"calibration": 1.4, "auc": 0.5}
    assert broken(bad) == [
        "index returns the exact top 100",
        "click: calibration within 0.15 of 1",
        "click: better than chance",
    ]


def test_the_live_bundle_counts_on_the_same_data_only():
    worse = deepcopy(GOOD)
    worse["ranking"][0]["auc"] = 0.70
    assert broken(worse, live=GOOD) == ["click: AUC against the live bundle"]
    assert broken(worse, live=GOOD | {"fingerprint": "other days"}) == []
