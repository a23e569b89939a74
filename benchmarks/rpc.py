"""Rank of 500 candidates: what the wire adds to the same work in this process, and what batching of many callers gives.

    python -m benchmarks.rpc --registry PATH [--json FILE] [--candidates 500] [--requests 300] [--rounds 5]

The server is a process of its own. Each request is answered here (`Feed.rank`, and the scorer alone) and by the server,
by turns, so both see the same machine; differences are between medians of a round, and the median over rounds is shown.
Then 16 callers at once against two servers by turns: the product's, whose threads score side by side, and one whose
threads hand their requests to one batch (`Ranker.score_together`), with 500 candidates and with 50. Callers and server
share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.callers import middle, together
from benchmarks.funnel import server, users_and_instant
from benchmarks.machine import cpu_s, describe_at_rest, line
from features.artifacts import Registry
from ranking.compiled import best_dense_type, compile_apart, default_cache
from serving import wire
from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.hydrate import hydrate, model_inputs
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc
from serving.scorer import SCORERS, Scorer, accelerate
from serving.store import SqliteStore

CALLERS = 16
FEWER = 10
"""Batching is also measured with so many times fewer candidates, where a request alone leaves the most unused."""
SCRIPT = """
import sys
from pathlib import Path
from serving.server import serve
from serving.server_config import ServerConfig
registry, store, batching, threads, scorer = sys.argv[1:]
if batching == "batched":
    from candidate_gen.combine import Combiner
    from ranking.infer import Ranker
    alone, combiners = Ranker.score, {}
    def answer(ranker, requests):  # score_together asks `score` for the batch
        return ranker.score_together(requests) if len(requests) > 1 else [alone(ranker, requests[0])]
    def score(ranker, inputs):
        if len(inputs.surface_B) > 1:
            return alone(ranker, inputs)
        if ranker not in combiners:
            combiners[ranker] = Combiner(lambda requests: answer(ranker, requests), slots=2, at_most=8)
        return combiners[ranker]("rank", inputs)
    Ranker.score = score
config = ServerConfig(port=0, drain_notice_s=0, threads=int(threads), scorer=scorer, default_deadline_ms=10_000)
serve(Path(registry), Path(store), config, lambda *ready: print(*ready, flush=True))
"""
KINDS = {"side by side": ("alone", "2"), "batched": ("batched", str(CALLERS))}


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.rpc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--requests", type=int, default=300, help="a round, of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scorer", choices=SCORERS, default="auto")
    options, console = parser.parse_args(), Console(width=110)
    machine = describe_at_rest(("grpcio", "protobuf", "torch", "numpy"), console)
    figures = measure(options.registry, options.scorer, options.candidates, options.requests, options.rounds) | {
        "machine": machine
    }
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(registry: Path, scorer: Scorer, n_candidates: int, n_requests: int, rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    torch.set_num_threads(1)
    verified, (users, now_ms) = Registry(registry).open(), users_and_instant(registry)
    if scorer != "plain":  # a server would compile beside its first requests
        dense = best_dense_type() if scorer == "auto" else scorer
        compile_apart(verified.folder / "ranker", dense, default_cache())
    bundle = FeedBundle.load(verified)
    accelerate(bundle.ranker, verified.folder / "ranker", scorer)
    rng = np.random.default_rng(1)
    chosen = rng.choice(users, n_requests)

    def of_size(n: int) -> list[pb.RankRequest]:
        rows = [rng.choice(len(bundle.videos), n, replace=False) + 1 for _ in chosen]
        ids = [bundle.videos.ids_of(rows_N) for rows_N in rows]
        return [
            pb.RankRequest(user_id=u, video_ids=v, now_ms=now_ms) for u, v in zip(chosen.tolist(), ids, strict=True)
        ]

    requests, few = of_size(n_candidates), of_size(n_candidates // FEWER)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        feed = Feed(bundle, SqliteStore(Path(scratch) / "here.sqlite"))
        servers = {
            name: running.enter_context(server(registry, Path(scratch) / f"{name}.sqlite", SCRIPT, *arguments, scorer))
            for name, arguments in KINDS.items()
        }
        process, address = servers["side by side"]
        alone = [_by_turns(feed, address, process.pid, requests) for _ in range(rounds + 1)][1:]
        many = [_both_ways(servers, asked, rounds) for asked in (requests, few)]
    one = middle(alone)
    return {
        "candidates": n_candidates,
        "bytes": {"request": requests[0].ByteSize(), "answer": int(one.pop("answer_bytes"))},
        "engine": bundle.ranker.engine,
        "one_caller": one,
        "callers": CALLERS,
        "many_callers": many,
    }


def _both_ways(servers: dict[str, Any], requests: list[pb.RankRequest], rounds: int) -> dict[str, Any]:
    """Both servers by turns, after a round to warm up; the gain is the median of the rounds'."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for turn in range(rounds + 1):
        for name, (process, address) in servers.items():
            once = asyncio.run(_together(address, process.pid, requests))
            if turn:
                found[name].append(once)
    gains = [b["per_s"] / a["per_s"] for a, b in zip(found["side by side"], found["batched"], strict=True)]
    return {
        "candidates": len(requests[0].video_ids),
        "servers": {name: middle(rounds_of) for name, rounds_of in found.items()},
        "batching_gain": float(np.median(gains)),
    }


