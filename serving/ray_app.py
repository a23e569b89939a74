"""The same feed on Ray Serve: replicas behind one gRPC ingress, for more traffic than one machine answers.

    serve run deploy/serve.yaml

Every replica is what `serving.server` is behind its port: a servicer over a `LiveFeed` that follows LIVE itself, so a
new bundle is loaded beside the old one and no replica is restarted for it. Replicas share one Redis. Serve's ingress
listens on every interface without TLS, hands no deadline on, and answers for its own health.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext

from candidate_gen.live import LiveConfig
from features.artifacts import Registry
from serving.calls import OutsideCall, StatusError
from serving.metrics import Metrics
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.scorer import scorer_named
from serving.security import ServerSecurity, Tokens
from serving.server import SWITCH_INTERVAL_S
from serving.server_config import ServerConfig
from serving.servicer import FeedServicer
from serving.stores import is_redis, open_store
from serving.swap import LiveFeed

_log = logging.getLogger(__name__)
EVERY_INTERFACE = "0.0.0.0"  # noqa: S104 - where Serve's gRPC proxy listens, whatever it is told


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """What `args` of the application in deploy/serve.yaml may say; the rest is Serve's own."""

    registry: str
    """Folder of bundles that every node sees."""
    store: str
    """redis://HOST:PORT/DB, shared by all replicas."""
    tokens: str | None = None
    """File of bearer tokens; a call must bring one."""
    insecure_public: bool = False
    """Has to be said, as Serve's ingress is open to the network and not encrypted."""
    threads: int = 1
    """Requests computed at once; the `num_cpus` that Serve reserves for a replica."""
    scorer: str = "auto"
    default_deadline_ms: float = 1_000.0
    """Of every call: the client's own ends it at the ingress only."""
    poll_s: float = 1.0

    @classmethod
    def read(cls, args: dict[str, Any]) -> ReplicaConfig:
        """Raises ValueError or SecurityError naming the argument and the cure."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(args.keys() - set(known)):
            raise ValueError(f"args of the application: {unknown} are unknown, expected some of {known}")
        if missing := sorted({"registry", "store"} - args.keys()):
            raise ValueError(f"args of the application: {missing} are missing")
        config = cls(**args)
        if not is_redis(config.store):
            raise ValueError(f"args of the application: store {config.store!r} is one server's own; give redis://...")
        scorer_named(config.scorer)
        config.security().check_address(EVERY_INTERFACE)
        return config

    def security(self) -> ServerSecurity:
        """As the gRPC server would be told."""
        token_file = None if self.tokens is None else Path(self.tokens)
        return ServerSecurity(token_file=token_file, insecure_public=self.insecure_public)


@serve.deployment(
    max_ongoing_requests=64,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=20,
    ray_actor_options={"num_cpus": 1},
)
class FeedReplica:
    """One process that answers; constructed once its bundle is verified and has given its golden answers."""

    async def __init__(self, config: ReplicaConfig) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._config = config
        self._tokens = None if config.tokens is None else Tokens(Path(config.tokens))
        await asyncio.to_thread(self._open)
        self._ending = threading.Event()
        self._poller = threading.Thread(target=self._follow_live, name="follow-live", daemon=True)
        self._poller.start()

    async def GetFeed(self, request: pb.GetFeedRequest, grpc_context: RayServegRPCContext) -> pb.GetFeedResponse:
        return await self._answer(self._servicer.GetFeed, request, grpc_context)

    async def Retrieve(self, request: pb.RetrieveRequest, grpc_context: RayServegRPCContext) -> pb.RetrieveResponse:
        return await self._answer(self._servicer.Retrieve, request, grpc_context)

    async def Rank(self, request: pb.RankRequest, grpc_context: RayServegRPCContext) -> pb.RankResponse:
        return await self._answer(self._servicer.Rank, request, grpc_context)

    async def LogEvents(self, request: pb.LogEventsRequest, grpc_context: RayServegRPCContext) -> pb.LogEventsResponse:
        return await self._answer(self._servicer.LogEvents, request, grpc_context)

    async def UpsertVideos(
        self, request: pb.UpsertVideosRequest, grpc_context: RayServegRPCContext
    ) -> pb.UpsertVideosResponse:
        return await self._answer(self._servicer.UpsertVideos, request, grpc_context)

    async def RemoveVideos(
        self, request: pb.RemoveVideosRequest, grpc_context: RayServegRPCContext
    ) -> pb.RemoveVideosResponse:
        return await self._answer(self._servicer.RemoveVideos, request, grpc_context)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises: one that no longer follows LIVE."""
        if not self._poller.is_alive():
            raise RuntimeError("this replica no longer follows LIVE")

    def __del__(self) -> None:
        """Called by Serve once no call is in flight: what waits for the store is written."""
        if not hasattr(self, "_poller"):
            return
        self._ending.set()
        self._poller.join()
        for close in (self._servicer.close, self._live.close, self._store.close):
            close()

    def _open(self) -> None:
        config = self._config
        of_server = ServerConfig(threads=config.threads, default_deadline_ms=config.default_deadline_ms)
        self._store = open_store(config.store)
        try:
            self._live = LiveFeed(
                Registry(Path(config.registry)), self._store, LiveConfig(flush=False), None, scorer_named(config.scorer)
            )
        except Exception:
            self._store.close()
            raise
        self._servicer = FeedServicer(self._live, self._store, of_server, Metrics(), None)
        _log.info("replica answers from bundle %s", self._live.version)

    async def _answer(
        self, call: Callable[[Any, Any], Awaitable[Any]], request: Any, grpc_context: RayServegRPCContext
    ) -> Any:
        try:
            self._check_token(grpc_context)
            return await call(request, OutsideCall(grpc_context.invocation_metadata()))
        except StatusError as error:
            grpc_context.set_code(error.code)
            grpc_context.set_details(error.details)
            raise

    def _check_token(self, grpc_context: RayServegRPCContext) -> None:
        if self._tokens is None:
            return
        if not self._tokens.shown(
            [text for name, text in grpc_context.invocation_metadata() if name == "authorization"]
        ):
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "no known token: send `authorization: Bearer TOKEN`")

    def _follow_live(self) -> None:
        while not self._ending.wait(self._config.poll_s):
            self._live.poll()
            if self._tokens is not None:
                self._tokens.refresh()


def app(args: dict[str, Any]) -> Application:
    """What `import_path: serving.ray_app:app` builds; `args` are those of the application in the file."""
    return FeedReplica.bind(ReplicaConfig.read(args))
