"""The gRPC server: grpc.aio in front of a `LiveFeed`, models in a small thread pool, loopback unless told otherwise.

The event loop parses and answers, threads compute. A request keeps the feed it started with, is refused early when
too many are in flight, and is never started after its deadline.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import faiss
import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from candidate_gen.index.device import is_cpu, resolve
from candidate_gen.live import LiveConfig
from features.artifacts import Registry
from serving import wire
from serving.feed import Feed
from serving.limits import MAX_EVENTS, MAX_MESSAGE_BYTES, InvalidRequestError, check_count, check_events
from serving.protos.reelrank.v1 import feed_pb2, feed_pb2_grpc
from serving.store import SqliteStore, StoreBusyError
from serving.swap import LiveFeed
from serving.trace import Deadline, DeadlineExpiredError

_log = logging.getLogger(__name__)
SERVICE = feed_pb2.DESCRIPTOR.services_by_name["FeedService"].full_name
SWITCH_INTERVAL_S = 0.000_5
"""A thread that waits for the interpreter asks for it after this long; Python's 5 ms are a good part of an answer."""
NO_CLIENT_DEADLINE_S = 1e9
"""Without a client's deadline, gRPC gives some 9e15 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 lets the system choose."""
    insecure_public: bool = False
    """Allow an address that other machines can reach, without TLS and without a password."""
    threads: int = 2
    """Requests computed at once; each uses one core. On two cores 4, 8 and 16 answer no more a second."""
    device: str = "cpu"
    """What --device says: on a GPU searches scan all vectors in its memory, and are exact. Models stay on the CPU."""
    max_in_flight: int = 64
    """Calls beyond this many are refused at once with RESOURCE_EXHAUSTED."""
    max_changes_waiting: int = 16
    """Uploads and removals beyond this many are refused too, so that they leave calls in flight to the pages."""
    default_deadline_ms: float = 1_000.0
    """For clients that set none."""
    longest_deadline_ms: float = 10_000.0
    """Longer ones are cut to it."""
    live: LiveConfig = field(default_factory=lambda: LiveConfig(flush=False))
    """When uploads are moved into an index of their own. The store is what survives a crash, so nothing is flushed."""
    poll_s: float = 1.0
    """How often LIVE is looked at."""
    drain_notice_s: float = 1.0
    """Between saying NOT_SERVING and refusing new calls, so that balancers can react."""
    drain_grace_s: float = 10.0
    """What calls in flight get to end."""


