"""Retrieval is measured on what was unseen and known at the query; the cold slice on what was a day old at most."""

from __future__ import annotations

import numpy as np
import pytest

from features.schema import SIGNALS
from pipelines.evaluate_retrieval import COLD_MS, Queries, exact_top, make_queries, method_row
from tests.candidate_gen.conftest import DATES, planted_uploads


@pytest.fixture(scope="module")
def dataset():
    return planted_uploads()[0]


@pytest.fixture(scope="module")
def queries(dataset) -> Queries:
    return make_queries(dataset, DATES[2:], "long_view")


def test_a_query_wants_the_days_positives_that_its_user_had_not_seen(dataset, queries: Queries) -> None:
    e, wanted = dataset.examples, 0
    assert len(queries) > 100
    for q in range(len(queries)):
        of_user = np.flatnonzero((e.user_row == queries.user_row_Q[q]) & (e.video_row > 0))
        today = of_user[e.day[of_user] == queries.day_Q[q]]
        assert queries.ts_ms_Q[q] == e.ts_ms[today].min()
        before = set(e.video_row[of_user[e.ts_ms[of_user] < queries.ts_ms_Q[q]]].tolist())
        assert set(queries.seen[q].tolist()) == before
        liked = e.video_row[today[e.signals[today, SIGNALS.index("long_view")] == 1]]
        expected = {v for v in liked.tolist() if dataset.eligible[v]} - before
        assert set(queries.relevant[q].tolist()) == expected
        wanted += len(expected)
    assert wanted > 200


def test_the_cold_slice_is_what_was_there_for_less_than_24_hours(dataset, queries: Queries) -> None:
    cold = later = old = 0
    for q in range(len(queries)):
        age_ms = queries.ts_ms_Q[q] - dataset.upload_ts_ms[queries.relevant[q]]
        assert set(queries.cold[q].tolist()) == set(queries.relevant[q][(age_ms >= 0) & (age_ms < COLD_MS)].tolist())
        cold, later, old = cold + len(queries.cold[q]), later + (age_ms < 0).sum(), old + (age_ms >= COLD_MS).sum()
    assert min(cold, later, old) > 20


def test_a_row_counts_recall_of_all_and_of_the_cold_alone() -> None:
    queries = Queries(
        user_row_Q=np.array([1, 2]),
        ts_ms_Q=np.zeros(2, np.int64),
        day_Q=np.zeros(2, np.int64),
        surface_Q=np.zeros(2, np.int64),
        relevant=[np.array([3, 4]), np.array([5, 6, 7, 8])],
        cold=[np.array([4]), np.zeros(0, np.int64)],
        seen=[np.zeros(0, np.int64)] * 2,
    )
    top_QK = np.array([[3, 9, 4], [5, 6, 1]])
    row = method_row("some", top_QK, queries, (2, 3), 10)
    assert row["recall@2"] == (1 / 2 + 2 / 4) / 2
    assert row["recall@3"] == (2 / 2 + 2 / 4) / 2
    assert (row["cold@2"], row["cold@3"]) == (0.0, 1.0)
    assert row["coverage"] == 4 / 10  # 3 9 5 6
    nothing = Queries(**{**{f: getattr(queries, f) for f in Queries.__slots__}, "cold": [np.zeros(0, np.int64)] * 2})
    assert method_row("some", top_QK, nothing, (2,), 10)["cold@2"] is None


def test_the_exact_top_holds_the_best_eligible_videos_the_user_had_not_seen(dataset, queries: Queries) -> None:
    rng, n = np.random.default_rng(3), len(dataset.videos) + 1
    vectors, users = rng.normal(size=(n, 5)), rng.normal(size=(len(queries), 5))
    top = exact_top(vectors, users, queries, dataset.eligible, 20)
    for q in range(len(queries)):
        allowed = np.setdiff1d(np.flatnonzero(dataset.eligible), queries.seen[q])
        assert top[q].tolist() == allowed[np.argsort(-(vectors[allowed] @ users[q]))][:20].tolist()
