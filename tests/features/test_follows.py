"""Follows are known strictly after they were made, one user at a time or many pairs at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from features.entities import Entities, SparseColumns
from features.follows import Follows, reported
from features.history import UNDATED_TS_MS
from features.schema import FOLLOWS

USERS = Entities(np.array([11, 22, 33]), np.zeros((4, 1), np.int32), np.zeros((4, 0), np.float32),
                 SparseColumns(("u",), (1,), (4,)))  # fmt: skip


def table(rows: list[tuple[int, int, int | None]]) -> pa.Table:
    return pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=FOLLOWS)


def events(rows: list[tuple[int, int | None, int, int | None]]) -> pa.Table:
    names = ("user_id", "author_id", "ts_ms", "follow")
    types = (pa.int64(), pa.int64(), pa.int64(), pa.int8())
    columns = zip(*rows, strict=True)
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, types, strict=True)})


def test_a_follow_counts_strictly_after_it_was_made_and_the_first_of_two_counts() -> None:
    rows = [(22, 7, 300), (22, 7, 100), (22, -(2**62), None), (99, 7, 1)]
    found = Follows.build(USERS, table(rows))
    assert found.of(2, 100).tolist() == [-(2**62)]
    assert found.of(2, 101).tolist() == [-(2**62), 7]
    assert found.of(1, 10**12).tolist() == []
    assert found.of(0, 10**12).tolist() == [], "nobody knows whom a stranger follows"


def test_many_pairs_at_once_answer_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rows = [(int(u), int(a), None if t < 100 else int(t)) for u, a, t in
            zip(rng.choice([11, 22, 33], 200), rng.integers(0, 40, 200) * 10**17, rng.integers(0, 1000, 200),
                strict=True)]  # fmt: skip
    found = Follows.build(USERS, table(rows))
    user, author, now = rng.integers(0, 4, 500), rng.integers(0, 45, 500) * 10**17, rng.integers(0, 1000, 500)
    expected = [a in found.of(u, t) for u, a, t in zip(user, author, now, strict=True)]
    assert found.at(user, author, now).tolist() == expected
    assert 0 < sum(expected) < 500


def test_without_a_table_the_events_say_who_follows_whom() -> None:
    found = Follows.build(
        USERS, reported(events([(11, 4, 50, 1), (11, 5, 60, 0), (22, None, 70, 1), (33, 6, 80, None)]))
    )
    assert found.author.tolist() == [4]
    assert found.at(np.array([1, 1]), np.array([4, 4]), np.array([50, 51])).tolist() == [False, True]


def test_an_impression_that_precedes_the_log_knows_of_no_follow(tmp_path: Path) -> None:
    found = Follows.build(USERS, table([(11, 7, None)]))
    found.save(tmp_path)
    asked = (np.array([1, 1]), np.array([7, 7]), np.array([UNDATED_TS_MS, 0]))
    assert Follows.load(tmp_path).at(*asked).tolist() == [False, True]
