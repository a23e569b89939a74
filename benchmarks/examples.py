"""How long examples take and how much memory they hold as the log grows, beside the plain scan of the same bytes.

    python -m benchmarks.examples --rows 1e6 --rows 3e6 --rows 10e6 --json docs/benchmarks/examples.json

A log in the simulated world's shape (benchmarks/examples_log.py) is written once to --folder. A run is the pipeline's
own stage in a process of its own: canonical Parquet, checksums verified, to a memory-mapped dataset on disk. Beside
it, each in its own process: polars scanning the columns that examples read (a sum of each, so that every value is
decoded), and a plain write of as many bytes as the dataset has. Of --repeats runs the median. Anonymous memory is what
cannot be given back to the system; the rest of the peak is pages of files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.examples_log import DAYS, write_log
from benchmarks.machine import describe_at_rest, line

HELD_OUT_DAYS = 2
SAMPLE_S = 0.01
COLUMNS = {"examples": "examples", "scan": "polars scan", "write": "plain write"}


def build(folder: Path, out: Path) -> dict[str, Any]:
    """The examples stage."""
    from pipelines.ingest import event_dates
    from pipelines.recipes import world_spec
    from pipelines.stages import encoded

    spec = world_spec(user_rows=1 << 20, video_rows=1 << 21, author_rows=1 << 17)
    dates = event_dates(folder)
    with Measured() as measured:
        dataset = encoded(folder, spec, dates[: DAYS - HELD_OUT_DAYS], out)
    found = {"rows": len(dataset.examples), "users": len(dataset.users), "videos": len(dataset.videos)}
    size = sum(file.stat().st_size for file in out.iterdir())
    return measured.figures | found | {"bytes_out": size}


def scan(folder: Path, out: Path) -> dict[str, Any]:
    """Every value of the events' columns that examples read, decoded and added up."""
    import polars as pl

    from features.examples import EVENT_COLUMNS

    files = sorted((folder / "events").glob("date=*/*.parquet"))
    sums = [pl.col(name).str.len_bytes().sum() if name == "surface" else pl.col(name).sum() for name in EVENT_COLUMNS]
    with Measured() as measured:
        pl.scan_parquet(files, hive_partitioning=False).select(sums).collect(engine="streaming")
    return measured.figures | {"bytes_in": sum(file.stat().st_size for file in files)}


def write(folder: Path, out: Path) -> dict[str, Any]:
    """As many bytes as the dataset of this log has, 8 MiB at a time."""
    left, block = int((folder / "bytes_out").read_text()), os.urandom(8 << 20)
    with Measured() as measured, out.with_suffix(".bin").open("wb") as handle:
        while left > 0:
            left -= handle.write(block[:left])
    out.with_suffix(".bin").unlink()
    return measured.figures


class Measured:
    """Wall and CPU time of a block, and the peak of this process's memory while it ran."""

    figures: dict[str, Any]

    def __enter__(self) -> Measured:
        self._running, self._anonymous_kib = True, 0
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        self._running = False
        self._sampler.join()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.figures = {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_gib": peak,
            "anonymous_gib": self._anonymous_kib / 2**20,
        }

    def _sample(self) -> None:
        while self._running:
            status = Path("/proc/self/status").read_text()
            self._anonymous_kib = max(self._anonymous_kib, int(status.split("RssAnon:")[1].split()[0]))
            time.sleep(SAMPLE_S)


def measure(what: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Medians over runs in fresh processes."""
    runs = []
    for _ in range(repeats):
        out = folder.parent / f"{folder.name}-dataset"
        shutil.rmtree(out, ignore_errors=True)
        words = [sys.executable, "-m", "benchmarks.examples", "--one", what, "--folder", str(folder), "--out", str(out)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(out, ignore_errors=True)
    return {name: median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, action="append", help="Impressions; repeatable. Default: 1e6, 3e6, 10e6.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/reelrank-examples-benchmark"))  # noqa: S108
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=list(COLUMNS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        run = {"examples": build, "scan": scan, "write": write}[arguments.one]
        print(json.dumps(run(arguments.folder, arguments.out)))
        return
    console = Console()
    machine = describe_at_rest(("numpy", "polars", "pyarrow"), console)
    sizes = []
    for rows in arguments.rows or [1e6, 3e6, 10e6]:
        folder = arguments.folder / f"{int(rows)}"
        if not (folder / "events").exists():
            write_log(folder, int(rows))
        found = {"examples": measure("examples", folder, arguments.repeats)}
        (folder / "bytes_out").write_text(str(int(found["examples"]["bytes_out"])))
        sizes.append(found | {what: measure(what, folder, arguments.repeats) for what in ("scan", "write")})
    show(sizes, console)
    console.print(line(machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "sizes": sizes}, indent=1) + "\n")


def show(sizes: list[dict[str, Any]], console: Console) -> None:
    """The table, and what grows how."""
    table = Table(title="examples: canonical Parquet to a memory-mapped dataset; scan: polars; write: as many bytes")
    for name in ("rows", "wall s", "CPU s", "rows/s", "anon GiB", "peak GiB", "scan s", "write s", "x scan + write"):
        table.add_column(name, justify="right")
    for found in sizes:
        e, scanned, wrote = found["examples"], found["scan"], found["write"]
        table.add_row(
            f"{int(e['rows']):,}",
            f"{e['wall_s']:.1f}",
            f"{e['cpu_s']:.1f}",
            f"{e['rows'] / e['wall_s']:,.0f}",
            f"{e['anonymous_gib']:.2f}",
            f"{e['peak_gib']:.2f}",
            f"{scanned['wall_s']:.2f}",
            f"{wrote['wall_s']:.2f}",
            f"{e['wall_s'] / (scanned['wall_s'] + wrote['wall_s']):.1f}",
        )
    console.print(table)
    if len(sizes) > 1:
        first, last = sizes[0]["examples"], sizes[-1]["examples"]
        grown = [last[name] / first[name] for name in ("rows", "wall_s", "cpu_s", "anonymous_gib")]
        console.print("rows x{:.0f}: wall x{:.1f}, CPU x{:.1f}, anonymous memory x{:.1f}".format(*grown))


if __name__ == "__main__":
    main()
