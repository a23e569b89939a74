"""Live events: what users did since the bundle was made, durable, merged into the next request's history.

`SqliteStore` keeps events and served slates (`serving.sqlite_log`), and what was uploaded and removed
(`serving.upload_store`). One writer thread commits whatever is waiting in one transaction (WAL, synchronous=FULL): what
is acknowledged survives a killed process and a power cut. Requests never read the database: a user's recent events and
seen videos lie in memory.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import xxhash

from serving import upload_store
from serving.messages import Event, LogOutcome
from serving.records import NOTHING_KNOWN, ServedRow, Shortlist, UserState
from serving.sqlite_log import Write, all_users, connect, insert, one_user
from serving.upload_store import Change, Said

_log = logging.getLogger(__name__)
_SHORTLISTS = 1
"""Seed of the hash that chooses shortlists: the plain one seeds exploration, which must not be chosen by."""


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

    def log_served(self, rows: Sequence[ServedRow], shortlist: Shortlist | None = None) -> None:
        """Keep a slate and, for the configured share of requests, what it was drawn from, soon; nobody waits."""
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

    def log_served(self, rows: Sequence[ServedRow], shortlist: Shortlist | None = None) -> None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Of `SqliteStore`."""

    recent_events: int = 256
    """Live events a user kept in memory; the models read fewer (history_length)."""
    max_waiting: int = 10_000
    """Writes that may wait for the writer; beyond it events are refused, and slates counted in `served_dropped`."""
    shortlist_share: float = 1.0
    """Share of requests whose shortlists are kept, by a hash of the request's id: nothing else about it decides."""

    def __post_init__(self) -> None:
        if not 0 <= self.shortlist_share <= 1:
            raise ValueError(f"shortlist_share {self.shortlist_share}: must lie in 0 .. 1")

    def keeps(self, request_id: str) -> bool:
        """Whether the request's shortlist is kept."""
        return xxhash.xxh64_intdigest(request_id.encode(), seed=_SHORTLISTS) < self.shortlist_share * 2.0**64


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
        self._users = all_users(database, self.config.recent_events)
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

    def log_served(self, rows: Sequence[ServedRow], shortlist: Shortlist | None = None) -> None:
        """Written in order with the events, so a slate is on disk no later than an event that answers it."""
        kept = shortlist if shortlist is not None and self.config.keeps(shortlist.request_id) else None
        try:
            self._waiting.put_nowait(Write(served=tuple(rows), shortlist=kept))
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
                self._users[user_id] = one_user(database, user_id, self.config.recent_events)
        except sqlite3.Error as error:
            _log.exception("%d writes are lost to the event log and were not acknowledged", len(batch))
            for write in batch:
                write.done.set_exception(error)
            return
        for write, outcome in zip(batch, outcomes, strict=True):
            write.done.set_result(outcome)


def _lock(path: Path) -> TextIO:
    handle = Path(f"{path}.lock").open("w")  # noqa: SIM115 - held until close(); the kernel lets go of a dead owner's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RuntimeError(f"{path} is open in another process: give each server its own store") from None
    return handle
