"""Retrieval of the top 100 beside other libraries: what each needs to build, to hold and to search.

    pip install --no-deps -r requirements/bench.txt      # once; a library that is not installed is left out, and named
    python -m benchmarks.retrieval_peers --corpus FOLDER [--videos 1e6] [--json FILE] [--only NAME ...]

The corpus is a folder of a trained video tower's vectors and the user tower's queries (`benchmarks.vectors`).
Every engine is built on two threads in a process of its own and written to disk (kept in --work, so that a second run
only searches), then opened in a fresh process with one thread. Its search parameters are swept over all queries, one
query at a time; the settings around the two target recalls are measured again in further rounds. In every round the
engines take turns, so that a disturbance meets all of them; medians over the rounds are shown. Latencies at recall .90
and .95 are read off each engine's own frontier, linear between its two nearest settings.

ScaNN is measured as `scann-core`: the same code and interface as PyPI's `scann`, whose wheel does not use AVX-512 (it
was 10 to 20% slower here at the same recall), and neither needs TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine, measure, our_index
from benchmarks.building import THREADS, built
from benchmarks.measure import Point
from benchmarks.peers import Engine, engines, is_installed
from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus, exact_answers

K = 100
TARGETS = (0.90, 0.95)
PACKAGES = ("faiss-cpu", "hnswlib", "usearch", "scann-core", "numpy")
_opened: dict[str, Any] = {}


def main() -> None:
    """Build what is missing, search, print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval_peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of videos-*.npy, queries.npy")
    parser.add_argument("--videos", type=float, default=1e6)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="of the settings around the targets, the sweep included")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="keeps built indexes and exact answers"
    )
    parser.add_argument("--only", nargs="*", help="names of engines, as the table prints them")
    parser.add_argument("--build-only", action="store_true", help="build what is missing, search nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=140)
    figures = {"machine": machine.describe_at_rest(PACKAGES, console)}
    corpus, n = Corpus.open(options.corpus), int(options.videos)
    chosen = _choose(n, corpus.dim, options.only, console)
    builds = {name: _built(engine, name, corpus, n, options.work, console) for name, engine in chosen.items()}
    if options.build_only:
        return
    figures |= {"videos": n, "dim": corpus.dim, "k": K, "queries": options.queries}
    figures["engines"] = compare(chosen, builds, corpus, n, options.queries, options.rounds, options.work, console)
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(
    chosen: dict[str, Engine | None],
    builds: dict[str, dict[str, Any]],
    corpus: Corpus,
    n: int,
    n_queries: int,
    rounds: int,
    work: Path,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Sweep every engine in turns: build figures, memory, the sweep and the cost at each target, by engine."""
    query_QD = corpus.queries(n_queries)
    exact_QK = exact_answers(corpus, n, query_QD, K, work)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(FreshProcess(threads=1)) for name in chosen}
        memory = {
            name: processes[name].run(_open, engine, Path(builds[name]["folder"]), query_QD, exact_QK)
            for name, engine in chosen.items()
        }
        sweeps = {name: _settings(engine) for name, engine in chosen.items()}
        passes: dict[str, dict[str, list[Point]]] = {name: {} for name in chosen}
        for number in range(rounds):
            start = time.perf_counter()
            for turn in range(max(len(settings) for settings in sweeps.values())):
                for name, settings in sweeps.items():
                    if turn < len(settings):
                        measured = processes[name].run(_measure, settings[turn])
                        passes[name].setdefault(str(settings[turn]), []).append(measured)
            console.print(f"round {number + 1} of {rounds}: {time.perf_counter() - start:.0f} s")
            sweeps = {name: _near_targets(list(by_setting.values())) for name, by_setting in passes.items()}
        memory = {name: {**memory[name], "searched": processes[name].run(machine.resident_mib)} for name in chosen}
    points = {name: [measure.middle(p) for p in by_setting.values()] for name, by_setting in passes.items()}
    return {
        name: {
            "build": builds[name],
            "memory_mib": {when: usage["rss"] for when, usage in memory[name].items()},
            "sweep": [asdict(point) for point in measure.frontier(points[name])],
            "at": {
                f"{target:.2f}": asdict(point) if (point := measure.at_recall(points[name], target)) else None
                for target in TARGETS
            },
        }
        for name in chosen
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """One table of costs, one of ratios to the best of the others, the machine."""
    console.print(
        f"\n{figures['videos']:,} videos x {figures['dim']}, top {K}, {figures['queries']:,} queries one at a time on "
        f"one thread; built on {THREADS}. Latency in ms at a recall: wall p50 / p99, CPU"
    )
    table = Table(
        "engine", "build wall s", "CPU s", "on disk MiB", "resident MiB", *(f"at {t:.2f}" for t in TARGETS), "most"
    )
    for name, engine in figures["engines"].items():
        build = engine["build"]
        grown = engine["memory_mib"]["searched"] - engine["memory_mib"]["imported"]
        costs = [_cost(engine["at"][f"{target:.2f}"], target) for target in TARGETS]
        row = (f"{build['wall_s']:.0f}", f"{build['cpu_s']:.0f}", f"{build['disk_mib']:.0f}", f"{grown:.0f}")
        table.add_row(name, *row, *costs, f"{max(p['recall'] for p in engine['sweep']):.3f}")
    console.print(table)
    console.print(*_against_the_best(figures["engines"]), sep="\n")
    console.print(machine.line(figures["machine"]))


def _cost(point: dict[str, Any] | None, target: float) -> str:
    if point is None:
        return "not reached"
    found = f" ({point['recall']:.2f})" if point["recall"] > target + 0.005 else ""
    return f"{point['p50_ms']:.2f} / {point['p99_ms']:.2f}, {point['cpu_ms']:.2f}{found}"


def _against_the_best(by_name: dict[str, dict[str, Any]]) -> list[str]:
    """Ours over the best of the others, for every figure that both have."""
    lines = []
    for target in TARGETS:
        costs = {name: engine["at"][f"{target:.2f}"] for name, engine in by_name.items()}
        for label, field in (("wall p50", "p50_ms"), ("CPU", "cpu_ms")):
            lines.append(_ratio(f"recall {target:.2f}, {label} ms", {n: c[field] for n, c in costs.items() if c}))
    lines.append(_ratio("build, CPU s", {n: e["build"]["cpu_s"] for n, e in by_name.items()}))
    lines.append(_ratio("on disk, MiB", {n: e["build"]["disk_mib"] for n, e in by_name.items()}))
    return [line for line in lines if line]


def _ratio(what: str, figure: dict[str, float]) -> str:
    others = {name: value for name, value in figure.items() if name != our_index.NAME}
    if our_index.NAME not in figure or not others:
        return ""
    best, ours = min(others, key=lambda name: others[name]), figure[our_index.NAME]
    return f"{what}: {ours:.2f} against {others[best]:.2f} of {best}, {ours / others[best]:.2f} of it"


def _choose(n: int, dim: int, only: list[str] | None, console: Console) -> dict[str, Engine | None]:
    """Engines by name, ours (None) first; what is not installed is said."""
    peers = {engine.name: engine for engine in engines(n, dim)}
    for name in only or []:
        if name not in (our_index.NAME, *peers):
            raise SystemExit(f"no engine {name!r}; there are: {', '.join((our_index.NAME, *peers))}")
    chosen: dict[str, Engine | None] = {our_index.NAME: None} | peers
    chosen = {name: engine for name, engine in chosen.items() if not only or name in only}
    missing = {engine.package for engine in chosen.values() if engine is not None and not is_installed(engine)}
    if missing:
        console.print(f"not installed, left out: {', '.join(sorted(missing))} (requirements/bench.txt)")
    return {name: engine for name, engine in chosen.items() if engine is None or is_installed(engine)}


def _build_peer(corpus: Corpus, n: int, folder: Path, engine: Engine) -> dict[str, float]:
    engine.build(corpus.matrix(n), folder, THREADS)
    return {}


def _built(engine: Engine | None, name: str, corpus: Corpus, n: int, work: Path, console: Console) -> dict[str, Any]:
    if engine is None:
        return built(name, our_index.build, corpus, n, work, console)
    return built(name, _build_peer, corpus, n, work, console, engine)


def _open(engine: Engine | None, folder: Path, query_QD: np.ndarray, exact_QK: np.ndarray) -> dict[str, Any]:
    """Open the index in this process and answer what memory it took."""
    if engine is not None:
        __import__(engine.module)
    imported = machine.resident_mib()
    search = our_index.OurIndex(folder).search if engine is None else engine.open(folder)
    _opened.update(search=search, query_QD=query_QD, exact_QK=exact_QK)
    return {"imported": imported, "opened": machine.resident_mib()}


def _measure(setting: dict[str, Any]) -> Point:
    search, query_QD = _opened["search"], _opened["query_QD"]
    for query_D in query_QD[:20]:  # the first touch of a page and of a code path is not the search's cost
        search(query_D[None], K, **setting)
    found_QK, wall_ms, cpu_ms = measure.one_at_a_time(lambda query_1D: search(query_1D, K, **setting), query_QD, K)
    return measure.point(setting, found_QK, _opened["exact_QK"], wall_ms, cpu_ms)


def _settings(engine: Engine | None) -> list[dict[str, Any]]:
    if engine is not None:
        return engine.settings(K)
    return [{"probes": probes, "refine": refine} for probes in our_index.PROBES for refine in our_index.REFINE]


def _near_targets(passes: list[list[Point]]) -> list[dict[str, Any]]:
    """Settings whose points enclose a target recall, to be measured again."""
    points = [measure.middle(p) for p in passes]
    near = {str(p.setting): p.setting for target in TARGETS for p in measure.around(points, target)}
    return list(near.values())


if __name__ == "__main__":
    main()
