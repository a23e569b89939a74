"""The tables of the embedded store, and what is written to and read from them; run by its one writer.

Events have one row an impression under (request_id, slot), every served slate lies beside them with what it was drawn
from. The export reads the same tables.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.history import watch_fraction
from features.schema import SIGNALS
from serving import upload_store
from serving.messages import Event, LogOutcome
from serving.records import ServedRow, Shortlist, UserState
from serving.upload_store import Said


@dataclass(frozen=True, slots=True)
class Write:
    """What one transaction holds for somebody."""

    served: tuple[ServedRow, ...] = ()
    shortlist: Shortlist | None = None
    events: tuple[Event, ...] = ()
    said: Said | None = None
    forgotten: tuple[int, ...] = ()
    done: Future[Any] = field(default_factory=Future)


_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS events (
  request_id TEXT NOT NULL, slot INTEGER NOT NULL, user_id INTEGER NOT NULL, video_id INTEGER NOT NULL,
  author_id INTEGER, ts_ms INTEGER NOT NULL, watch_ms INTEGER, duration_ms INTEGER,
  {", ".join(f'"{signal}" INTEGER' for signal in SIGNALS)}, PRIMARY KEY (request_id, slot));
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id, ts_ms);
CREATE INDEX IF NOT EXISTS events_in_time ON events (ts_ms);
CREATE TABLE IF NOT EXISTS served (
  request_id TEXT NOT NULL, slot INTEGER NOT NULL, user_id INTEGER NOT NULL, video_id INTEGER NOT NULL,
  ts_ms INTEGER NOT NULL, surface TEXT, source TEXT, connected INTEGER, policy_id TEXT, propensity REAL,
  bundle_version TEXT, PRIMARY KEY (request_id, slot));
CREATE TABLE IF NOT EXISTS shortlists (
  request_id TEXT PRIMARY KEY, user_id INTEGER NOT NULL, ts_ms INTEGER NOT NULL, surface TEXT,
  video_ids BLOB NOT NULL, session_ids BLOB NOT NULL);
"""
_EVENT_COLUMNS = ("request_id", "slot", "user_id", "video_id", "author_id", "ts_ms", "watch_ms", "duration_ms")
_SIGNALS = ", ".join(f'"{signal}"' for signal in SIGNALS)
_MERGED_COLUMNS = ("watch_ms", *SIGNALS)
_UPSERT = (  # only our own column names are formatted into SQL
    f"INSERT INTO events VALUES ({', '.join('?' * (len(_EVENT_COLUMNS) + len(SIGNALS)))}) "  # noqa: S608
    "ON CONFLICT (request_id, slot) DO UPDATE SET "
    + ", ".join(
        f'"{c}" = max(coalesce("{c}", excluded."{c}"), coalesce(excluded."{c}", "{c}"))' for c in _MERGED_COLUMNS
    )
)
"""Feedback that arrives later is added to its impression: a signal once given stays, the longest watch counts."""
_READ = f"SELECT user_id, video_id, author_id, ts_ms, watch_ms, duration_ms, {_SIGNALS} FROM events"  # noqa: S608


def connect(path: Path) -> sqlite3.Connection:
    """An event log, made when missing."""
    database = sqlite3.connect(path, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.executescript(_SCHEMA + upload_store.SCHEMA)
    return database


def insert(database: sqlite3.Connection, write: Write) -> LogOutcome:
    """Slates, events and what is forgotten; of events also what became of them."""
    for key in {(row.request_id, row.user_id) for row in write.served}:
        database.execute("DELETE FROM served WHERE request_id = ? AND user_id = ?", key)
        database.execute("DELETE FROM shortlists WHERE request_id = ? AND user_id = ?", key)
    if write.shortlist is not None:
        _insert_shortlist(database, write.shortlist)
    database.executemany(
        "INSERT OR IGNORE INTO served VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [tuple(getattr(row, name) for name in ServedRow.__slots__) for row in write.served],
    )
    upload_store.forget(database, write.forgotten)
    stored = merged = conflicting = 0
    for event in write.events:
        key = (event.request_id, event.slot)
        known = database.execute(
            "SELECT user_id, video_id FROM events WHERE request_id = ? AND slot = ?", key
        ).fetchone()
        if known is not None and known != (event.user_id, event.video_id):
            conflicting += 1
            continue
        given = [None if (value := event.signals.get(signal)) is None else int(value) for signal in SIGNALS]
        database.execute(_UPSERT, [*(getattr(event, name) for name in _EVENT_COLUMNS), *given])
        stored, merged = (stored + 1, merged) if known is None else (stored, merged + 1)
    return LogOutcome(stored, merged, conflicting)


def _insert_shortlist(database: sqlite3.Connection, kept: Shortlist) -> None:
    lists = (packed(kept.video_id_K), packed(kept.session_id_N))
    row = (kept.request_id, kept.user_id, kept.ts_ms, kept.surface, *lists)
    database.execute("INSERT OR IGNORE INTO shortlists VALUES (?, ?, ?, ?, ?, ?)", row)


def packed(ids: np.ndarray) -> bytes:
    """8 bytes an id."""
    return ids.astype("<i8").tobytes()


def unpacked(ids: bytes) -> np.ndarray:
    """Inverse of `packed`."""
    return np.frombuffer(ids, "<i8").astype(np.int64)


def one_user(database: sqlite3.Connection, user_id: int, recent: int) -> UserState:
    return _state(database.execute(f"{_READ} WHERE user_id = ? ORDER BY ts_ms, rowid", (user_id,)), recent)


def all_users(database: sqlite3.Connection, recent: int) -> dict[int, UserState]:
    rows = database.execute(f"{_READ} ORDER BY user_id, ts_ms, rowid")
    return {user_id: _state(group, recent) for user_id, group in itertools.groupby(rows, key=lambda row: row[0])}


def _state(rows: Iterable[tuple], recent: int) -> UserState:
    """Rows of one user as `_READ` gives them, by time."""
    rows = list(rows)
    last = rows[-recent:]
    bits = [sum(1 << s for s in range(len(SIGNALS)) if row[6 + s]) for row in last]
    follow = 6 + SIGNALS.index("follow")
    return UserState(
        video_id_E=np.array([row[1] for row in last], np.int64),
        ts_ms_E=np.array([row[3] for row in last], np.int64),
        signals_E=np.array(bits, np.uint8),
        watch_fraction_E=watch_fraction(*(np.array([row[c] for row in last], np.float64) for c in (4, 5))),
        seen_ids=np.unique(np.array([row[1] for row in rows], np.int64)),
        followed_authors=np.unique(np.array([row[2] for row in rows if row[follow] and row[2] is not None], np.int64)),
    )