class FeedServicer(feed_pb2_grpc.FeedServiceServicer):
    """The six calls; every error that is the caller's names the field."""

    def __init__(self, live: LiveFeed, store: SqliteStore, config: ServerConfig) -> None:
        self._live, self._store, self._config = live, store, config
        self._workers = ThreadPoolExecutor(config.threads, "feed", initializer=_one_core_each)
        self._uploader = ThreadPoolExecutor(1, "uploads", initializer=_one_core_each)
        self._changes_waiting = 0

    async def GetFeed(self, request: feed_pb2.GetFeedRequest, context: Any) -> feed_pb2.GetFeedResponse:
        def work(feed: Feed, deadline: Deadline) -> feed_pb2.GetFeedResponse:
            return wire.write_feed_response(feed.get_feed(wire.read_feed_request(request), deadline))

        return await self._compute(work, context)

    async def Retrieve(self, request: feed_pb2.RetrieveRequest, context: Any) -> feed_pb2.RetrieveResponse:
        def work(feed: Feed, deadline: Deadline) -> feed_pb2.RetrieveResponse:
            return wire.write_candidates(feed.retrieve(wire.read_retrieve_request(request), deadline))

        return await self._compute(work, context)

    async def Rank(self, request: feed_pb2.RankRequest, context: Any) -> feed_pb2.RankResponse:
        def work(feed: Feed, deadline: Deadline) -> feed_pb2.RankResponse:
            ranked = feed.rank(request.user_id, request.video_ids, request.surface, request.now_ms, deadline)
            return wire.write_ranked(ranked)

        return await self._compute(work, context)

    async def LogEvents(self, request: feed_pb2.LogEventsRequest, context: Any) -> feed_pb2.LogEventsResponse:
        try:
            check_count("events", len(request.events), 1, MAX_EVENTS)
            clock_ms = self._live.feed.now_ms()
            events = [wire.read_event(message, clock_ms) for message in request.events]
            check_events(events, clock_ms)
            stored = self._store.log_events(self._live.feed.complete(events))
            return wire.write_outcome(await asyncio.wrap_future(stored))
        except Exception as error:
            await _abort(context, error)

    async def UpsertVideos(self, request: feed_pb2.UpsertVideosRequest, context: Any) -> feed_pb2.UpsertVideosResponse:
        def work() -> feed_pb2.UpsertVideosResponse:
            outcome = self._live.upsert([wire.read_video(message) for message in request.videos])
            return feed_pb2.UpsertVideosResponse(added=outcome.added, replaced=outcome.replaced)

        return await self._change(work, context)

    async def RemoveVideos(self, request: feed_pb2.RemoveVideosRequest, context: Any) -> feed_pb2.RemoveVideosResponse:
        def work() -> feed_pb2.RemoveVideosResponse:
            outcome = self._live.remove(request.video_ids)
            return feed_pb2.RemoveVideosResponse(removed=outcome.removed, unknown=outcome.unknown)

        return await self._change(work, context)

    def close(self) -> None:
        """Let running computations end."""
        self._uploader.shutdown()
        self._workers.shutdown()

    async def _change(self, work: Callable[[], Any], context: Any) -> Any:
        """Uploads and removals one after another, on a thread of their own: no page waits behind a thousand uploads."""
        self._changes_waiting += 1
        try:
            if self._changes_waiting > self._config.max_changes_waiting:
                most = self._config.max_changes_waiting
                raise StoreBusyError(f"{most} uploads and removals are waiting: send the same again later")
            return await asyncio.get_running_loop().run_in_executor(self._uploader, work)
        except Exception as error:
            await _abort(context, error)
        finally:
            self._changes_waiting -= 1

    async def _compute(self, work: Callable[[Feed, Deadline], Any], context: Any) -> Any:
        """Run on a worker thread with one feed; the deadline counts from the call's arrival, queueing included."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > NO_CLIENT_DEADLINE_S:
            remaining_s = self._config.default_deadline_ms / 1000.0
        deadline = Deadline.after(min(remaining_s, self._config.longest_deadline_ms / 1000.0))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work, self._live.feed, deadline)
        except Exception as error:
            await _abort(context, error)


async def _abort(context: Any, error: Exception) -> NoReturn:
    """The one place where our errors become gRPC's."""
    if isinstance(error, InvalidRequestError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if isinstance(error, DeadlineExpiredError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    if isinstance(error, StoreBusyError):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"overload: {error}")
    if isinstance(error, sqlite3.Error):
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the store cannot be written; nothing was acknowledged")
    _log.error("a request failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the server's log has the details")
    raise error


def _one_core_each() -> None:
    """Thread counts are a thread's own in OpenMP: each worker says it for itself."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def check_address(config: ServerConfig) -> None:
    """Raises ValueError for an address beyond this machine that nobody asked for."""
    try:
        loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        loopback = config.host == "localhost"
    if not loopback and not config.insecure_public:
        raise ValueError(
            f"host {config.host!r} can be reached from other machines, and this server has neither TLS nor passwords: "
            "use 127.0.0.1 behind a proxy, or say insecure_public if the network is trusted"
        )


class FeedServer:
    """Start, follow LIVE, drain."""

    def __init__(self, registry: Path, store: Path, config: ServerConfig | None = None) -> None:
        self.config = config or ServerConfig()
        check_address(self.config)
        device = resolve(self.config.device)
        self.store = SqliteStore(store)
        try:
            scan_on = None if is_cpu(device) else device
            self.live = LiveFeed(Registry(registry), self.store, self.config.live, scan_on)
        except Exception:
            self.store.close()
            raise
        self.port = 0
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._servicer = FeedServicer(self.live, self.store, self.config)

    async def start(self) -> None:
        """Bind and answer; `port` is known from here on."""
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=self.config.max_in_flight,
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        )
        feed_pb2_grpc.add_FeedServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        self.port = self._server.add_insecure_port(f"{host}:{self.config.port}")
        await self._server.start()
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        self._poller = asyncio.create_task(self._follow_live())

    async def drain(self) -> None:
        """NOT_SERVING first, then no new calls, then the calls in flight end, then the log is written out."""
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(self.config.drain_notice_s)
        self._poller.cancel()
        await self._server.stop(self.config.drain_grace_s)
        await asyncio.to_thread(self._servicer.close)
        await asyncio.to_thread(self.live.close)
        await asyncio.to_thread(self.store.close)

    async def _say(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _follow_live(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            await asyncio.to_thread(self.live.poll)


def serve(
    registry: Path,
    store: Path,
    config: ServerConfig | None = None,
    on_ready: Callable[[str, str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready(address, bundle version)` is called once calls are taken."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(_serve(FeedServer(registry, store, config), on_ready))


async def _serve(server: FeedServer, on_ready: Callable[[str, str], None] | None) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    address = f"{server.config.host}:{server.port}"
    version = server.live.feed.bundle.version
    _log.info("serving bundle %s at %s", version, address)
    if on_ready is not None:
        on_ready(address, version)
    await stopping.wait()
    await server.drain()
