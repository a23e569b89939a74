"""The server: grpc.aio in front of a `LiveFeed`, with health, reflection, metrics, and an end that fails no call.

Loopback unless told otherwise (`serving.security`); the calls themselves are in `serving.servicer`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from candidate_gen.index.device import is_cpu, resolve
from features.artifacts import Registry
from serving.handlers import SERVICE, add_to_server
from serving.limits import MAX_MESSAGE_BYTES
from serving.metrics import Metrics, Reading
from serving.security import AskToken, SecurityError, Tokens
from serving.server_config import ServerConfig
from serving.servicer import FeedServicer, Tracer
from serving.store import EventStore
from serving.stores import open_store
from serving.swap import LiveFeed

_log = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 0.000_5
"""A thread that waits for the interpreter asks for it after this long; Python's 5 ms are a good part of an answer."""
_ROOM_FOR_OTHERS = 256
"""Calls at once beyond the pages in flight: events, uploads, health, and pages being refused with a reason."""


class FeedServer:
    """Start, follow LIVE, drain."""

    def __init__(self, registry: Path, store: Path | str, config: ServerConfig | None = None) -> None:
        """`store`: an SQLite file, or redis://... as text."""
        self.config = config or ServerConfig()
        self.config.security.check_address(self.config.host)
        self._credentials = self.config.security.credentials()
        token_file = self.config.security.token_file
        self._tokens = None if token_file is None else Tokens(token_file)
        device = resolve(self.config.device)
        self._tracer = None if self.config.otlp is None else _tracing(self.config.otlp)
        self.store = open_store(store, self.config.shortlist_share)
        try:
            scan_on = None if is_cpu(device) else device
            self.live = LiveFeed(Registry(registry), self.store, self.config.live, scan_on, self.config.scorer)
        except Exception:
            self.store.close()
            raise
        self.metrics = Metrics()
        self.port = self.metrics_port = self.web_port = 0
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._servicer = FeedServicer(self.live, self.store, self.config, self.metrics, self._tracer)
        self.metrics.read_at_scrape(_readings(self.live, self.store, self._servicer), lambda: self.live.version)
        self._metrics_server = self._web = None

    async def start(self) -> None:
        """Bind and answer; `port`, `metrics_port` and `web_port` are known from here on. Raises SecurityError when TLS
        files do not fit each other, RuntimeError or OSError when a port is taken."""
        ask = () if self._tokens is None else (AskToken(self._tokens, self._unauthenticated),)
        self._server = grpc.aio.server(
            interceptors=ask,
            maximum_concurrent_rpcs=self.config.max_in_flight + _ROOM_FOR_OTHERS,
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
        )
        add_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = self._bind()
        if self.config.metrics_port is not None:
            self._metrics_server = self.metrics.listen(self.config.metrics_host, self.config.metrics_port)
            self.metrics_port = self._metrics_server.server_port
        if self.config.web_port is not None:
            from serving.web import WebGateway  # a server without a page needs no HTTP

            self._web = WebGateway(self._servicer, self.live, self.config.security, self._tokens, self._unauthenticated)
            self.web_port = await self._web.start(self.config.host, self.config.web_port, self.config.drain_grace_s)
        await self._server.start()
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        self._poller = asyncio.create_task(self._follow_live())

    async def drain(self) -> None:
        """NOT_SERVING first, then no new calls, then the calls in flight end, then the log is written out."""
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(self.config.drain_notice_s)
        self._poller.cancel()
        if self._web is not None:
            await self._web.close()
        await self._server.stop(self.config.drain_grace_s)
        for close in (self._servicer.close, self.live.close, self.store.close):
            await asyncio.to_thread(close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    def _unauthenticated(self) -> None:
        self.metrics.refused("unauthenticated")

    def _bind(self) -> int:
        address = f"{_host(self.config.host)}:{self.config.port}"
        if self._credentials is None:
            return self._server.add_insecure_port(address)
        try:
            return self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise SecurityError(
                f"{address} cannot be opened with TLS: it is taken, or --tls-cert and --tls-key do not fit each other"
            ) from error

    async def _say(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _follow_live(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            await asyncio.to_thread(self.live.poll)
            if self._tokens is not None:
                await asyncio.to_thread(self._tokens.refresh)


def _host(host: str) -> str:
    """As it stands in an address with a port."""
    return f"[{host}]" if ":" in host else host


def _readings(live: LiveFeed, store: EventStore, servicer: FeedServicer) -> list[Reading]:
    """What is true at the scrape."""
    return [
        ("bundle_swaps_total", "Bundles that took over.", lambda: live.swaps),
        ("bundle_refused_total", "Bundles that LIVE named and that were refused.", lambda: live.refusals),
        ("uploads_live", "Videos uploaded or removed since the bundle was made.", lambda: live.n_uploads),
        ("in_flight", "Pages and rankings that wait or are computed.", lambda: servicer.admission.in_flight),
        ("workers_stalled", "1 while every worker hangs in a dependency.", lambda: servicer.admission.stalled),
        ("changes_waiting", "Uploads and removals that wait.", lambda: servicer.changes_waiting),
        ("store_waiting", "Writes that wait for the store.", lambda: store.waiting),
        ("store_available", "1 while the store answers.", lambda: store.available),
        ("store_slates_dropped_total", "Served slates that were not logged.", lambda: store.served_dropped),
    ]


def _tracing(endpoint: str) -> Tracer:
    try:
        from serving.tracing import Tracing
    except ImportError as error:
        raise ValueError(f"traces need {error.name}: pip install -r requirements/tracing.txt") from error
    return Tracing(endpoint)


def serve(
    registry: Path,
    store: Path | str,
    config: ServerConfig | None = None,
    on_ready: Callable[[str, str], None] | None = None,
    on_page: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready(address, bundle version)` is called once calls are taken,
    and before it `on_page(url)` where there is a page."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(_serve(FeedServer(registry, store, config), on_ready, on_page))


async def _serve(
    server: FeedServer, on_ready: Callable[[str, str], None] | None, on_page: Callable[[str], None] | None
) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    address = f"{server.config.host}:{server.port}"
    version = server.live.feed.bundle.version
    _log.info("serving bundle %s at %s", version, address)
    if on_page is not None and server.web_port:
        scheme = "http" if server.config.security.cert_file is None else "https"
        on_page(f"{scheme}://{_host(server.config.host)}:{server.web_port}/")
    if on_ready is not None:
        on_ready(address, version)
    await stopping.wait()
    await server.drain()
