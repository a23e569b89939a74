"""What it costs to keep what each page was drawn from: microseconds of a request, of the writer, and bytes on disk.

    python -m benchmarks.shortlists --json docs/benchmarks/shortlists.json

Pages of 10 slots from pools of 1,000 by the default arrangement; ids of videos are random 62-bit numbers, which nothing
compresses. The store is written by its one writer thread with and without shortlists, in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from benchmarks.machine import describe, line
from ranking.arrange import ArrangeConfig, Candidates, arrange
from serving.export import export_events
from serving.messages import Event
from serving.records import ServedRow, Shortlist
from serving.store import SqliteStore, StoreConfig

PAGES, POOL, SLOTS, DIM, ROUNDS = 2_000, 1_000, 10, 64, 5


def pages(rng: np.random.Generator) -> tuple[list[tuple[list[ServedRow], Shortlist]], float]:
    """Slates with what they were drawn from, and the median microseconds that making a shortlist took."""
    catalogue, found, took_us = rng.integers(1, 2**62, 1_000_000), [], []
    vectors = rng.normal(size=(POOL, DIM)).astype(np.float32)
    for number in range(PAGES):
        pool = rng.integers(0, len(catalogue), POOL)
        candidates = Candidates(0.1 * rng.normal(size=POOL), rng.integers(1, 500, POOL), vectors)
        slate = arrange(candidates, ArrangeConfig(), SLOTS, rng)
        request, user = f"{number:032x}", int(rng.integers(2**62))
        start = time.perf_counter()
        shortlist = Shortlist(request, user, number, "feed", catalogue[pool[slate.considered]], catalogue[:0])
        took_us.append((time.perf_counter() - start) * 1e6)
        shown = zip(catalogue[pool[slate.order_S]].tolist(), slate.propensity_S.tolist(), strict=True)
        rows = [
            ServedRow(request, slot, user, video, number, "feed", "ann", False, "feed-0", p, "v1")
            for slot, (video, p) in enumerate(shown)
        ]
        found.append((rows, shortlist))
    return found, median(took_us)


def written(found: list, folder: Path, share: float) -> tuple[float, int, int]:
    """Microseconds a page until all is on disk; bytes of the store; bytes of `candidates.parquet`."""
    path = folder / "log.sqlite"
    store = SqliteStore(path, StoreConfig(shortlist_share=share, max_waiting=10 * PAGES))
    start = time.perf_counter()
    for rows, shortlist in found:
        store.log_served(rows, shortlist)
    events = [Event(request_id=r.request_id, slot=r.slot, user_id=r.user_id, video_id=r.video_id, ts_ms=r.ts_ms + 1)
              for rows, _ in found for r in rows[:1]]  # fmt: skip
    store.log_events(events).result()
    us = (time.perf_counter() - start) * 1e6 / len(found)
    store.close()
    size = path.stat().st_size
    export_events(path, folder)
    return us, size, (folder / "candidates.parquet").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, machine = Console(width=140), describe(("numpy", "pyarrow"))
    found, made_us = pages(np.random.default_rng(0))
    rounds: dict[float, list[tuple[float, int, int]]] = {0.0: [], 1.0: []}
    for _ in range(ROUNDS):
        for share, took in rounds.items():
            with tempfile.TemporaryDirectory() as scratch:
                took.append(written(found, Path(scratch), share))
    without, kept = ([median(column) for column in zip(*took, strict=True)] for took in rounds.values())
    told = {
        "videos_a_page": float(np.mean([len(shortlist.video_id_K) for _, shortlist in found])),
        "request_us": made_us,
        "writer_us": {"without": without[0], "kept": kept[0]},
        "store_bytes_a_page": {"without": without[1] / PAGES, "kept": kept[1] / PAGES},
        "parquet_bytes_a_page": kept[2] / PAGES,
    }
    for name, value in told.items():
        console.print(f"{name}: {value}", highlight=False)
    console.print(line(machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, **told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
