"""Live events: what users did since the bundle was made, durable, merged into the next request's history.

`SqliteStore` keeps one row an impression under (request_id, slot), every served slate beside it, and what was uploaded
and removed (`serving.upload_store`). One writer thread commits whatever is waiting in one transaction (WAL,
synchronous=FULL): what is acknowledged survives a killed process and a power cut. Requests never read the database: a
user's recent events and seen videos lie in memory.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import queue
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from features.history import watch_fraction
from features.schema import SIGNALS
from serving import upload_store
from serving.messages import Event, LogOutcome
from serving.upload_store import Change, Said

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UserState:
    """One user's live events: the most recent ones (E, oldest first), and every video and follow ever logged."""

    video_id_E: np.ndarray
    ts_ms_E: np.ndarray
    signals_E: np.ndarray
    """uint8 masks in the bit order of SIGNALS."""
    watch_fraction_E: np.ndarray
    seen_ids: np.ndarray
    followed_authors: np.ndarray


NOTHING_KNOWN = UserState(
    *(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.uint8, np.float32, np.int64, np.int64))
)


@dataclass(frozen=True, slots=True)
class ServedRow:
    """One slot of a slate as it was shown: what makes an event valid replay data."""

    request_id: str
    slot: int
    user_id: int
    video_id: int
    ts_ms: int
    surface: str | None
    source: str
    connected: bool
    policy_id: str
    propensity: float
    bundle_version: str


class StoreUnavailableError(RuntimeError):
    """The store does not answer, or not in time; nothing was acknowledged."""


class StoreBusyError(RuntimeError):
    """The event log is behind; the same events may be sent again, they count once."""


class Store(Protocol):
    """What the feed needs of live events."""

    @property
    def patience_ms(self) -> float:
        """The longest that `user` takes."""
        ...

    def user(self, user_id: int) -> UserState:
        """What is acknowledged of a user, in one read; raises StoreUnavailableError."""
        ...

    def at_hand(self, user_id: int) -> UserState:
        """What can be said of a user without waiting: it may be old, or nothing."""
        ...

    def log_served(self, rows: Sequence[ServedRow]) -> None:
        """Keep a slate, soon; nobody waits for it."""
        ...


class EventStore(Store, Protocol):
    """What a server needs of its store, beyond the feed: `SqliteStore`, or `serving.redis_store.RedisStore`."""

    served_dropped: int
    """Slates that could not be kept."""
    shared: bool
    """Other servers write to it too."""

    @property
    def folder(self) -> Path:
        """On this machine, for what a server makes of the store; not to be trusted after a restart."""
        ...

    @property
    def waiting(self) -> int:
        """Writes not yet done."""
        ...

    @property
    def available(self) -> bool:
        """Whether it answered last."""
        ...

    def log_events(self, events: Sequence[Event]) -> Future[LogOutcome]:
        """Done once the events are durable and in `user`; raises StoreBusyError when too many writes wait."""
        ...

    def keep(self, said: Said) -> Future[int]:
        """Done, with the number of the last change, once uploads or removals are durable; raises StoreBusyError."""
        ...

    def forget(self, numbers: Sequence[int]) -> Future[None]:
        """Drop changes that no bundle to come will miss."""
        ...

    def changes(self, after: int) -> Iterable[Change]:
        """Uploads and removals beyond a number: each video's last state, in order; raises StoreUnavailableError."""
        ...

    def close(self) -> None:
        """Write what waits, then stop."""
        ...


