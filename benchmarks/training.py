"""Samples/s of training the reference DLRM: our loop beside TorchRec's and others', and its growth and scaling.

    python -m benchmarks.training [--json FILE] [--rounds 5] [--peers-python VENV/bin/python] [--only PART ...]

26 tables of 100,000 x 64, batch 2,048, two threads. Engines run by turns, each in a fresh process, and are compared by
medians over the rounds. Three libraries want a throwaway environment beside ours, made by

    python3.11 -m venv /tmp/peers
    echo $PWD/.venv/lib/python3.11/site-packages > /tmp/peers/lib/python3.11/site-packages/ours.pth
    /tmp/peers/bin/pip install --no-deps -r requirements/training-peers.txt

`growth`: our loop with tables of 100 k, 1 M and 10 M rows (fewer tables where 12 GiB would not hold them).
`scaling`: one and two workers of one thread each, of the reference DLRM, with shares of lookup, dense, communication
and input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.dlrm import TABLES, DlrmTask
from benchmarks.machine import describe_at_rest, line
from benchmarks.process import THREADS
from benchmarks.training_engines import BATCH, ENGINES, LIBRARIES, OURS
from benchmarks.training_scaling import measure
from pipelines.training.trainer import TrainConfig

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu")
PARTS = ("engines", "growth", "scaling")
GROWTH = ((100_000, TABLES), (1_000_000, TABLES), (10_000_000, 4))
"""Rows a table and tables: 26 x 1 M x 64 in fp32 are 6.7 GB, 4 x 10 M are 10.2 GB."""
LIBRARY_STEPS = 3
"""Of the libraries, whose steps take seconds."""


def main() -> None:
    """Measure what was asked for, print, and keep it."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peers-python", help="Python of the environment with the other libraries")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    console = Console(width=110)
    figures: dict[str, Any] = {"machine": describe_at_rest(PACKAGES, console)}
    if "engines" in options.only:
        figures["engines"] = engines(options.rounds, options.steps, options.peers_python, console)
        show_engines(figures["engines"], console)
    if "growth" in options.only:
        figures["growth"] = [growth(rows, tables, options.steps, options.rounds) for rows, tables in GROWTH]
        show_growth(figures["growth"], console)
    if "scaling" in options.only:
        figures["scaling"] = scaling(options.steps, options.rounds)
        show_scaling(figures["scaling"], console)
    console.print(line(figures["machine"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def engines(rounds: int, steps: int, peers_python: str | None, console: Console) -> dict[str, Any]:
    """Samples/s of every engine in every round; an engine that fails says why and is left out of further rounds."""
    rates: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in ENGINES:
            if name in failed or (name in LIBRARIES and peers_python is None):
                continue
            python = str(peers_python) if name in LIBRARIES else sys.executable
            answer = _ask(python, name, 100_000, TABLES, LIBRARY_STEPS if name in LIBRARIES else steps)
            if isinstance(answer, str):
                failed[name] = answer
                console.print(f"{name} does not run here: {answer}")
            else:
                rates.setdefault(name, []).append(answer)
                console.print(f"round {number + 1}: {name} {answer:,.0f} samples/s")
    return {"samples_per_s": rates, "failed": failed}


def growth(rows: int, tables: int, steps: int, rounds: int) -> dict[str, Any]:
    """Our loop in bf16 with larger tables."""
    answers = [_ask(sys.executable, "ours bf16", rows, tables, steps) for _ in range(rounds)]
    wrong = [answer for answer in answers if isinstance(answer, str)]
    if wrong:
        raise RuntimeError(f"{tables} tables of {rows:,} rows: {wrong[0]}")
    return {"rows": rows, "tables": tables, "samples_per_s": answers}


def scaling(steps: int, rounds: int) -> list[dict[str, Any]]:
    """Workers of one thread and 2,048 samples a step each, by turns."""
    config = TrainConfig(epochs=2, batch_size=BATCH, precision="bf16", patience=2)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, of_workers in runs.items():
            of_workers.append(measure(make_dlrm, (BATCH * steps * workers,), config, workers))
    return [
        {
            "workers": workers,
            "samples_per_s": [r["samples_per_s"] for r in of_workers],
            "shares": {kind: median(r["shares"][kind] for r in of_workers) for kind in of_workers[0]["shares"]},
        }
        for workers, of_workers in runs.items()
    ]


def make_dlrm(samples: int) -> DlrmTask:
    """For the workers."""
    return DlrmTask(rows=100_000, samples=samples)


def show_engines(found: dict[str, Any], console: Console) -> None:
    """Medians, and how many times the best of the others ours is."""
    rates = {name: median(values) for name, values in found["samples_per_s"].items()}
    best = max((rate for name, rate in rates.items() if name not in OURS), default=float("nan"))
    table = Table(title=f"Reference DLRM, {TABLES} tables of 100,000 x 64, batch {BATCH:,}, two threads")
    for column in ("engine", "samples/s", "min .. max", "of the best other"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, rate in sorted(rates.items(), key=lambda pair: -pair[1]):
        values = found["samples_per_s"][name]
        table.add_row(name, f"{rate:,.0f}", f"{min(values):,.0f} .. {max(values):,.0f}", f"{rate / best:.2f}")
    console.print(table)


def show_growth(found: list[dict[str, Any]], console: Console) -> None:
    """A row a size."""
    table = Table(title="Our loop in bf16 with larger tables, two threads")
    for column in ("rows a table", "tables", "rows in all", "samples/s"):
        table.add_column(column, justify="right")
    for size in found:
        rows, tables = size["rows"], size["tables"]
        table.add_row(f"{rows:,}", str(tables), f"{rows * tables:,}", f"{median(size['samples_per_s']):,.0f}")
    console.print(table)


def show_scaling(found: list[dict[str, Any]], console: Console) -> None:
    """A row a number of workers; ratios within a round."""
    table = Table(title="Workers of one thread each, 2,048 samples a step and worker, bf16")
    for column in ("workers", "samples/s", "times one", "lookup", "dense", "communication", "input"):
        table.add_column(column, justify="right")
    for row in found:
        ratios = [a / b for a, b in zip(row["samples_per_s"], found[0]["samples_per_s"], strict=True)]
        shares = [f"{row['shares'][kind]:.0%}" for kind in ("lookup", "dense", "communication", "input")]
        table.add_row(str(row["workers"]), f"{median(row['samples_per_s']):,.0f}", f"{median(ratios):.2f}", *shares)
    console.print(table)


def _ask(python: str, engine: str, rows: int, tables: int, steps: int) -> float | str:
    """Samples/s, or why there are none: the last line the process wrote."""
    command = [python, "-W", "ignore", "-m", "benchmarks.training_engines", engine, "--rows", str(rows)]
    command += ["--tables", str(tables), "--steps", str(steps)]
    environment = {**os.environ, **dict.fromkeys(THREADS, "2"), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])["samples_per_s"]


if __name__ == "__main__":
    main()
