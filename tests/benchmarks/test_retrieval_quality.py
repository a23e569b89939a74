"""The ablation table changes one thing a row, and its intervals resample users, not queries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.retrieval_quality import MAIN, Scores, covisit_top, variants
from candidate_gen.model import TowerConfig
from features.dataset import Dataset
from pipelines.evaluate_retrieval import Queries, make_queries
from tests.candidate_gen.conftest import DATES, planted_dataset


@pytest.mark.parametrize("n_eligible", [100, 10**6])
def test_every_row_differs_from_its_reference_in_one_setting(n_eligible: int) -> None:
    base = TowerConfig()
    made = variants(base, n_eligible)
    assert made[MAIN] == base
    assert ("sampled softmax" in made) == (n_eligible == 100)
    for name, config in made.items():
        if name == MAIN:
            continue
        changed = {field for field, value in asdict(config).items() if value != getattr(base, field)}
        assert len(changed - {"full_softmax_up_to"}) == (name != "sampled softmax")
        assert ("full_softmax_up_to" in changed) == name.startswith("sampled")


def queries_of(user_row: list[int]) -> Queries:
    n = len(user_row)
    zeros, none = np.zeros(n, np.int64), np.zeros(0, np.int64)
    return Queries(np.array(user_row), zeros, zeros, zeros, [np.array([1])] * n, [none] * n, [none] * n)


def test_an_interval_comes_from_users_with_all_their_queries() -> None:
    # 200 users with 10 queries each; a user's queries agree. The main row finds video 1 for users below 120, the other
    # for users below 100: .6 less .5. Users being the unit, the difference's error is sqrt(.1 * .9 / 200) = .0212.
    user = np.repeat(np.arange(200), 10)
    eligible = np.ones(50, bool)
    scores = Scores(cast(Dataset, type("Eligible", (), {"eligible": eligible})()), queries_of(user.tolist()), (1,))
    scores.add(MAIN, np.where(user < 120, 1, 2)[:, None])
    scores.add("other", np.where(user < 100, 1, 2)[:, None])
    found: dict[str, Any] = next(d for d in scores.differences() if d["name"] == "other")
    assert abs(found["less"] - 0.1) < 1e-9
    assert abs((found["high"] - found["low"]) / (2 * 1.96 * 0.0212) - 1) < 0.15
    assert found["low"] < 0.1 < found["high"]


def test_co_visitation_answers_with_unseen_eligible_videos_of_the_users_kind() -> None:
    dataset, user_topic, video_topic = planted_dataset()
    queries = make_queries(dataset, DATES[3:], "long_view")
    top = covisit_top(dataset, queries, int(queries.ts_ms_Q.min()), 20)
    assert (top > 0).mean() > 0.3  # 18 training events a user make few pairs
    for q in range(len(queries)):
        shown = top[q][top[q] > 0]
        assert len(np.unique(shown)) == len(shown)
        assert dataset.eligible[shown].all()
        assert not np.isin(shown, queries.seen[q]).any()
    right = video_topic[top] == user_topic[queries.user_row_Q][:, None]
    assert right[top > 0].mean() > 0.6  # five topics: chance is 0.2
