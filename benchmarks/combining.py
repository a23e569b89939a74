"""Searches of many threads, each by itself or combined; and what combining gives a server.

    python -m benchmarks.combining --corpus FOLDER [--videos 1e6] [--registry PATH] [--json FILE]

The corpus is a folder of a trained video tower's vectors and the user tower's queries (`benchmarks.vectors`). Threads
of one process ask one query each, again and again, for as long as a pass lasts; every query leaves out 200 videos of
its own 1,000 best unless said otherwise. Combined, a thread that finds no free slot (there are as many as cores) waits
and goes along with others (`candidate_gen.together`), also where the index says that this shares no work. Both ways
take turns in every round; medians over the rounds are shown. BLAS, OpenMP and torch have one thread.

With `--registry`, GetFeed of 10 over gRPC on its live bundle: servers with several numbers of worker threads, with and
without combining, one after another. Clients and server share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import funnel, machine, our_index
from benchmarks.building import built
from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus, exact_answers
from candidate_gen.index import IndexConfig, RowFilter, VideoIndex
from candidate_gen.together import Found, SearchTogether

CLIENTS = (1, 2, 4, 8, 16)
WORKERS = (2, 4, 8, 16)
SEEN, SEEN_AMONG = 200, 1000
FLAT = 20_000
SEED = 1
PACKAGES = ("faiss-cpu", "torch", "numpy", "grpcio")
SERVER = """
import sys
from pathlib import Path
from candidate_gen.index import VideoIndex
from serving.server import serve
from serving.server_config import ServerConfig
registry, store, threads, combined = sys.argv[1:]
if combined == "alone":
    VideoIndex.shares_work = lambda *_: False
config = ServerConfig(port=0, drain_notice_s=0, threads=int(threads))
serve(Path(registry), Path(store), config, lambda *ready: print(*ready, flush=True))
"""
_opened: dict[str, Case] = {}


@dataclass(slots=True)
class Watched:
    """An index that is told whether to share work, and counts its calls."""

    index: VideoIndex
    combined: bool
    calls: int = 0

    def search(self, query_QD: np.ndarray, k: int, **options: Any) -> Found:
        """The index's."""
        self.calls += 1
        return self.index.search(query_QD, k, **options)

    def shares_work(self, allowed: RowFilter, k: int) -> bool:
        """What this pass is about."""
        return self.combined

    @property
    def slots(self) -> int | None:
        """The index's."""
        return self.index.slots


@dataclass(frozen=True, slots=True)
class Case:
    """An index, a filter, and what each query leaves out. Q queries, S seen videos."""

    index: VideoIndex
    allowed: RowFilter
    query_QD: np.ndarray
    seen_QS: np.ndarray | None
    k: int

    def ask(self, together: SearchTogether, number: int) -> None:
        """One query."""
        excluded = {} if self.seen_QS is None else {"excluded_rows": self.seen_QS[number]}
        together(self.query_QD[number], self.k, self.allowed, **excluded)


@dataclass(slots=True)
class Loop:
    """Threads that ask until they are stopped; milliseconds of every answer."""

    ask: Callable[[int], None]
    n_queries: int
    wall_ms: list[float] = field(default_factory=list)
    stopped: bool = False

    def run(self, clients: int, seconds: float) -> tuple[float, float]:
        """Wall and CPU seconds that it took."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        start, cpu = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self.stopped = True
        for thread in threads:
            thread.join()
        return time.perf_counter() - start, time.process_time() - cpu

    def _client(self, number: int) -> None:
        order = np.random.default_rng(number).permutation(self.n_queries)
        at = 0
        while not self.stopped:
            start = time.perf_counter()
            self.ask(int(order[at % len(order)]))
            self.wall_ms.append(1000 * (time.perf_counter() - start))
            at += 1


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.combining", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of videos-*.npy, queries.npy")
    parser.add_argument("--videos", type=float, default=1e6)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--k", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--registry", type=Path, help="also measure a server on its live bundle")
    parser.add_argument("--requests", type=int, default=200, help="to each server, after as many to warm up")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="keeps the built indexes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    figures: dict[str, Any] = {"machine": machine.describe_at_rest(PACKAGES, console), "k": options.k}
    figures["searches"] = searches(options, console)
    show_searches(figures["searches"], options.k, console)
    if options.registry:
        figures["servers"] = servers(options.registry, options.requests, console)
        show_servers(figures["servers"], console)
    console.print(machine.line(figures["machine"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def searches(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every case at every number of clients, both ways."""
    corpus, n = Corpus.open(options.corpus), int(options.videos)
    name, flat = f"{our_index.NAME} as it is by itself", min(FLAT, n)
    folders = [
        built(name, our_index.build, corpus, size, options.work, console, IndexConfig(kind=kind))["folder"]
        for size, kind in ((n, "ivf"), (flat, "flat"))
    ]
    query_QD = corpus.queries(options.queries)
    best = [exact_answers(corpus, size, query_QD, min(SEEN_AMONG, size), options.work) for size in (n, flat)]
    rows = []
    with FreshProcess(threads=1) as process:
        names = process.run(_open, folders, query_QD, best, options.k)
        for case in names:
            for clients in CLIENTS:
                rounds = [
                    [process.run(_pass, case, clients, combined, options.seconds) for combined in (False, True)]
                    for _ in range(options.rounds)
                ]
                alone, combined = map(_median, zip(*rounds, strict=True))
                rows.append({"case": case, "clients": clients, "alone": alone, "combined": combined})
            console.print(f"{case}: measured")
    return rows


