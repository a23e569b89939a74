"""The ranker of a registry behind other servers: `python -m benchmarks.server_peers KIND REGISTRY PORT SCORER`.

All answer the very `Feed.rank` that ours does, from the same message: a RankRequest's bytes in, a RankResponse's bytes
back. LitServe takes JSON, so there they travel as base64 text. Each computes two requests at once, on a thread each.
Annotations are evaluated here: FastAPI reads those of a function, also of one inside another.
"""

import logging
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.scorer import Scorer, scorer_named

AT_ONCE = 2
MEDIA = "application/x-protobuf"
GRPC_FUNCTION = "serving.protos.reelrank.v1.feed_pb2_grpc.add_FeedServiceServicer_to_server"


class RankerBehind:
    """The live bundle with an empty store."""

    def __init__(self, registry: str, scorer: Scorer) -> None:
        import torch

        from features.artifacts import Registry
        from serving.feed import Feed
        from serving.store import SqliteStore
        from serving.swap import load_bundle

        torch.set_num_threads(1)
        bundle = load_bundle(Registry(Path(registry)), scorer=scorer)
        self._feed = Feed(bundle, SqliteStore(Path(tempfile.mkdtemp()) / "store.sqlite"))

    def answer(self, request: pb.RankRequest) -> pb.RankResponse:
        """As the servicer's."""
        from serving import wire

        return wire.write_ranked(self._feed.rank(request.user_id, request.video_ids, request.surface, request.now_ms))

    def answer_bytes(self, raw: bytes) -> bytes:
        return self.answer(pb.RankRequest.FromString(raw)).SerializeToString()


def fastapi(registry: str, port: int, scorer: Scorer) -> None:
    """One process, uvloop and httptools, the ranker on two threads."""
    import asyncio

    import uvicorn
    from fastapi import FastAPI, Request, Response

    app, behind, pool = FastAPI(), RankerBehind(registry, scorer), ThreadPoolExecutor(AT_ONCE, initializer=_one_thread)

    @app.post("/rank")
    async def rank(request: Request) -> Response:
        work = partial(behind.answer_bytes, await request.body())
        return Response(await asyncio.get_running_loop().run_in_executor(pool, work), media_type=MEDIA)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", loop="uvloop", http="httptools")


def litserve(registry: str, port: int, scorer: Scorer) -> None:
    """Two worker processes, as it computes in processes."""
    from benchmarks.litserve_peer import serve

    serve(registry, port, scorer)


def ray_serve(registry: str, port: int, scorer: Scorer) -> None:
    """Two replicas behind one ingress, HTTP at `port` and gRPC at the next; the environment says how it is tuned."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(num_replicas=AT_ONCE, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
    class Replica:
        def __init__(self) -> None:
            self.behind = RankerBehind(registry, scorer)

        async def __call__(self, request: Request) -> Response:
            return Response(self.behind.answer_bytes(await request.body()), media_type=MEDIA)

        async def Rank(self, request: pb.RankRequest) -> pb.RankResponse:
            return self.behind.answer(request)

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        grpc_options=gRPCOptions(port=port + 1, grpc_servicer_functions=[GRPC_FUNCTION]),
    )
    serve.run(Replica.bind(), route_prefix="/rank")
    threading.Event().wait()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


KINDS: dict[str, Any] = {"fastapi": fastapi, "litserve": litserve, "ray_serve": ray_serve}

if __name__ == "__main__":
    kind, registry_path, at_port, named = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    KINDS[kind](registry_path, int(at_port), scorer_named(named))
