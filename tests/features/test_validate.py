"""What validation promises: no row is lost, a bad row says why, a table of the wrong shape is refused by column."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import EVENTS, LIMITS, SIGNALS, TABLES
from features.validate import DAY_MS, EARLIEST_TS_MS, SchemaError, count_exact_duplicates, validate

NOW_MS = 1_700_000_000_000
EVENT = {
    "request_id": "r",
    "user_id": 1,
    "video_id": 2,
    "ts_ms": NOW_MS,
    "watch_ms": 900,
    "duration_ms": 1000,
    "like": 0,
}


def events(*changes: dict) -> pa.Table:
    rows = [{**EVENT, **change} for change in changes]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


BROKEN = [
    ("user_id is null", {"user_id": None}),
    ("video_id is null", {"video_id": None}),
    ("request_id is null", {"request_id": None}),
    ("ts_ms is null", {"ts_ms": None}),
    ("ts_ms is outside 2005-01-01 to tomorrow", {"ts_ms": NOW_MS // 1000}),
    ("ts_ms is outside 2005-01-01 to tomorrow", {"ts_ms": NOW_MS + DAY_MS + 1}),
    ("watch_ms is negative", {"watch_ms": -1}),
    ("watch_ms is longer than 24 hours", {"watch_ms": DAY_MS + 1}),
    ("duration_ms is zero or negative", {"duration_ms": 0}),
    ("duration_ms is zero or negative", {"duration_ms": -5}),
    ("like is not 0, 1 or null", {"like": 300}),
    ("like is not 0, 1 or null", {"like": -1}),
    ("propensity is outside (0, 1]", {"propensity": 0.0}),
    ("propensity is outside (0, 1]", {"propensity": 1.01}),
    ("propensity is not finite", {"propensity": math.nan}),
    ("propensity is not finite", {"propensity": math.inf}),
    ("slot is outside 0 to 2**31-1", {"slot": -1}),
    ("slot is outside 0 to 2**31-1", {"slot": 2**31}),
]


@pytest.mark.parametrize(("reason", "change"), BROKEN)
def test_a_row_that_breaks_one_rule_is_set_aside_under_that_reason(reason: str, change: dict) -> None:
    split = validate("events", events({}, change, {"user_id": 3}), now_ms=NOW_MS)
    assert split.good["user_id"].to_pylist() == [1, 3]
    assert split.counts == {reason: 1}
    assert split.quarantined["reason"].to_pylist() == [reason]
    [(name, value)] = change.items()
    set_aside = split.quarantined[name].to_pylist()[0]
    assert set_aside == value or (math.isnan(value) and math.isnan(set_aside))
    assert split.kept.tolist() == [True, False, True]


def test_the_edges_of_every_rule_are_good() -> None:
    edges = [
        {"ts_ms": EARLIEST_TS_MS}, {"ts_ms": NOW_MS + DAY_MS}, {"watch_ms": 0}, {"watch_ms": DAY_MS},
        {"duration_ms": 1}, {"like": 1}, {"like": None},
        {"propensity": 1.0}, {"propensity": 1e-9}, {"slot": 0}, {"duration_ms": None},
        {"watch_ms": None}, {"user_id": -(2**63)}, {"user_id": 2**63 - 1},
    ]  # fmt: skip
    split = validate("events", events(*edges), now_ms=NOW_MS)
    assert split.counts == {}
    assert len(split.good) == len(edges)
    assert split.good.schema.equals(pa.schema([pa.field(f.name, f.type) for f in EVENTS]))
    assert split.good["user_id"].to_pylist()[-2:] == [-(2**63), 2**63 - 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "user_id": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
                "watch_ms": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(-2, 2)),
                "like": st.one_of(st.none(), st.integers(-1, 2)),
                "propensity": st.one_of(st.none(), st.floats()),
            }
        ),
        max_size=12,
    )
)
def test_every_row_is_either_good_or_set_aside_whatever_comes(rows: list[dict]) -> None:
    columns = {name: pa.array([row[name] for row in rows], pa.int64()) for name in ("user_id", "watch_ms", "like")}
    columns["propensity"] = pa.array([row["propensity"] for row in rows], pa.float64())
    same = {"request_id": ["r"] * len(rows), "video_id": pa.array([1] * len(rows), pa.int64())}
    table = pa.table({**columns, **same, "ts_ms": pa.array([NOW_MS] * len(rows), pa.int64())})
    split = validate("events", table, now_ms=NOW_MS)
    assert len(split.good) + len(split.quarantined) == len(rows)
    assert sum(split.counts.values()) == len(split.quarantined)
    expected = [
        row["user_id"] is not None
        and (row["watch_ms"] is None or 0 <= row["watch_ms"] <= DAY_MS)
        and row["like"] in (None, 0, 1)
        and (row["propensity"] is None or 0 < row["propensity"] <= 1)
        for row in rows
    ]
    assert split.kept.tolist() == expected


def test_the_first_of_a_repeated_video_or_user_is_kept() -> None:
    videos = pa.table(
        {"video_id": [7, 8, 7, 9, 9], "eligible": [True, True, True, None, True], "music_id": [1, 2, 3, 4, 5]}
    )
    split = validate("videos", videos)
    assert split.good["music_id"].to_pylist() == [1, 2, 5]
    assert split.counts == {"video_id was already seen": 1, "eligible is null": 1}
    later = validate("videos", videos.slice(0, 2), seen=np.array([8], dtype=np.int64))
    assert later.good["video_id"].to_pylist() == [7]
    users = validate("users", pa.table({"user_id": [1, 1], "country": ["de", "fr"]}))
    assert users.good.to_pylist() == [{"user_id": 1, "country": "de"}]


def test_exact_duplicates_are_counted_and_kept() -> None:
    table = events({}, {"request_id": "s"}, {"video_id": 3}, {"request_id": "t"})
    split = validate("events", table, now_ms=NOW_MS)
    assert len(split.good) == 4
    assert count_exact_duplicates(split.good) == 2


def test_content_must_be_finite_and_of_one_width() -> None:
    videos = pa.table(
        {
            "video_id": [1, 2, 3, 4, 5],
            "eligible": [True] * 5,
            "content": [[1.0, 2.0], [1.0, math.nan], [3.0], None, [4.0, 5.0]],
            "tags": [[1], [2], [], None, [3, None]],
        }
    )
    split = validate("videos", videos)
    assert split.good["video_id"].to_pylist() == [1, 4]
    assert split.counts == {"content is not finite": 1, "content is not as wide as most": 1, "tags holds a null": 1}


def test_a_video_whose_limits_cannot_be_read_is_set_aside_and_never_shown_without_them() -> None:
    faults = {
        "min_age is outside 0 to 130": [{"min_age": -1}, {"min_age": 131}, {"min_age": 2**40}],
        "safety_level is outside 0 to 9": [{"safety_level": -1}, {"safety_level": 10}, {"safety_level": 300}],
        "available_until_ms is not after available_from_ms": [
            {"available_from_ms": NOW_MS, "available_until_ms": NOW_MS - step} for step in (0, 1)
        ],
        "available_from_ms is outside the years 2005 to 9999": [{"available_from_ms": NOW_MS // 1000}],
        "available_until_ms is outside the years 2005 to 9999": [{"available_until_ms": 2**62}],
        "language is empty": [{"language": " "}],
        "regions holds an empty name": [{"regions": ["de", ""]}],
        "regions holds a null": [{"regions": ["de", None]}],
    }
    sound = [
        {},
        {"min_age": 0, "safety_level": 0},
        {"min_age": 130, "safety_level": 9, "language": "pt-BR", "regions": ["DE", "fr"]},
        {"available_from_ms": NOW_MS + 400 * DAY_MS, "regions": []},
        {"available_from_ms": NOW_MS, "available_until_ms": NOW_MS + 1},
    ]
    rows = [*sound, *(row for of_reason in faults.values() for row in of_reason)]
    wide = dict(zip([field.name for field in LIMITS], [None, None, pa.int64(), pa.int64(), None, None], strict=True))
    table = pa.table(
        {
            "video_id": range(len(rows)),
            "eligible": [True] * len(rows),
            **{
                field.name: pa.array([row.get(field.name) for row in rows], wide[field.name] or field.type)
                for field in LIMITS
            },
        }
    )
    split = validate("videos", table, now_ms=NOW_MS)
    assert split.good["video_id"].to_pylist() == list(range(len(sound)))
    assert split.counts == {reason: len(of_reason) for reason, of_reason in faults.items()}
    without = validate("videos", table.select(["video_id", "eligible"])).good
    assert all(without[field.name].null_count == len(rows) for field in LIMITS)


def test_a_request_without_candidates_is_set_aside() -> None:
    table = pa.table({"request_id": ["a", "b"], "user_id": [1, 1], "ts_ms": [NOW_MS] * 2, "video_ids": [[1], []]})
    split = validate("candidates", table, now_ms=NOW_MS)
    assert split.good["request_id"].to_pylist() == ["a"]
    assert split.counts == {"video_ids is empty": 1}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"user_id": [1]}), ["log.csv", "events lacks the required column request_id", "found: user_id"]),
        (events({"watch_ms": "900"}), ["log.csv: events.watch_ms is string, expected int64", "cast it"]),
        (events({"watch_ms": 1.5}), ["events.watch_ms is double, expected int64"]),
        (events({"mood": 1}), ["does not know: mood"]),
        (events({}).set_column(1, "user_id", pa.array([2**63], pa.uint64())), ["unsigned ids above"]),
    ],
)
def test_a_table_of_the_wrong_shape_names_file_column_and_cure(table: pa.Table, words: list[str]) -> None:
    with pytest.raises(SchemaError) as refusal:
        validate("events", table, file="log.csv")
    for word in words:
        assert word in str(refusal.value)


def test_types_widen_where_nothing_is_lost_and_missing_signals_are_null_not_zero() -> None:
    narrow = events({}).set_column(1, "user_id", pa.array([1], pa.int32()))
    narrow = narrow.set_column(0, "request_id", pa.array(["r"]).dictionary_encode())
    good = validate("events", narrow, now_ms=NOW_MS).good
    assert good.schema.field("user_id").type == pa.int64()
    assert [good[signal].to_pylist() for signal in SIGNALS if signal != "like"] == [[None]] * (len(SIGNALS) - 1)


@pytest.mark.parametrize("name", TABLES)
def test_an_empty_table_of_any_kind_is_good(name: str) -> None:
    split = validate(name, TABLES[name].empty_table())
    assert len(split.good) == len(split.quarantined) == 0
    assert isinstance(split.kept, np.ndarray)