def servers(registry: Path, n_requests: int, console: Console) -> list[dict[str, Any]]:
    """Every number of worker threads, both ways, at several numbers of clients."""
    users, now_ms = funnel.users_and_instant(registry)
    rows = []
    for workers in WORKERS:
        for way in ("alone", "combined"):
            with tempfile.TemporaryDirectory() as scratch:
                store = Path(scratch) / "events.sqlite"
                with funnel.server(registry, store, SERVER, str(workers), way) as (process, address):
                    asked = np.random.default_rng(SEED).choice(users, n_requests).tolist()
                    funnel.together(address, asked, now_ms, max(WORKERS), process.pid)
                    for clients in CLIENTS:
                        run = funnel.together(address, asked, now_ms, clients, process.pid)
                        rows.append({"workers": workers, "way": way, **run})
            console.print(f"{workers} worker threads, {way}: measured")
    return rows


def show_searches(rows: list[dict[str, Any]], k: int, console: Console) -> None:
    """One row a case and number of clients; ratios above 1 are in favour of combining."""
    console.print(f"\nTop {k}, one query a call; each cell: alone, combined, and how many times as good")
    table = Table("case", "clients", "queries/s", "CPU ms a query", "p50 ms", "p99 ms", "queries a search")
    for row in rows:
        names = ("per_s", "cpu_ms", "p50_ms", "p99_ms")
        cells = [_cell(row["alone"][name], row["combined"][name], name == "per_s") for name in names]
        table.add_row(row["case"], str(row["clients"]), *cells, f"{row['combined']['together']:.1f}")
    console.print(table)


def show_servers(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a server and number of clients."""
    console.print("\nGetFeed of 10 over gRPC")
    columns = ("worker threads", "searches", "clients", "requests/s", "p50 ms", "p99 ms", "server CPU ms", "not full")
    table = Table(*columns)
    for row in rows:
        table.add_row(
            str(row["workers"]),
            row["way"],
            str(row["clients"]),
            f"{row['per_s']:.1f}",
            f"{row['median_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{1000 * row['server_cpu_s'] / max(row['requests'], 1):.1f}",
            str(row["not_full"] + sum(row["refused"].values())),
        )
    console.print(table)


def _cell(alone: float, combined: float, more_is_better: bool) -> str:
    digits = 0 if more_is_better else 2
    gain = combined / alone if more_is_better else alone / combined
    return f"{alone:,.{digits}f}, {combined:,.{digits}f}, {gain:.2f}"


def _open(folders: list[str], query_QD: np.ndarray, best: list[np.ndarray], k: int) -> list[str]:
    import torch

    torch.set_num_threads(1)
    lists, flat = (VideoIndex(Path(folder)) for folder in folders)
    generator = np.random.default_rng(SEED)
    seen, seen_flat = (
        np.stack([generator.choice(top_M, SEEN, replace=False) for top_M in top_QM]) + 1 for top_QM in best
    )
    few = lists.allow(generator.random(lists.n_rows) < 0.01)
    _opened.update(
        {
            "inverted lists, nothing seen": Case(lists, lists.everything, query_QD, None, k),
            "inverted lists": Case(lists, lists.everything, query_QD, seen, k),
            f"a filter that 1% pass of {len(lists):,}, scanned": Case(lists, few, query_QD, seen, k),
            f"{len(flat):,} videos, scanned": Case(flat, flat.everything, query_QD, seen_flat, k),
        }
    )
    return list(_opened)


def _pass(name: str, clients: int, combined: bool, seconds: float) -> dict[str, float]:
    case = _opened[name]
    watched = Watched(case.index, combined)
    together = SearchTogether(watched)
    loop = Loop(lambda number: case.ask(together, number), len(case.query_QD))
    wall_s, cpu_s = loop.run(clients, seconds)
    count = len(loop.wall_ms)
    return {
        "per_s": count / wall_s,
        "cpu_ms": 1000 * cpu_s / count,
        "p50_ms": float(np.median(loop.wall_ms)),
        "p99_ms": float(np.percentile(loop.wall_ms, 99)),
        "together": count / watched.calls,
    }


def _median(passes: tuple[dict[str, float], ...]) -> dict[str, float]:
    return {name: float(np.median([one[name] for one in passes])) for name in passes[0]}


if __name__ == "__main__":
    main()