def _by_turns(feed: Feed, address: str, pid: int, requests: list[pb.RankRequest]) -> dict[str, float]:
    """Medians of a round, in milliseconds; the calls take turns request by request."""
    took: dict[str, list[float]] = {}
    server_cpu_s = 0.0

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin_s = time.perf_counter()
        found = work()
        took.setdefault(name, []).append((time.perf_counter() - begin_s) * 1000.0)
        return found

    with grpc.insecure_channel(address) as channel:
        stub, health = feed_pb2_grpc.FeedServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        for request in requests:
            inputs = _inputs(feed, request)
            timed("scorer", lambda inputs=inputs: feed.bundle.ranker.score(inputs))
            here = timed("in_process", lambda r=request: feed.rank(r.user_id, r.video_ids, now_ms=r.now_ms))
            before_s = cpu_s(pid)
            answer = timed("over_the_wire", lambda r=request: stub.Rank(r, timeout=30))
            server_cpu_s += cpu_s(pid) - before_s
            timed("empty_call", lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=30))  # pyright: ignore[reportAttributeAccessIssue]
            timed("answer_written", lambda here=here: wire.write_ranked(here).SerializeToString())
            if not np.allclose(answer.values, here.value_N):
                raise ArithmeticError("the server's values differ from this process's")
            for stage in answer.stages:
                took.setdefault(f"server_{stage.name}", []).append(stage.ms)
    medians = {f"{name}_ms": float(np.median(ms)) for name, ms in took.items()}
    return medians | {
        "added_ms": medians["over_the_wire_ms"] - medians["in_process_ms"],
        "added_to_scorer_ms": medians["over_the_wire_ms"] - medians["scorer_ms"],
        "server_cpu_ms": 1000.0 * server_cpu_s / len(requests),
        "answer_bytes": answer.ByteSize(),
    }


def _inputs(feed: Feed, request: pb.RankRequest) -> Any:
    state = feed.store.user(request.user_id)
    surface = feed.bundle.config.surfaces[0]
    query = hydrate(feed.bundle, state, user_id=request.user_id, now_ms=request.now_ms, surface=surface)
    return model_inputs(feed.bundle, query, feed.bundle.videos.rows_of(np.array(request.video_ids)))


async def _together(address: str, pid: int, requests: list[pb.RankRequest]) -> dict[str, float]:
    """Every request once more, from so many callers at a time."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        await stub.Rank(requests[0], timeout=30)
        return await together(
            lambda request: stub.Rank(request, timeout=30),
            requests,
            callers=CALLERS,
            server_cpu_s=lambda: cpu_s(pid),
        )


def show(figures: dict[str, Any], console: Console) -> None:
    """Both tables."""
    one = figures["one_caller"]
    size = figures["bytes"]
    console.print(
        f"Rank of {figures['candidates']} candidates, {size['request']:,} bytes there and {size['answer']:,} back, "
        f"scorer {figures['engine']}"
    )
    table = Table("one caller", "p50 ms")
    for name, key in (
        ("the scorer alone, in this process", "scorer"),
        ("Feed.rank in this process", "in_process"),
        ("Rank over gRPC", "over_the_wire"),
        ("  more than Feed.rank", "added"),
        ("  more than the scorer alone", "added_to_scorer"),
        ("  of it: in the server, hydrate", "server_hydrate"),
        ("  of it: in the server, rank", "server_rank"),
        ("an empty call to the same server", "empty_call"),
        ("writing the answer", "answer_written"),
        ("CPU of the server a call", "server_cpu"),
    ):
        table.add_row(name, f"{one[f'{key}_ms']:.2f}")
    console.print(table)
    table = Table(
        f"{figures['callers']} callers",
        "candidates",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "server CPU ms",
        "callers' CPU ms",
    )
    for size in figures["many_callers"]:
        for name, found in size["servers"].items():
            rest = (f"{found[key]:.2f}" for key in ("p50_ms", "p99_ms", "server_cpu_ms", "callers_cpu_ms"))
            table.add_row(name, str(size["candidates"]), f"{found['per_s']:.0f}", *rest)
    console.print(table)
    for size in figures["many_callers"]:
        console.print(f"{size['candidates']} candidates, batched: {size['batching_gain']:.2f} times the requests/s")
    console.print(line(figures["machine"]))


if __name__ == "__main__":
    main()
