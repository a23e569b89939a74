"""How fast candidates are scored, one thread: the reference DLRM and our ranker, beside TorchRec's own modules.

    python -m benchmarks.scorer                                  # both, random weights
    python -m benchmarks.scorer --ranker RUN/ranker-frozen --json FILE

Engines take turns on the same fresh inputs, round after round; a ratio is the median over rounds of one engine's p50 to
the first one's. Needs 11 GiB for the reference model (--rows makes its tables smaller).
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import reference_dlrm as dlrm
from benchmarks.machine import describe_at_rest, line
from features.batch import to_batch
from features.inputs import Inputs
from pipelines.console import output
from ranking.calibrate import Calibration
from ranking.compiled import compile_package, load_engine
from ranking.config import RankerConfig, RankerSizes
from ranking.frozen import Shape, fold
from ranking.infer import Engine, Ranker
from ranking.model import RankerModel
from ranking.products import DenseType
from ranking.tables import Tables
from ranking.watch import WatchQuantiles

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu")
LOOKUPS_PER_S, TIMED_TOGETHER = 17e6, 8
"""Rows of 64 int8 numbers a second and core, as measured for the design; requests of one batch."""
WORLD_SIZES = RankerSizes(
    user_names=("user_id", "region", "age_bucket", "device", "declared_topic"),
    user_table_rows=(1 << 18, 64, 64, 64, 64),
    video_names=("video_id", "author_id", "tags"),
    video_table_rows=(1 << 19, 1 << 16, 256),
    user_dense=10,
    video_dense=33,
    candidate_dense=29,
    surface_rows=8,
    slot_rows=42,
    tasks=("click", "long_view", "like", "follow", "comment", "share", "profile_enter", "hate"),
)
"""The ranker of the world `small`, for which random weights take as long as trained ones."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.scorer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranker", type=Path, help="a folder that training exported or `freeze` wrote")
    parser.add_argument("--rows", type=float, default=1e6, help="of each of the reference model's 26 tables")
    parser.add_argument("--candidates", type=int, nargs="*", default=[100, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=60, help="of each engine in a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    console = output()
    figures: dict[str, Any] = {"machine": describe_at_rest(PACKAGES, console)}
    rounds, calls = options.rounds, options.calls
    with TemporaryDirectory() as folder:
        figures["reference"] = reference(int(options.rows), rounds, calls, Path(folder))
        figures["ranker"] = ranker_figures(options.ranker, options.candidates, rounds, calls, Path(folder))
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def reference(rows: int, rounds: int, calls: int, folder: Path, candidates: int = 500) -> dict[str, Any]:
    """The DLRM of the literature, 500 candidates."""
    model = dlrm.torchrec_model(rows)
    engines = {
        "TorchRec, eager fp32": dlrm.eager(model),
        "TorchRec, int8 tables, bf16 autocast": dlrm.quantised(model),
        "ours, int8 tables, compiled bf16": dlrm.ours(model, "bf16", folder),
        "ours, int8 tables, compiled int8": dlrm.ours(model, "int8", folder),
    }
    tables, rng = dlrm.coded_tables(model), torch.Generator().manual_seed(1)
    asked = [
        (
            torch.randn(candidates, dlrm.NUMBERS, generator=rng),
            torch.randint(rows, (candidates, dlrm.TABLES), generator=rng),
        )
        for _ in range(calls)
    ]
    exact = engines["TorchRec, eager fp32"](*asked[0])
    off = {name: float((score(*asked[0]).float() - exact).abs().max()) for name, score in engines.items()}
    timed = in_turns({name: lambda n, s=score: s(*asked[n]) for name, score in engines.items()}, rounds, calls)
    lookup = in_turns({"lookups": lambda n: tables.pooled(asked[n][1], (1,) * dlrm.TABLES)}, rounds, calls)
    return {
        "candidates": candidates,
        "rows": rows,
        "engines": [{**row, "largest_difference": off[row["name"]]} for row in timed],
        "our_lookups_ms": lookup[0]["p50_ms"],
        "product_gflops": product_rates(rounds, calls),
        "flops_per_candidate": dlrm.flops_per_candidate(),
        "lookups_limit_ms": 1000 * candidates * dlrm.TABLES / LOOKUPS_PER_S,
    }


def product_rates(rounds: int, calls: int, n: int = 500, k: int = 416, m: int = 512) -> dict[str, float]:
    """What this processor's kernels do in a second, by precision: the limit of the dense part."""
    x, weight = torch.randn(n, k), torch.randn(m, k)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    codes, codes_weight = (t.mul(40).clamp(-127, 127).to(torch.int8) for t in (x, weight))
    ways = {
        "fp32": lambda _: torch.nn.functional.linear(x, weight),
        "bf16": lambda _: torch.nn.functional.linear(half, half_weight),
        "int8": lambda _: torch.ops.aten._int_mm(codes, codes_weight.t()),
    }
    return {row["name"]: 2e-6 * n * k * m / row["p50_ms"] for row in in_turns(ways, rounds, calls)}


def ranker_figures(
    folder: Path | None, candidates: Sequence[int], rounds: int, calls: int, cache: Path
) -> dict[str, Any]:
    """Our ranker for one request of K candidates, and for requests that share a batch or a process."""
    cache.chmod(0o700)
    ranker, model = (Ranker.load(folder), None) if folder else random_ranker()
    compiled = {dense: _compiled(ranker, dense, cache) for dense in ("fp32", "bf16", "int8")}
    weights = fold(ranker.dense, ranker.config, ranker.sizes, "fp32")
    flops = 2 * sum(w.numel() for name, w in weights.items() if w.ndim > 1 and not name.startswith("attention"))
    out: dict[str, Any] = {"shape": asdict(Shape.of(ranker.config, ranker.sizes)), "flops_per_candidate": flops}
    out["alone"] = []
    for k in candidates:
        asked = [ranker.probe((k,), seed=n) for n in range(calls)]
        ways = {"TorchRec modules, eager fp32": (lambda n, a=asked: model.logits(to_batch(a[n])))} if model else {}
        ways["plain fp32"] = _by(ranker, ranker.plain, asked)
        ways |= {engine.name: _by(ranker, engine, asked) for engine in compiled.values()}
        out["alone"] += [{"candidates": k, **row} for row in in_turns(ways, rounds, calls)]
    ranker.accelerate(compiled["bf16"])
    out["together"] = [_together(ranker, k, rounds, calls) for k in candidates]
    out["threads"] = [_threads(ranker, threads) for threads in (1, 2)]
    return out


def random_ranker() -> tuple[Ranker, RankerModel]:
    """The default configuration at the world's sizes, int8 tables, and the same weights in TorchRec's modules."""
    torch.manual_seed(0)
    config, sizes = RankerConfig(), WORLD_SIZES
    model = RankerModel(config, sizes, dict.fromkeys(sizes.tasks, 0.1)).eval()
    state = model.state_dict()
    tables = {
        side: Tables.encode([(n, state[f"{side}_ebc.embedding_bags.{n}.weight"]) for n in names], "int8")
        for side, names in (("user", sizes.user_names), ("video", sizes.video_names))
    }
    watch, calibration = WatchQuantiles.fit(np.arange(1e3), np.ones(1000), None), Calibration.identity(sizes.tasks)
    return Ranker(config, sizes, state, tables, watch, calibration), model


def in_turns(ways: dict[str, Callable[[int], Any]], rounds: int, calls: int) -> list[dict[str, Any]]:
    """Each way `calls` times, then the next, round after round: p50 and p99 of all, the ratio to the first a round."""
    ms = {name: np.empty((rounds, calls)) for name in ways}
    for way in ways.values():
        for n in range(min(5, calls)):
            way(n)
    for r in range(rounds):
        for name, way in ways.items():
            for n in range(calls):
                start = time.perf_counter()
                way(n)
                ms[name][r, n] = 1000 * (time.perf_counter() - start)
    first = np.median(next(iter(ms.values())), axis=1)
    return [
        {
            "name": name,
            "p50_ms": float(np.median(taken)),
            "p99_ms": float(np.percentile(taken, 99)),
            "times_faster": float(np.median(first / np.median(taken, axis=1))),
        }
        for name, taken in ms.items()
    ]


def _by(ranker: Ranker, engine: Engine, asked: list[Inputs]) -> Callable[[int], Any]:
    return lambda n: ranker.logits(asked[n], by=engine)


def _compiled(ranker: Ranker, dense: DenseType, cache: Path) -> Engine:
    compile_package(ranker, dense, cache)
    engine = load_engine(ranker, dense, cache)
    if engine is None:
        raise RuntimeError(f"the {dense} scorer was compiled and is not there")
    return engine


def _together(ranker: Ranker, candidates: int, rounds: int, calls: int) -> dict[str, Any]:
    """Candidates a second, eight requests one by one and in one batch."""
    asked = [ranker.probe((candidates,), seed=n) for n in range(TIMED_TOGETHER)]

    def one_by_one(_: int) -> None:
        for inputs in asked:
            ranker.score(inputs)

    ways = {"alone": one_by_one, "together": lambda _: ranker.score_together(asked)}
    alone, shared = in_turns(ways, rounds, max(3, calls // TIMED_TOGETHER))
    total = candidates * TIMED_TOGETHER
    return {
        "candidates": candidates,
        "alone_per_s": 1000 * total / alone["p50_ms"],
        "together_per_s": 1000 * total / shared["p50_ms"],
        "gain": shared["times_faster"],
    }


def _threads(ranker: Ranker, threads: int, candidates: int = 1000, seconds: float = 3.0) -> dict[str, Any]:
    """Requests a second by threads of one process."""
    asked = [ranker.probe((candidates,), seed=n) for n in range(20)]
    done, until = [0] * threads, time.perf_counter() + seconds

    def work(own: int) -> None:
        torch.set_num_threads(1)
        while time.perf_counter() < until:
            ranker.score(asked[done[own] % len(asked)])
            done[own] += 1

    workers = [threading.Thread(target=work, args=(own,)) for own in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"threads": threads, "candidates": candidates, "requests_per_s": sum(done) / (time.perf_counter() - start)}


def show(figures: dict[str, Any], console: Console) -> None:
    """The reference model, then ours."""
    found = figures["reference"]
    table = Table(
        f"reference DLRM, {found['candidates']} candidates", "p50 ms", "p99 ms", "times faster", "largest difference"
    )
    for row in found["engines"]:
        table.add_row(*_cells(row), f"{row['largest_difference']:.4f}")
    console.print(table)
    console.print(
        f"our lookups {found['our_lookups_ms']:.2f} ms (limit {found['lookups_limit_ms']:.2f}), dense part "
        f"{found['flops_per_candidate'] * found['candidates'] / 1e9:.2f} GFLOP; products alone: "
        + ", ".join(f"{name} {rate:,.0f} GFLOPS" for name, rate in found["product_gflops"].items())
    )
    ranker = figures["ranker"]
    table = Table("our ranker", "candidates", "p50 ms", "p99 ms", "times faster")
    for row in ranker["alone"]:
        name, *rest = _cells(row)
        table.add_row(name, str(row["candidates"]), *rest)
    console.print(table)
    table = Table("candidates a request", "alone, candidates/s", f"{TIMED_TOGETHER} together", "gain")
    for row in ranker["together"]:
        alone, shared = f"{row['alone_per_s']:,.0f}", f"{row['together_per_s']:,.0f}"
        table.add_row(str(row["candidates"]), alone, shared, f"{row['gain']:.2f}")
    console.print(table)
    for row in ranker["threads"]:
        console.print(f"{row['threads']} threads: {row['requests_per_s']:.0f} requests of {row['candidates']} a second")
    console.print(f"dense part of our ranker: {ranker['flops_per_candidate'] / 1e6:.2f} MFLOP a candidate")
    console.print(line(figures["machine"]))


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["name"], f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['times_faster']:.2f}"


if __name__ == "__main__":
    main()
