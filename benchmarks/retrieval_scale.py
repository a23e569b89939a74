"""Retrieval as the corpus grows: recall, latency, throughput, memory and build time of the index at several sizes.

    python -m benchmarks.retrieval_scale --corpus FOLDER --videos 1e6 10e6 100e6 [--json FILE]
    python -m benchmarks.retrieval_scale --corpus FOLDER --videos 300e6 --layout-only

The corpus is a folder of a trained video tower's vectors and the user tower's queries (`benchmarks.vectors`), read in
blocks and never held. Asked are 1,000 videos a query; recall is the share of the exact top 100 among them. The index is
built on two threads in a process of its own (kept in --work) and opened in a fresh one with one thread, whose memory is
all of it, Python and libraries included, after every query was answered at the widest setting; a second process then
does the same beside it, to show what they share. Latency is of one query
at a time on that thread, once every page was touched. Queries a second are of batches on two threads.

`--layout-only` writes an index of full size whose codes are drawn at random: memory and access pattern are the real
ones, results mean nothing, so no recall is given.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine, measure, our_index
from benchmarks.building import THREADS, Rate, built
from benchmarks.measure import Point
from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus, exact_answers

K, TRUE_K = 1000, 100
TARGET = 0.90
BATCHES = (1, 8, 32, 128, 512)
PACKAGES = ("faiss-cpu", "numpy")
_opened: dict[str, Any] = {}


def main() -> None:
    """Measure every size and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval_scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of videos-*.npy, queries.npy")
    parser.add_argument("--videos", type=float, nargs="+", default=[1e6])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--probes", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--refine", type=int, nargs="+", default=[1, 2], help="codes find this many times 1,000 videos")
    parser.add_argument("--layout-only", action="store_true", help="codes drawn at random: memory and latency only")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="keeps indexes and exact answers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=130)
    figures: dict[str, Any] = {"machine": machine.describe_at_rest(PACKAGES, console), "k": K, "true_k": TRUE_K}
    figures |= {"queries": options.queries, "layout_only": options.layout_only, "sizes": []}
    corpus = Corpus.open(options.corpus)
    settings = [{"probes": probes, "refine": refine} for probes in options.probes for refine in options.refine]
    for n in map(int, options.videos):
        figures["sizes"].append(measure_size(corpus, n, settings, options, console))
        show_size(figures["sizes"][-1], console)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    show_growth(figures, console)


