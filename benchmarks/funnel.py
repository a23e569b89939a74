"""GetFeed of 10 from the whole funnel, over gRPC, on the live published bundle.

    python -m benchmarks.funnel --registry PATH [--json FILE] [--requests 400] [--clients 8]

The server is a process of its own with an empty event log. Client and server share this machine's cores; CPU seconds
of the server stand beside the wall time. First one client (latency, and the stages' medians), then several
(throughput). Answers below the full level are counted, because a skipped ranker is quick.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_s, describe
from features.artifacts import Registry
from ranking.compiled import best_dense_type, compile_apart, default_cache
from serving.client import FeedClient
from serving.messages import FeedResponse, Level
from serving.scorer import SCORERS

K = 10
SERVER = """
import sys
from pathlib import Path
from serving.server import serve
from serving.server_config import ServerConfig
config = ServerConfig(port=0, drain_notice_s=0, scorer=sys.argv[3] if len(sys.argv) > 3 else "plain")
serve(Path(sys.argv[1]), Path(sys.argv[2]), config, lambda *ready: print(*ready, flush=True))
"""


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.funnel", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=400, help="measured, after a quarter as many to warm up")
    parser.add_argument("--clients", type=int, default=8, help="concurrent clients of the throughput run")
    parser.add_argument("--scorers", nargs="*", choices=SCORERS, default=["plain", "auto"], help="one server each")
    options = parser.parse_args()
    figures = measure(options.registry, options.requests, options.clients, options.scorers)
    show(figures, Console(width=110))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(registry: Path, n_requests: int, n_clients: int, scorers: Sequence[str]) -> dict[str, Any]:
    """All figures of one run: a server with each scorer, one after the other."""
    machine = describe(("torch", "torchrec", "faiss-cpu", "grpcio", "numpy"))
    bundle, (users, now_ms) = Registry(registry).open(), users_and_instant(registry)
    asked = np.random.default_rng(1).choice(users, n_requests * 2).tolist()
    runs = []
    for scorer in scorers:
        if scorer != "plain":  # a server would compile beside its first requests
            dense = best_dense_type() if scorer == "auto" else scorer
            compile_apart(bundle.folder / "ranker", dense, default_cache())
        with (
            tempfile.TemporaryDirectory() as scratch,
            server(registry, Path(scratch) / "store.sqlite", SERVER, scorer) as (process, address),
        ):
            pid = process.pid
            with FeedClient(address) as client:
                for user in asked[: n_requests // 4]:
                    client.get_feed(user, k=K, now_ms=now_ms)
                alone = _alone(client, asked[:n_requests], now_ms, pid)
            many = together(address, asked[n_requests:], now_ms, n_clients, pid)
        runs.append({"scorer": scorer, "one_client": alone, "many_clients": many})
    videos = np.load(bundle.path("videos/videos_ids.npy"), mmap_mode="r", allow_pickle=False)
    return {
        "bundle": {"version": bundle.version, "videos": len(videos), "users": len(users)},
        "machine": machine,
        "runs": runs,
    }


def users_and_instant(registry: Path) -> tuple[np.ndarray, int]:
    """The live bundle's user ids, and the millisecond after its last event."""
    bundle = Registry(registry).open()
    users, ts_ms = (
        np.load(bundle.path(name), mmap_mode="r", allow_pickle=False)
        for name in ("users/users_ids.npy", "history/history_ts_ms.npy")
    )
    return users, int(ts_ms.max(initial=1)) + 1


