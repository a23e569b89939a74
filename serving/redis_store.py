"""The store of many servers: recent events, seen videos, slates, uploads and the event log in one Redis.

A request makes one grouped read with a short timeout. Writes go through one thread: an event is acknowledged once
Redis has answered (durable as Redis itself is: `appendfsync always`), never before; slates that could not be written
wait until Redis is back. While it does not answer, few reads try it and the others fail at once.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serving import redis_scripts as scripts
from serving.messages import Event, LogOutcome
from serving.records import NOTHING_KNOWN, ServedRow, Shortlist, UserState
from serving.redis_records import change_of, event_of, record_of, shortlist_json, shortlist_of, state_of
from serving.store import StoreBusyError, StoreConfig, StoreUnavailableError
from serving.upload_store import Change, Said, to_json

_log = logging.getLogger(__name__)
_AT_ONCE = 1_000
PREFIX = "reelrank:"
SHORTLIST = "from"
"""Beside the slots of a slate: what they were drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisConfig(StoreConfig):
    """Of `RedisStore`."""

    prefix: str = PREFIX
    """Of every key."""
    read_timeout_ms: float = 20.0
    """A request waits no longer for each of connecting and reading; it is answered without the store then."""
    write_timeout_ms: float = 1_000.0
    retry_s: float = 0.5
    """After a failed read, this long until one request tries again."""
    users_at_hand: int = 10_000
    """Users whose last read is kept for when Redis does not answer."""
    slate_kept_s: int = 7 * 86_400
    """A slate that no event answers is forgotten after this; one that an event has answered is not."""


