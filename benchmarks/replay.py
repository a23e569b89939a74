"""How long a replay takes and how much memory it holds, as the log grows: three policies given as scores.

    python -m benchmarks.replay --rows 1e6 --rows 3e6 --rows 10e6 --json docs/benchmarks/replay.json

Each size is a log of pages of 6 drawn from 40 candidates (Plackett-Luce, one slot in twenty uniform), a user every 50
rows, over 50,000 videos, in canonical Parquet; a policy is a Parquet file with a list of 40 scores a request. Written
once to --folder, then judged in a process of its own: `reelrank replay` with both default metrics, five guardrails, all
slices, the whole clip sweep and 200 resamples. R requests, C candidates, S slots.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_at_rest, line
from features.schema import CANDIDATES, EVENTS, SIGNALS, VIDEOS
from pipelines.world.logger import draw_page

PAGE, CANDIDATES_A_REQUEST, VIDEOS_IN_ALL, AUTHORS, ROWS_A_USER = 6, 40, 50_000, 4_000, 50
START_MS, DAY_MS = 1_767_225_600_000, 86_400_000
POLICIES = {"ours": (1.0, 0.5), "theirs": (0.6, 0.8), "bold": (1.4, 0.7)}
"""Each policy's values: (weight of the true appeal, spread of its error)."""
CHUNK = 50_000
RESAMPLES, SLOTS = 200, 6
TARGET_S, TARGET_GIB = 180.0, 4.0