def measure_size(
    corpus: Corpus, n: int, settings: list[dict[str, int]], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Build figures, memory, the sweep, the cost at recall .90 and queries a second, of one size."""
    query_QD = corpus.queries(options.queries)
    if options.layout_only:
        build = built(f"{our_index.NAME} layout", our_index.build_layout, corpus, n, options.work, console)
        exact_QK = np.full((len(query_QD), 0), -1)
    else:
        build = built(our_index.NAME, our_index.build, corpus, n, options.work, console)
        exact_QK = exact_answers(corpus, n, query_QD, TRUE_K, options.work, Rate("exact answers", n))
    with FreshProcess(threads=1) as process:
        process.run(_open, build["folder"], query_QD, exact_QK)
        process.run(_answer_all, settings[-1])
        sweep = [process.run(_measure, setting) for setting in settings]
        memory = process.run(machine.resident_mib)
        with FreshProcess(threads=1) as second:
            second.run(_open, build["folder"], query_QD, exact_QK)
            second.run(_answer_all, settings[-1])
            both = [each.run(machine.resident_mib) for each in (process, second)]
    at_target = None if options.layout_only else measure.at_recall(sweep, TARGET)
    chosen = at_target.setting if at_target else settings[-1]
    with FreshProcess(threads=THREADS) as process:
        process.run(_open, build["folder"], query_QD, exact_QK)
        process.run(_answer_all, chosen)
        batches = [process.run(_measure_batches, chosen, size) for size in BATCHES]
    return {
        "videos": n,
        "dim": corpus.dim,
        "build": build,
        "memory_mib": memory,
        "memory_of_two_mib": both,
        "sweep": [{**asdict(point), "recall": None} if options.layout_only else asdict(point) for point in sweep],
        "at_target": asdict(at_target) if at_target else None,
        "batched": {"setting": chosen, "batches": batches},
    }


def show_size(size: dict[str, Any], console: Console) -> None:
    """The sweep and the batches of one size."""
    console.print(f"\n{size['videos']:,} videos x {size['dim']}: the exact top {TRUE_K} among {K} returned, one thread")
    table = Table("probes", "refine", "recall", "p50 ms", "p99 ms", "CPU ms")
    for point in size["sweep"]:
        table.add_row(*map(str, point["setting"].values()), *_costs(point))
    console.print(table)
    table = Table(f"batch, {size['batched']['setting']}", "queries/s on two cores", "CPU ms a query")
    for batch in size["batched"]["batches"]:
        table.add_row(str(batch["size"]), f"{batch['per_s']:,.0f}", f"{batch['cpu_ms']:.2f}")
    console.print(table)
    one, (first, second) = size["memory_mib"], size["memory_of_two_mib"]
    console.print(
        f"One process holds {one['rss']:,.0f} MiB; two that answered the same queries together "
        f"{first['pss'] + second['pss']:,.0f}: of the second's {second['rss']:,.0f}, {second['anonymous']:,.0f} are "
        "its own and the rest is shared"
    )


def show_growth(figures: dict[str, Any], console: Console) -> None:
    """One row a size: what grows, and how."""
    drawn = "; codes drawn at random, so no recall" if figures["layout_only"] else f"; latency at recall {TARGET:.2f}"
    console.print(f"\nHow it grows: {figures['queries']:,} queries{drawn}")
    table = Table("videos", "recall", "p50 ms", "p99 ms", "CPU ms", "queries/s", "resident MiB", "a video", "build")
    for size in figures["sizes"]:
        point = size["at_target"] or size["sweep"][-1]
        stages = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in size["build"]["stages_s"].items())
        table.add_row(
            f"{size['videos']:,}",
            *_costs(point),
            f"{max(batch['per_s'] for batch in size['batched']['batches']):,.0f}",
            f"{size['memory_mib']['rss']:,.0f}",
            f"{size['build']['disk_mib'] * 2**20 / size['videos']:.1f} B",
            f"{size['build']['wall_s']:,.0f} s ({stages}), peak {size['build']['peak_mib']:,.0f} MiB",
        )
    console.print(table)
    console.print(machine.line(figures["machine"]))


def _costs(point: dict[str, Any]) -> tuple[str, ...]:
    recall = point["recall"]
    return (
        "" if recall is None else f"{recall:.3f}",
        f"{point['p50_ms']:.2f}",
        f"{point['p99_ms']:.2f}",
        f"{point['cpu_ms']:.2f}",
    )


def _open(folder: str, query_QD: np.ndarray, exact_QK: np.ndarray) -> None:
    _opened.update(index=our_index.OurIndex(Path(folder)), query_QD=query_QD, exact_QK=exact_QK)


def _answer_all(setting: dict[str, int]) -> None:
    """Touch every page that the queries need."""
    for query_D in _opened["query_QD"]:
        _opened["index"].search(query_D[None], K, **setting)


def _measure(setting: dict[str, int]) -> Point:
    def search(query_1D: np.ndarray) -> np.ndarray:
        return _opened["index"].search(query_1D, K, **setting)

    found_QK, wall_ms, cpu_ms = measure.one_at_a_time(search, _opened["query_QD"], K)
    return measure.point(setting, found_QK, _opened["exact_QK"], wall_ms, cpu_ms)


def _measure_batches(setting: dict[str, int], size: int) -> dict[str, Any]:
    """All queries in batches of a size, three times; the median time counts."""
    query_QD, walls_s, cpus_s, faults = _opened["query_QD"], [], [], resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(query_QD), size):
            _opened["index"].search(query_QD[first : first + size], K, **setting)
        walls_s.append(time.perf_counter() - start)
        cpus_s.append(time.process_time() - cpu)
    return {
        "size": size,
        "per_s": len(query_QD) / float(np.median(walls_s)),
        "cpu_ms": 1000 * float(np.median(cpus_s)) / len(query_QD),
        "pages_read": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
    }


if __name__ == "__main__":
    main()
