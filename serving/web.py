"""The page for people, and the HTTP gateway behind it: JSON in, the servicer's own GetFeed and LogEvents, JSON out.

JSON is protobuf's own mapping, so a request here is one over gRPC: the same limits, admission, deadlines, ladder and
metrics. A browser brings dangers that gRPC has not: pages of other sites may call (hence JSON only, same origin only,
and no foreign name for a loopback address), and what is shown may hold markup (hence a policy without inline code).
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
from aiohttp import web
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from features.inputs import UNKNOWN_UPLOAD
from features.spec import MultiValued
from serving.bundle import FeedBundle
from serving.calls import OutsideCall, StatusError
from serving.limits import MAX_MESSAGE_BYTES
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.security import ServerSecurity, Tokens, is_loopback
from serving.servicer import FeedServicer
from serving.swap import LiveFeed

_log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
FILES = {"index.html": "text/html", "feed.css": "text/css"} | dict.fromkeys(
    ("feed.js", "card.js", "why.js"), "text/javascript"
)
PICKED_USERS = 24
"""Users offered by the page: those with the longest histories."""
PAST_LOG_MS = 60_000
"""A log that ended long before its bundle was made goes on so long after its last event."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""What the servicer may say, as google.rpc.Code maps it to HTTP; all else is 500."""
_TRACE = ("traceparent", "tracestate")


class WebGateway:
    """Serves the page until it is closed; lives on the event loop of the gRPC server."""

    def __init__(
        self,
        servicer: FeedServicer,
        live: LiveFeed,
        security: ServerSecurity,
        tokens: Tokens | None,
        on_unauthenticated: Callable[[], None],
    ) -> None:
        self._servicer, self._live, self._security = servicer, live, security
        self._tokens, self._on_unauthenticated = tokens, on_unauthenticated
        self._about: dict[str, Any] = {}
        self._local = True

    async def start(self, host: str, port: int, grace_s: float) -> int:
        """Bind; returns the port. `grace_s`: what calls in flight get to end once it is closed. Raises OSError when the
        port is taken, SecurityError for files of TLS that cannot be used."""
        self._local = is_loopback(host)
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/", self._file)
        app.router.add_get("/{name}", self._file)
        app.router.add_post("/api/about", self._say_about)
        app.router.add_post("/api/GetFeed", self._get_feed)
        app.router.add_post("/api/LogEvents", self._log_events)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=grace_s)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=_tls(self._security), reuse_port=False).start()
        return self._runner.addresses[0][1]

    async def close(self) -> None:
        """Calls in flight end first."""
        await self._runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """The one place where calls are let in and errors become answers."""
        try:
            self._check(request)
            response = await handler(request)
        except StatusError as error:
            response = _refusal(HTTP.get(error.code, 500), error.code.name, error.details)
        except web.HTTPException as error:
            response = _refusal(error.status, error.reason.upper().replace(" ", "_"), error.text or error.reason)
        except Exception:
            _log.exception("a call of the page failed")
            response = _refusal(500, grpc.StatusCode.INTERNAL.name, "the server's log has the details")
        response.headers.update(HEADERS)
        return response

    def _check(self, request: web.Request) -> None:
        """Same origin, and where the server has tokens, one of them for every call."""
        denied = grpc.StatusCode.PERMISSION_DENIED
        host = request.url.host or ""
        if self._local and not is_loopback(host):
            raise StatusError(denied, f"this server answers to this machine alone, not to the name {host!r}")
        if request.method != "POST":
            return
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:  # a proxy may end TLS, so not the scheme
            raise StatusError(denied, "pages of other sites may not call this server")
        if request.content_type != "application/json":
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "send JSON: content-type application/json")
        if self._tokens is not None and not self._tokens.shown(request.headers.getall("Authorization", [])):
            self._on_unauthenticated()
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "no known token: send `authorization: Bearer TOKEN`")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index.html")
        if name not in FILES:
            raise web.HTTPNotFound(text=f"there is no {name!r} here")
        return web.Response(text=(PAGE / name).read_text(), content_type=FILES[name], charset="utf-8")

    async def _get_feed(self, request: web.Request) -> web.Response:
        answer = await self._servicer.GetFeed(await _read(request, pb.GetFeedRequest()), _call(request))
        ids = [item.video_id for item in answer.items]
        return web.json_response({"page": _plain(answer), "videos": described(self._live.feed.bundle, ids)})

    async def _log_events(self, request: web.Request) -> web.Response:
        answer = await self._servicer.LogEvents(await _read(request, pb.LogEventsRequest()), _call(request))
        return web.json_response(_plain(answer))

    async def _say_about(self, request: web.Request) -> web.Response:
        bundle = self._live.feed.bundle
        if self._about.get("bundle_version") != bundle.version:
            self._about = await asyncio.to_thread(about, bundle)
        return web.json_response(self._about)


def about(bundle: FeedBundle) -> dict[str, Any]:
    """What the page needs before its first feed; ids are text, as JavaScript's numbers end at 53 bits."""
    n_events_U = np.diff(bundle.history.user_start)[1:]
    most = np.argsort(-n_events_U, kind="stable")[:PICKED_USERS]
    lag_ms = bundle.created_ms - bundle.newest_event_ms - PAST_LOG_MS if bundle.newest_event_ms else 0
    return {
        "bundle_version": bundle.version,
        "surfaces": list(bundle.config.surfaces),
        "users": [str(user_id) for user_id in bundle.users.ids[most].tolist()],
        "log_lag_ms": max(lag_ms, 0),
    }


def described(bundle: FeedBundle, ids: list[int]) -> dict[str, dict[str, Any]]:
    """What a card is drawn from and no answer of the feed holds: upload time, and topics as the models read them."""
    rows = bundle.videos.rows_of(np.array(ids, np.int64))
    lists = [feature.name for feature in bundle.encoder.spec.video if isinstance(feature, MultiValued)]
    topics = [[]] * len(rows)
    if lists:
        slots = bundle.videos.columns.slice(lists[0])
        topics = [[int(row) for row in of_video if row >= 0] for of_video in bundle.videos.sparse[rows][:, slots]]
    uploads = [None if at == UNKNOWN_UPLOAD else at for at in bundle.upload_ts_ms[rows].tolist()]
    return {
        str(video): {"upload_ts_ms": upload, "topics": of_video}
        for video, upload, of_video in zip(ids, uploads, topics, strict=True)
    }


def _call(request: web.Request) -> OutsideCall:
    return OutsideCall([(name, request.headers[name]) for name in _TRACE if name in request.headers])


async def _read(request: web.Request, message: Message) -> Any:
    try:
        asked = json.loads(await request.text())
        if not isinstance(asked, dict):
            raise ParseError("expected an object")
        return ParseDict(asked, message)
    except (ParseError, ValueError, TypeError, RecursionError) as error:
        name = type(message).__name__
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"this is not a {name} in JSON: {error}") from None


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _refusal(status: int, code: str, details: str) -> web.Response:
    return web.json_response({"code": code, "details": details}, status=status)


def _tls(security: ServerSecurity) -> ssl.SSLContext | None:
    """The port of the page is protected as that of gRPC."""
    if security.credentials() is None:  # which also says what is wrong with the files
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=security.client_ca_file)
    context.load_cert_chain(str(security.cert_file), str(security.key_file))
    if security.client_ca_file is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
