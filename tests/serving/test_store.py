"""The event log: durable once acknowledged, each impression once, joined with what the slate promised."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from features.schema import EVENTS, SESSION_CANDIDATES, SIGNALS
from serving.export import export_events
from serving.messages import Event, LogOutcome
from serving.records import NOTHING_KNOWN, ServedRow, Shortlist
from serving.store import SqliteStore, StoreConfig

USER, VIDEO, AUTHOR = 2**60 + 1, 2**58 + 7, -(2**59)
T_MS = 1_700_000_000_000


def event(slot: int, *, request_id: str = "r1", ts_ms: int = T_MS, user_id: int = USER, **feedback) -> Event:
    signals = {name: value for name, value in feedback.items() if name in SIGNALS}
    rest = {name: value for name, value in feedback.items() if name not in SIGNALS}
    fields = {"video_id": VIDEO + slot, "author_id": AUTHOR, "duration_ms": 10_000, **rest}
    return Event(request_id=request_id, slot=slot, user_id=user_id, ts_ms=ts_ms, signals=signals, **fields)


def served(slot: int, propensity: float, request_id: str = "r1", user_id: int = USER) -> ServedRow:
    return ServedRow(request_id, slot, user_id, VIDEO + slot, T_MS - 5, "main", "ann", False, "p1", propensity, "v1")


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(tmp_path / "log" / "events.sqlite")
    yield store
    store.close()


def log(store: SqliteStore, *events: Event) -> LogOutcome:
    return store.log_events(events).result(timeout=10)


def test_an_acknowledged_event_is_in_the_state_and_in_the_reopened_store(tmp_path):
    path = tmp_path / "events.sqlite"
    store = SqliteStore(path)
    assert log(store, event(0, like=True, click=False, watch_ms=5_000)) == LogOutcome(1, 0, 0)
    before = store.user(USER)
    store.close()
    after = SqliteStore(path)
    try:
        for state in (before, after.user(USER)):
            assert state.video_id_E.tolist() == [VIDEO]
            assert state.ts_ms_E.tolist() == [T_MS]
            assert state.signals_E.tolist() == [1 << SIGNALS.index("like")]
            assert state.watch_fraction_E.tolist() == [0.5]
            assert state.seen_ids.tolist() == [VIDEO]
        assert after.user(USER + 1) is NOTHING_KNOWN
    finally:
        after.close()


def test_a_resent_event_counts_once_and_later_feedback_is_added_to_it(store):
    assert log(store, event(0, click=True, watch_ms=4_000)) == LogOutcome(1, 0, 0)
    assert log(store, event(0, click=True, watch_ms=4_000)) == LogOutcome(0, 1, 0)
    assert log(store, event(0, click=False, like=True, watch_ms=9_000)) == LogOutcome(0, 1, 0)
    state = store.user(USER)
    assert state.video_id_E.tolist() == [VIDEO]
    assert state.signals_E.tolist() == [1 << SIGNALS.index("click") | 1 << SIGNALS.index("like")]
    assert state.watch_fraction_E.tolist() == pytest.approx([0.9])


def test_an_impression_never_changes_its_user_or_video(store):
    log(store, event(0))
    assert log(store, event(0, user_id=USER + 1)) == LogOutcome(0, 0, 1)
    assert log(store, event(0, video_id=VIDEO + 99)) == LogOutcome(0, 0, 1)
    assert store.user(USER + 1).video_id_E.size == 0
    assert store.user(USER).video_id_E.tolist() == [VIDEO]


def test_recent_events_are_bounded_and_sorted_by_time_while_every_video_stays_seen(tmp_path):
    store = SqliteStore(tmp_path / "events.sqlite", StoreConfig(recent_events=3))
    log(store, *(event(slot, ts_ms=T_MS - slot, follow=slot == 4) for slot in range(5)))
    state = store.user(USER)
    assert state.video_id_E.tolist() == [VIDEO + 2, VIDEO + 1, VIDEO]
    assert state.seen_ids.tolist() == [VIDEO + slot for slot in range(5)]
    assert state.followed_authors.tolist() == [AUTHOR]
    store.close()


def test_a_store_is_refused_to_a_second_owner(store, tmp_path):
    with pytest.raises(RuntimeError, match="open in another process"):
        SqliteStore(tmp_path / "log" / "events.sqlite")


def test_export_is_canonical_and_carries_the_propensity_of_the_slate(store, tmp_path):
    day_ms = 86_400_000
    store.log_served([served(0, 0.25), served(1, 0.5)])
    log(store, event(0, like=True, watch_ms=1), event(1, ts_ms=T_MS + day_ms), event(2, request_id="elsewhere"))
    assert export_events(tmp_path / "log" / "events.sqlite", tmp_path / "out") == 3
    files = sorted((tmp_path / "out" / "events").glob("date=*/*.parquet"))
    assert [file.parent.name for file in files] == ["date=2023-11-14", "date=2023-11-15"]
    rows = []
    for file in files:
        table = pq.read_table(file, partitioning=None, page_checksum_verification=True)
        assert table.schema.equals(EVENTS)
        rows += table.to_pylist()
    assert [(row["video_id"], row["propensity"], row["source"], row["policy_id"]) for row in rows] == [
        (VIDEO, 0.25, "ann", "p1"),
        (VIDEO + 2, None, None, None),
        (VIDEO + 1, 0.5, "ann", "p1"),
    ]
    assert (rows[0]["like"], rows[0]["click"], rows[0]["connected"], rows[0]["surface"]) == (1, None, False, "main")


def test_a_slate_served_again_under_its_request_id_replaces_the_first(store, tmp_path):
    store.log_served([served(0, 0.25), served(1, 0.5)])
    store.log_served([served(0, 0.75)])
    log(store, event(0), event(1))
    export_events(tmp_path / "log" / "events.sqlite", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
    assert [row["propensity"] for row in rows] == [0.75, None]


def test_nobody_overwrites_the_slate_of_another_user(store, tmp_path):
    store.log_served([served(0, 0.25)])
    store.log_served([served(0, 0.9, user_id=USER + 1)])
    log(store, event(0))
    export_events(tmp_path / "log" / "events.sqlite", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "events")["propensity"].to_pylist() == [0.25]


def shortlist(request_id: str = "r1", user_id: int = USER, videos=(VIDEO, VIDEO + 1, -7), session=(VIDEO + 50,)):
    ids = (np.array(videos, np.int64), np.array(session, np.int64))
    return Shortlist(request_id, user_id, T_MS - 5, "main", *ids)


def exported(store_path, out) -> tuple[list[dict], list[tuple]]:
    export_events(store_path, out)
    candidates = pq.read_table(out / "candidates.parquet", page_checksum_verification=True)
    assert candidates.schema.names == SESSION_CANDIDATES.names
    others = pq.read_table(out / "not_judged.parquet").to_pylist()
    return candidates.to_pylist(), [(row["request_id"], row["reason"]) for row in others]


def test_every_request_of_an_export_has_what_it_chose_from_or_the_reason_why_not(store, tmp_path):
    store.log_served([served(0, 0.25)], shortlist())
    store.log_served([served(0, 0.9, "nobody answered")], shortlist("nobody answered"))
    store.log_served([served(0, 0.25, "no list")], None)
    store.log_served([replace(served(0, 1.0, "greedy"), policy_id="p1/greedy")], None)
    store.log_served([served(0, 0.25, "another video")], shortlist("another video"))
    log(store, event(0), event(0, request_id="no list"), event(0, request_id="greedy"))
    log(store, event(0, request_id="another video", video_id=VIDEO + 9), event(0, request_id="elsewhere"))
    candidates, others = exported(tmp_path / "log" / "events.sqlite", tmp_path / "out")
    (row,) = candidates
    assert row == {
        "request_id": "r1", "user_id": USER, "ts_ms": T_MS - 5, "surface": "main",
        "video_ids": [VIDEO, VIDEO + 1, -7], "session_ids": [VIDEO + 50],
    }  # fmt: skip
    assert others == [
        ("no list", "no candidate set kept"),
        ("greedy", "served without exploration"),
        ("another video", "not of a served slate"),
        ("elsewhere", "not of a served slate"),
    ]


def test_what_a_slate_was_drawn_from_is_replaced_with_it_and_by_nobody_else(store, tmp_path):
    store.log_served([served(0, 0.25)], shortlist(videos=(VIDEO, 1)))
    store.log_served([served(0, 0.75)], shortlist(videos=(VIDEO, 2)))
    store.log_served([served(0, 0.9, user_id=USER + 1)], shortlist(user_id=USER + 1, videos=(VIDEO, 3)))
    log(store, event(0))
    candidates, _ = exported(tmp_path / "log" / "events.sqlite", tmp_path / "out")
    assert [row["video_ids"] for row in candidates] == [[VIDEO, 2]]


def test_a_store_from_before_shortlists_were_kept_is_exported_without_any(store, tmp_path):
    store.log_served([served(0, 0.25)])
    log(store, event(0))
    store.close()
    with closing(sqlite3.connect(tmp_path / "log" / "events.sqlite")) as database, database:
        database.execute("DROP TABLE shortlists")
    candidates, others = exported(tmp_path / "log" / "events.sqlite", tmp_path / "out")
    assert (candidates, others) == ([], [("r1", "no candidate set kept")])


def test_a_share_of_the_shortlists_is_kept_by_request_and_not_by_slate(tmp_path):
    store = SqliteStore(tmp_path / "events.sqlite", StoreConfig(shortlist_share=0.3))
    for number in range(400):
        store.log_served([served(0, 0.5, f"r{number}")], shortlist(f"r{number}"))
    log(store, *(event(0, request_id=f"r{number}") for number in range(400)))
    store.close()
    candidates, others = exported(tmp_path / "events.sqlite", tmp_path / "out")
    kept = {row["request_id"] for row in candidates}
    assert kept == {f"r{number}" for number in range(400) if StoreConfig(shortlist_share=0.3).keeps(f"r{number}")}
    assert abs(len(kept) - 120) < 5 * (400 * 0.3 * 0.7) ** 0.5
    assert len(kept) + len(others) == 400