def write_log(folder: Path, rows: int, seed: int = 0) -> None:
    """A log of `rows` shown rows and one score file a policy."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    appeal_V = rng.normal(0, 1, VIDEOS_IN_ALL)
    author_V = rng.integers(0, AUTHORS, VIDEOS_IN_ALL)
    upload_V = START_MS - rng.integers(0, 14 * DAY_MS, VIDEOS_IN_ALL)
    duration_V = np.clip(rng.lognormal(9.8, 0.6, VIDEOS_IN_ALL), 4_000, 200_000).astype(np.int64)
    videos = {"video_id": np.arange(VIDEOS_IN_ALL) + 2**60, "author_id": author_V + 2**58, "upload_ts_ms": upload_V,
              "duration_ms": duration_V, "eligible": np.ones(VIDEOS_IN_ALL, dtype=bool)}  # fmt: skip
    pq.write_table(_table(videos, VIDEOS), folder / "videos.parquet")
    (folder / "events" / "date=2026-01-02").mkdir(parents=True)
    requests, users = rows // PAGE, max(rows // ROWS_A_USER, 1)
    scores = pa.schema([pa.field("request_id", pa.string()), pa.field("scores", pa.list_(pa.float32()))])
    writers = {name: pq.ParquetWriter(folder / f"{name}.parquet", scores) for name in POLICIES}
    with (
        pq.ParquetWriter(folder / "candidates.parquet", CANDIDATES, compression="zstd") as sets,
        pq.ParquetWriter(
            folder / "events" / "date=2026-01-02" / "part-0.parquet", EVENTS, compression="zstd"
        ) as events,
    ):
        for start in range(0, requests, CHUNK):
            n = min(CHUNK, requests - start)
            ids = pa.array([f"r{i:012d}" for i in range(start, start + n)])
            user = rng.integers(0, users, n) + 2**61
            ts_ms = START_MS + DAY_MS + (np.arange(start, start + n) * (DAY_MS // 2)) // requests
            pool = _distinct(rng, n)
            logits = appeal_V[pool] * 0.7 + rng.normal(0, 0.5, pool.shape)
            chosen, propensity = draw_page(logits, np.ones(pool.shape, dtype=bool), PAGE, 0.05, rng)
            shown = np.take_along_axis(pool, chosen, axis=1)
            columns = _outcomes(rng, appeal_V[shown].ravel(), duration_V[shown].ravel())
            columns |= {
                "request_id": ids.take(pa.array(np.repeat(np.arange(n), PAGE))),
                "user_id": np.repeat(user, PAGE),
                "video_id": shown.ravel() + 2**60,
                "author_id": author_V[shown].ravel() + 2**58,
                "ts_ms": np.repeat(ts_ms, PAGE) + np.tile(np.arange(PAGE), n),
                "surface": pa.repeat("feed", n * PAGE),
                "slot": np.tile(np.arange(PAGE, dtype=np.int32), n),
                "connected": rng.random(n * PAGE) < 0.2,
                "propensity": propensity.ravel(),
            }
            events.write_table(_table(columns, EVENTS))
            lists = pa.ListArray.from_arrays(
                np.arange(0, pool.size + 1, pool.shape[1], dtype=np.int32), pool.ravel() + 2**60
            )
            sets.write_table(
                _table({"request_id": ids, "user_id": user, "ts_ms": ts_ms, "video_ids": lists}, CANDIDATES)
            )
            for name, (weight, noise) in POLICIES.items():
                value = (weight * appeal_V[pool] + rng.normal(0, noise, pool.shape)).astype(np.float32)
                values = pa.ListArray.from_arrays(lists.offsets, value.ravel())
                writers[name].write_table(pa.table({"request_id": ids, "scores": values}, schema=scores))
    for writer in writers.values():
        writer.close()


def _distinct(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, C) distinct videos a row: a random start and a random odd stride around a ring."""
    start, stride = rng.integers(0, VIDEOS_IN_ALL, (n, 1)), 2 * rng.integers(0, VIDEOS_IN_ALL // 2, (n, 1)) + 1
    stride = np.where(stride % 5 == 0, stride + 2, stride)
    return (start + stride * np.arange(CANDIDATES_A_REQUEST)) % VIDEOS_IN_ALL


def _outcomes(rng: np.random.Generator, appeal: np.ndarray, duration_ms: np.ndarray) -> dict[str, np.ndarray]:
    chance = 1 / (1 + np.exp(-(appeal - 1)))
    long_view = rng.random(len(appeal)) < chance
    watch_ms = np.where(long_view, duration_ms, rng.exponential(3_000, len(appeal))).astype(np.int64)
    signals = {signal: np.zeros(len(appeal), dtype=np.int8) for signal in SIGNALS}
    hate = rng.random(len(appeal)) < 0.002
    return signals | {"long_view": long_view.astype(np.int8), "hate": hate.astype(np.int8), "watch_ms": watch_ms,
                      "duration_ms": duration_ms}  # fmt: skip


def _table(columns: dict, schema: pa.Schema) -> pa.Table:
    rows = len(next(iter(columns.values())))
    full = {field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in schema}
    return pa.table(full, schema=schema)


def judge(folder: Path) -> None:
    """One replay in this process; prints its figures as JSON."""
    from pipelines.replay import replay

    start, cpu = time.perf_counter(), time.process_time()
    report = replay(folder, [f"file:{folder / name}.parquet" for name in POLICIES], slots=SLOTS, resamples=RESAMPLES,
                    on_progress=lambda text: print(text, file=sys.stderr))  # fmt: skip
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    heads = {p.policy: p.metrics["long_view"][report.estimator].difference.estimate for p in report.policies}
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rows": report.rows, "requests": report.requests, "users": report.users, "wall_s": wall_s,
                      "cpu_s": cpu_s, "peak_gib": peak_gib, "differences": heads}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, action="append", help="Shown rows; repeatable. Default: 1e6, 3e6, 10e6.")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/reelrank-replay-benchmark"))  # noqa: S108
    parser.add_argument("--json", type=Path)
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.judge is not None:
        judge(arguments.judge)
        return
    console = Console()
    machine = describe_at_rest(("numpy", "polars", "pyarrow"), console)
    found = []
    for rows in arguments.rows or [1e6, 3e6, 10e6]:
        folder = arguments.folder / f"{int(rows)}"
        if not (folder / "candidates.parquet").exists():
            write_log(folder, int(rows))
        words = [sys.executable, "-m", "benchmarks.replay", "--judge", str(folder)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout))
    table = Table(title=f"replay: {len(POLICIES)} policies given as scores, {RESAMPLES} resamples, {SLOTS} slots")
    for name in ("rows", "users", "wall s", "CPU s", "us a row", "peak GiB"):
        table.add_column(name, justify="right")
    for f in found:
        us = 1e6 * f["wall_s"] / f["rows"]
        table.add_row(f"{f['rows']:,}", f"{f['users']:,}", f"{f['wall_s']:.0f}", f"{f['cpu_s']:.0f}", f"{us:.1f}",
                      f"{f['peak_gib']:.2f}")  # fmt: skip
    console.print(table)
    last = found[-1]
    kept = last["wall_s"] < TARGET_S and last["peak_gib"] < TARGET_GIB
    console.print(
        f"{'kept' if kept else 'MISSED'}: under {TARGET_S:.0f} s and {TARGET_GIB:g} GiB at {last['rows']:,} rows"
    )
    console.print(line(machine))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "sizes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
