"""How long a simulated world takes to make, and what it holds.

    python -m benchmarks.world --scale tiny --scale small --json docs/benchmarks/world.json

Each world is made in a process of its own, the default one and one in which everything changes (`LIVES`); asked: tiny
under 5 seconds, small under 60, on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_at_rest, line
from benchmarks.process import FreshProcess
from pipelines.world import LIVES, SCALES, generate


def make(scale: str, life: str) -> dict:
    """One world, thrown away."""
    config = replace(SCALES[scale], life=LIVES[life])
    with tempfile.TemporaryDirectory() as scratch:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        summary = generate(config, Path(scratch) / "world")
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    return {
        "scale": scale, "life": life, "users": summary.n_users, "videos": summary.n_videos, "days": config.n_days,
        "requests": summary.n_requests, "events": summary.n_events, "wall_s": wall_s, "cpu_s": cpu_s,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "mib": size / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="append", choices=tuple(SCALES), help="Default: tiny and small.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=140)
    machine, rows = describe_at_rest(("numpy", "pyarrow"), console), []
    table = Table(title="making a world")
    for column in ("scale", "life", "requests", "events", "wall s", "CPU s", "peak GiB", "MiB"):
        table.add_column(column, justify="left" if column in ("scale", "life") else "right")
    for scale in arguments.scale or ["tiny", "small"]:
        for life in ("still", "restless"):
            with FreshProcess(threads=2) as process:
                r = process.run(make, scale, life)
            rows.append(r)
            table.add_row(
                scale, life, f"{r['requests']:,}", f"{r['events']:,}", f"{r['wall_s']:.1f}", f"{r['cpu_s']:.1f}",
                f"{r['peak_gib']:.2f}", f"{r['mib']:.0f}",
            )  # fmt: skip
    console.print(table)
    console.print(line(machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "worlds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