def show(figures: dict[str, Any], console: Console) -> None:
    """What each scorer's server did, and where the time of one request went."""
    machine, bundle, runs = figures["machine"], figures["bundle"], figures["runs"]
    console.print(
        f"GetFeed of {K} from {runs[0]['one_client']['candidates']:,.0f} candidates (median), {bundle['videos']:,} "
        f"videos, {bundle['users']:,} users, bundle {bundle['version']}"
    )
    table = Table("scorer", "clients", "requests", "median ms", "p99 ms", "requests/s", "server CPU s", "not full")
    for run in runs:
        for part in (run["one_client"], run["many_clients"]):
            table.add_row(
                run["scorer"],
                str(part["clients"]),
                str(part["requests"]),
                f"{part['median_ms']:.1f}",
                f"{part['p99_ms']:.1f}",
                f"{part['per_s']:.1f}",
                f"{part['server_cpu_s']:.2f}",
                str(part["not_full"] + sum(part.get("refused", {}).values())),
            )
    console.print(table)
    stages = Table("stage (one client), median ms", *(run["scorer"] for run in runs))
    for name in runs[0]["one_client"]["stages_ms"]:
        stages.add_row(name, *(f"{run['one_client']['stages_ms'][name]:.2f}" for run in runs))
    console.print(stages)
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores shared by clients and server, load average "
        f"{machine['load_average']:.1f} before the run, {machine['versions']}"
    )


def _alone(client: FeedClient, users: list[int], now_ms: int, pid: int) -> dict[str, Any]:
    latencies, answers = [], []
    cpu, start = cpu_s(pid), time.perf_counter()
    for user in users:
        at = time.perf_counter()
        answers.append(client.get_feed(user, k=K, now_ms=now_ms))
        latencies.append(time.perf_counter() - at)
    wall_s = time.perf_counter() - start
    figures = _figures(1, latencies, answers, wall_s, cpu_s(pid) - cpu)
    names = [stage.name for stage in answers[0].stages]
    by_stage = {name: [s.ms for a in answers for s in a.stages if s.name == name] for name in names}
    stages_ms = {name: float(np.median(values)) for name, values in by_stage.items()}
    stages_ms["wire and queue"] = figures["median_ms"] - sum(stages_ms.values())
    candidates = [stage.received for a in answers for stage in a.stages if stage.name == "arrange"]
    return {**figures, "stages_ms": stages_ms, "candidates": float(np.median(candidates))}


def together(address: str, users: list[int], now_ms: int, n_clients: int, pid: int) -> dict[str, Any]:
    """One request for each user, from so many clients at a time."""
    latencies: list[float] = []
    answers: list[FeedResponse] = []
    refused: list[str] = []

    def one(share: list[int]) -> None:
        with FeedClient(address) as client:
            for user in share:
                at = time.perf_counter()
                try:
                    answers.append(client.get_feed(user, k=K, now_ms=now_ms))
                except grpc.RpcError as error:
                    refused.append(error.code().name)  # pyright: ignore[reportAttributeAccessIssue]
                else:
                    latencies.append(time.perf_counter() - at)

    threads = [threading.Thread(target=one, args=(users[i::n_clients],)) for i in range(n_clients)]
    cpu, start = cpu_s(pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s = time.perf_counter() - start
    return {**_figures(n_clients, latencies, answers, wall_s, cpu_s(pid) - cpu), "refused": dict(Counter(refused))}


def _figures(
    clients: int, latencies: list[float], answers: list[FeedResponse], wall_s: float, server_cpu_s: float
) -> dict[str, Any]:
    return {
        "clients": clients,
        "requests": len(answers),
        "median_ms": float(np.median(latencies) * 1000),
        "p99_ms": float(np.percentile(latencies, 99) * 1000),
        "per_s": len(answers) / wall_s,
        "wall_s": wall_s,
        "server_cpu_s": server_cpu_s,
        "not_full": sum(answer.level != Level.FULL for answer in answers),
        "short": sum(len(answer.items) < K for answer in answers),
    }


@contextmanager
def server(
    registry: Path, store: Path, script: str = SERVER, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serving.server` on a registry, in a process of its own, and its address; ended at the end."""
    command = [sys.executable, "-c", script, str(registry), str(store), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout is not None else ""
            if not line:
                raise RuntimeError(f"the server on {registry} did not start; its error is above")
            yield process, line.split()[0]
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