class NoStore:
    """No live events and nothing logged: golden requests and replay see the bundle's histories alone."""

    patience_ms = 0.0

    def user(self, user_id: int) -> UserState:
        return NOTHING_KNOWN

    at_hand = user

    def log_served(self, rows: Sequence[ServedRow]) -> None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Of `SqliteStore`."""

    recent_events: int = 256
    """Live events a user kept in memory; the models read fewer (history_length)."""
    max_waiting: int = 10_000
    """Writes that may wait for the writer; beyond it events are refused, and slates counted in `served_dropped`."""


@dataclass(frozen=True, slots=True)
class Write:
    """What one transaction holds for somebody."""

    served: tuple[ServedRow, ...] = ()
    events: tuple[Event, ...] = ()
    said: Said | None = None
    forgotten: tuple[int, ...] = ()
    done: Future[Any] = field(default_factory=Future)


class SqliteStore:
    """The embedded store: one file, one process."""

    shared, available = False, True
    patience_ms = 0.0
    """Users lie in memory."""

    def __init__(self, path: Path, config: StoreConfig | None = None) -> None:
        self.config = config or StoreConfig()
        self.served_dropped = 0
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        self._waiting: queue.Queue[Write | None] = queue.Queue(self.config.max_waiting)
        database = connect(path)
        self._number = upload_store.last_number(database)
        self._users = _all_users(database, self.config.recent_events)
        self._writer = threading.Thread(target=self._write, args=(database,), name="store-writer", daemon=True)
        self._writer.start()

    def user(self, user_id: int) -> UserState:
        """One dictionary look-up; a state never changes, it is replaced."""
        return self._users.get(user_id, NOTHING_KNOWN)

    at_hand = user

    @property
    def folder(self) -> Path:
        """Beside the file."""
        return self.path.with_name(self.path.name + ".index")

    @property
    def waiting(self) -> int:
        """Writes not yet on disk."""
        return self._waiting.qsize()

    def log_events(self, events: Sequence[Event]) -> Future[LogOutcome]:
        """Done once the events are on disk and in `user`; raises StoreBusyError when the writer is too far behind."""
        return self._submit(Write(events=tuple(events)))

    def keep(self, said: Said) -> Future[int]:
        """Done, with the number of the last change, once uploads or removals are on disk; raises StoreBusyError."""
        return self._submit(Write(said=said))

    def forget(self, numbers: Sequence[int]) -> Future[None]:
        """Drop changes that no bundle to come will miss."""
        return self._submit(Write(forgotten=tuple(numbers)))

    def changes(self, after: int) -> Iterator[Change]:
        """What is on disk of uploads and removals beyond a number: each video's last state, in order."""
        return upload_store.changes(self.path, after)

    def log_served(self, rows: Sequence[ServedRow]) -> None:
        """Written in order with the events, so a slate is on disk no later than an event that answers it."""
        try:
            self._waiting.put_nowait(Write(served=tuple(rows)))
        except queue.Full:
            self.served_dropped += 1
            _log.warning("a slate was not logged: %d writes are waiting", self.config.max_waiting)

    def _submit(self, write: Write) -> Future[Any]:
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            raise StoreBusyError(f"{self.config.max_waiting} writes are waiting: send the same again later") from None
        return write.done

    def close(self) -> None:
        """Write what waits, then stop."""
        self._waiting.put(None)
        self._writer.join()
        self._lock.close()

    def _write(self, database: sqlite3.Connection) -> None:
        running = True
        while running:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            running = None not in batch
            self._commit(database, [write for write in batch if write is not None])
        database.close()

    def _commit(self, database: sqlite3.Connection, batch: list[Write]) -> None:
        outcomes, number = [], self._number
        try:
            with database:
                for write in batch:
                    outcome = insert(database, write)
                    if write.said is not None:
                        outcome = number = upload_store.insert(database, write.said, number)
                    outcomes.append(outcome)
            self._number = number
            for user_id in {event.user_id for write in batch for event in write.events}:
                self._users[user_id] = _one_user(database, user_id, self.config.recent_events)
        except sqlite3.Error as error:
            _log.exception("%d writes are lost to the event log and were not acknowledged", len(batch))
            for write in batch:
                write.done.set_exception(error)
            return
        for write, outcome in zip(batch, outcomes, strict=True):
            write.done.set_result(outcome)


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


def _lock(path: Path) -> TextIO:
    handle = Path(f"{path}.lock").open("w")  # noqa: SIM115 - held until close(); the kernel lets go of a dead owner's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RuntimeError(f"{path} is open in another process: give each server its own store") from None
    return handle


def insert(database: sqlite3.Connection, write: Write) -> LogOutcome:
    """Slates, events and what is forgotten; of events also what became of them."""
    for key in {(row.request_id, row.user_id) for row in write.served}:
        database.execute("DELETE FROM served WHERE request_id = ? AND user_id = ?", key)
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


def _one_user(database: sqlite3.Connection, user_id: int, recent: int) -> UserState:
    return _state(database.execute(f"{_READ} WHERE user_id = ? ORDER BY ts_ms, rowid", (user_id,)), recent)


def _all_users(database: sqlite3.Connection, recent: int) -> dict[int, UserState]:
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