class RedisStore:
    """One primary Redis (6.2 or newer), with replicas or not; Redis Cluster is not supported."""

    shared = True

    def __init__(self, url: str, config: RedisConfig | None = None) -> None:
        """Raises StoreUnavailableError when Redis does not answer: what was removed must be known before a start."""
        self.config = config or RedisConfig()
        self.served_dropped = 0
        self._name = url.rpartition("@")[2]
        self._reader = _client(url, self.config.read_timeout_ms / 1000.0)
        self._database = _client(url, self.config.write_timeout_ms / 1000.0)
        self._folder = tempfile.TemporaryDirectory(prefix="reelrank-index-")
        self._at_hand: OrderedDict[int, UserState] = OrderedDict()
        self._lock = threading.Lock()
        self._reads, self._writes = (_Breaker(self.config.retry_s) for _ in range(2))
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(self.config.max_waiting)
        self._slates: deque[tuple[tuple[ServedRow, ...], Shortlist | None]] = deque()
        self._call(self._check_durability)
        self._writer = threading.Thread(target=self._write, name="store-writer", daemon=True)
        self._writer.start()

    @property
    def patience_ms(self) -> float:
        """Connecting and reading."""
        return 2 * self.config.read_timeout_ms

    @property
    def available(self) -> bool:
        """Whether it answered last."""
        return self._reads.closed and self._writes.closed

    @property
    def waiting(self) -> int:
        """Calls and slates not yet written."""
        return self._waiting.qsize() + len(self._slates)

    @property
    def folder(self) -> Path:
        """A temporary one: nothing of a shared store is this machine's."""
        return Path(self._folder.name) / "index"

    def user(self, user_id: int) -> UserState:
        """One pipeline of three reads; raises StoreUnavailableError."""
        if not self._reads.may_try():
            raise StoreUnavailableError(f"{self._name} did not answer a moment ago")
        try:
            with self._reader.pipeline(transaction=False) as reads:
                reads.hvals(self._key("u", user_id))
                reads.get(self._key("s", user_id))
                reads.get(self._key("f", user_id))
                state = state_of(*reads.execute())
        except (redis.RedisError, OSError) as error:
            self._reads.closed = False
            raise StoreUnavailableError(f"{self._name} cannot be read: {error}") from error
        self._reads.closed = True
        with self._lock:
            self._at_hand[user_id] = state
            self._at_hand.move_to_end(user_id)
            if len(self._at_hand) > self.config.users_at_hand:
                self._at_hand.popitem(last=False)
        return state

    def at_hand(self, user_id: int) -> UserState:
        """As it was last read here."""
        return self._at_hand.get(user_id, NOTHING_KNOWN)

    def log_events(self, events: Sequence[Event]) -> Future[LogOutcome]:
        """Done once Redis has stored and answered, or with StoreUnavailableError: nothing is acknowledged then."""
        arguments = [self.config.prefix, self.config.recent_events]
        for event in events:
            arguments += [event.request_id, event.slot, event.user_id, record_of(event)]
        return self._submit(lambda: LogOutcome(*self._log_script(args=arguments)))

    def keep(self, said: Said) -> Future[int]:
        """Done, with the number of the last change, once Redis has stored uploads or removals and answered."""
        arguments: list[Any] = [self.config.prefix, said.acknowledged_ms]
        for video in said.videos:
            content = (
                None if video.content is None else base64.b64encode(video.content.astype("<f4").tobytes()).decode()
            )
            arguments += [video.video_id, json.dumps([to_json(video), content])]
        for video_id in said.removed_ids:
            arguments += [video_id, ""]
        return self._submit(lambda: self._keep_script(args=arguments))

    def forget(self, numbers: Sequence[int]) -> Future[None]:
        """Drop changes that no bundle to come will miss."""
        return self._submit(lambda: self._forget_script(args=[self.config.prefix, *numbers]) if numbers else None)

    def changes(self, after: int) -> Iterator[Change]:
        """Each video's last state, in order; a change made meanwhile may come under its older number, and again."""
        last: int | None = after
        while last is not None:
            found, last = self._call(partial(self._read_changes, last))
            yield from found

    def log_served(self, rows: Sequence[ServedRow], shortlist: Shortlist | None = None) -> None:
        """Written soon, and after an outage."""
        if len(self._slates) >= self.config.max_waiting:
            self.served_dropped += 1
            return
        kept = shortlist if shortlist is not None and self.config.keeps(shortlist.request_id) else None
        self._slates.append((tuple(rows), kept))
        if self._waiting.empty():
            with suppress(queue.Full):  # full: it is awake
                self._waiting.put_nowait(lambda: None)  # wakes the writer

    def close(self) -> None:
        """Write what waits, then stop."""
        self._waiting.put(None)
        self._writer.join()
        if self._slates:
            _log.error("%d slates were not logged: %s does not answer", len(self._slates), self._name)
        self._reader.close()
        self._database.close()
        self._folder.cleanup()

    def _submit(self, write: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()

        def work() -> None:
            try:
                if not self._writes.may_try():
                    raise StoreUnavailableError(f"{self._name} could not be written a moment ago")
                done.set_result(self._call(write))
                self._writes.closed = True
            except Exception as error:
                self._writes.closed = not isinstance(error, StoreUnavailableError)
                done.set_exception(error)

        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            raise StoreBusyError(f"{self.config.max_waiting} writes are waiting: send the same again later") from None
        return done

    def _call(self, work: Callable[[], Any]) -> Any:
        """Errors of Redis become ours."""
        try:
            return work()
        except (redis.RedisError, OSError) as error:
            raise StoreUnavailableError(f"{self._name} does not answer: {error}") from error

    def _write(self) -> None:
        """Calls in their order; slates before each, so that an event finds the slate it answers."""
        while True:
            try:
                work = self._waiting.get(timeout=self.config.retry_s if self._slates else None)
            except queue.Empty:
                self._flush_slates()
                continue
            self._flush_slates()
            if work is None:
                return
            work()

    def _flush_slates(self) -> None:
        if not self._slates or not self._writes.may_try():
            return
        try:
            while self._slates:
                with self._database.pipeline(transaction=False) as writes:
                    batch = [self._slates[i] for i in range(min(100, len(self._slates)))]
                    for rows, shortlist in batch:
                        self._served_script(args=self._served_arguments(rows, shortlist), client=writes)
                    writes.execute()
                for _ in batch:
                    self._slates.popleft()
            self._writes.closed = True
        except (redis.RedisError, OSError) as error:
            self._writes.closed = False
            _log.warning("%d slates wait for %s: %s", len(self._slates), self._name, error)

    def _served_arguments(self, rows: tuple[ServedRow, ...], shortlist: Shortlist | None) -> list[Any]:
        first = rows[0]
        arguments: list[Any] = [self.config.prefix, first.request_id, first.user_id, self.config.slate_kept_s]
        for row in rows:
            arguments += [row.slot, json.dumps(asdict(row))]
        if shortlist is not None:
            arguments += [SHORTLIST, shortlist_json(shortlist)]
        return arguments

    def _read_changes(self, after: int) -> tuple[list[Change], int | None]:
        """The next so many, and the number of the last of them; None at the end."""
        prefix = self.config.prefix
        order = self._database.zrangebyscore(
            f"{prefix}order", f"({after}", "+inf", start=0, num=_AT_ONCE, withscores=True
        )
        if not order:
            return [], None
        ids = [video_id for video_id, _ in order]
        states = self._database.hmget(f"{prefix}state", ids)
        videos = self._database.hmget(f"{prefix}video", ids)
        found = [
            change_of(int(number), int(video_id), state, described)
            for (video_id, number), state, described in zip(order, states, videos, strict=True)
            if state is not None
        ]
        return found, int(order[-1][1])

    def _check_durability(self) -> None:
        """Say what a power cut would cost; the scripts are made ready."""
        make = self._database.register_script
        self._log_script, self._served_script = make(scripts.LOG), make(scripts.SERVED)
        self._keep_script, self._forget_script = make(scripts.KEEP), make(scripts.FORGET)
        enabled = self._database.info("persistence").get("aof_enabled")
        try:
            policy = self._database.config_get("appendfsync").get("appendfsync")
        except redis.RedisError:
            policy = "unknown (CONFIG is not allowed)"
        if not enabled:
            _log.warning("%s has no append-only file: acknowledged events are lost when it restarts", self._name)
        elif policy != "always":
            _log.warning("%s has appendfsync %s: a power cut may lose acknowledged events", self._name, policy)

    def _key(self, kind: str, name: int) -> str:
        return f"{self.config.prefix}{kind}:{name}"


class _Breaker:
    """Open after a failure: one caller in so many seconds tries, the others need not wait to learn the same."""

    def __init__(self, retry_s: float) -> None:
        self.closed = True
        self._retry_s, self._tried_s = retry_s, 0.0
        self._lock = threading.Lock()

    def may_try(self) -> bool:
        if self.closed:
            return True
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._tried_s < self._retry_s:
                return False
            self._tried_s = now_s
            return True


def read_log(url: str, prefix: str = PREFIX) -> Iterator[tuple[list[Event], list[ServedRow], Shortlist | None]]:
    """The event log, request by request in the order of their first events, with the slates that they answer."""
    with closing(_client(url, 10.0)) as database:
        requests: list[bytes] = database.zrange(f"{prefix}log", 0, -1)
        for request in requests:
            request_id = request.decode()
            slots = database.hgetall(f"{prefix}e:{request_id}")
            served = database.hgetall(f"{prefix}v:{request_id}")
            events = [event_of(request_id, int(slot), record) for slot, record in slots.items()]
            listed = served.pop(SHORTLIST.encode(), None)
            shortlist = None if listed is None else shortlist_of(request_id, *listed.split(b" ", 1))
            rows = [ServedRow(**json.loads(said.partition(b" ")[2])) for said in served.values()]
            yield sorted(events, key=lambda event: event.slot), rows, shortlist


def _client(url: str, timeout_s: float) -> Any:
    """No retries: whoever asks has its own way to go on."""
    return redis.Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )
