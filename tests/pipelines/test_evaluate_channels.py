"""What a channel brings: figures that can be checked by eye on three users and two sources."""

from __future__ import annotations

import numpy as np
import pytest

from candidate_gen.blend import BlendConfig, Quota
from candidate_gen.sources import Retrieved
from pipelines.evaluate_channels import Answers, evaluate_channels
from pipelines.evaluate_retrieval import Queries

HOUR_MS, NOW_MS = 3_600_000, 1_700_000_000_000
CONFIG = BlendConfig(k=4, quotas=(Quota(source="ann", share=0.5), Quota(source="popular", share=0.5)))


def retrieved(*rows: int) -> Retrieved:
    return Retrieved(np.array(rows, np.int64), np.ones(len(rows), np.float32))


@pytest.fixture
def answers() -> Answers:
    """Rows 1 .. 9 are old, row 10 is an hour old, row 11 comes in an hour, row 12 has no upload time."""
    upload_ts_ms = np.full(13, NOW_MS - 100 * HOUR_MS)
    upload_ts_ms[[10, 11, 12]] = NOW_MS - HOUR_MS, NOW_MS + HOUR_MS, -1
    queries = Queries(
        user_row_Q=np.array([1, 2, 3]),
        ts_ms_Q=np.full(3, NOW_MS),
        day_Q=np.zeros(3, np.int64),
        surface_Q=np.zeros(3, np.int64),
        relevant=[np.array([1, 5]), np.array([2, 10, 11]), np.array([11])],
        cold=[np.zeros(0, np.int64), np.array([10]), np.zeros(0, np.int64)],
        seen=[np.arange(9), np.zeros(0, np.int64), np.arange(40)],
    )
    return Answers(
        queries=queries,
        retrieved=[
            {"ann": retrieved(1, 2, 3, 4), "popular": retrieved(5, 6, 7, 8)},
            {"ann": retrieved(10, 2, 3, 4), "popular": retrieved(2, 5, 6, 7)},
            {"ann": retrieved(1, 2, 3, 4), "popular": retrieved(5, 6, 7, 8)},
        ],
        followed=[np.zeros(0, np.int64)] * 3,
        author_id=np.zeros(13, np.int64),
        upload_ts_ms=upload_ts_ms,
    )


def test_relevant_is_what_was_uploaded_by_then(answers: Answers) -> None:
    assert [rows.tolist() for rows in answers.relevant()] == [[1, 5], [2, 10], []]
    assert [rows.tolist() for rows in answers.relevant(oldest_h=24.0)] == [[], [10], []]


def test_recall_alone_marginal_and_unique_by_hand(answers: Answers) -> None:
    """Pools: {1, 2, 5, 6} and {10, 2, 5, 6}; without popular {1, 2, 3, 4} and {10, 2, 3, 4}; without ann {5, 6, 7, 8}
    and {2, 5, 6, 7}. The third user's positive is not there yet, so two users count."""
    found = evaluate_channels(answers, CONFIG)
    assert found["pools"][0] == {"slice": "all", "queries": 2, "pool recall": (2 / 2 + 2 / 2) / 2}
    ann, popular = (row for row in found["rows"] if row["slice"] == "all")
    assert ann == {
        "slice": "all",
        "source": "ann",
        "quota": 0.5,
        "filled": 0.5,
        "alone": (1 / 2 + 2 / 2) / 2,
        "marginal": 1.0 - (1 / 2 + 1 / 2) / 2,
        "unique": (1 / 2 + 1 / 2) / 2,  # 1 of the first user; 10, and not 2, of the second
    }
    assert (popular["alone"], popular["marginal"], popular["unique"]) == (
        (1 / 2 + 1 / 2) / 2,
        1.0 - (1 / 2 + 2 / 2) / 2,
        (1 / 2 + 0 / 2) / 2,
    )


def test_slices_ask_their_own_question(answers: Answers) -> None:
    pools = {pool["slice"]: pool for pool in evaluate_channels(answers, CONFIG)["pools"]}
    assert pools["videos under 24 h"] == {"slice": "videos under 24 h", "queries": 1, "pool recall": 1.0}
    new_users = pools["users with fewer than 10 views"]
    assert (new_users["queries"], new_users["pool recall"]) == (2, 1.0)  # 9 and 0 views; the third user had 40
