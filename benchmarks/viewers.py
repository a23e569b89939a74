"""What limits of viewers cost: disk and publishing, a kind of viewer for the first time, and every request after it.

    python -m benchmarks.viewers [--videos 1e8] [--json FILE]

No models: limits are drawn at random (a third of the videos limited to regions, half with a language, a tenth with an
age and a tenth with a safety level drawn, one in 200 with an availability window), uploads evenly over two years. One
thread; requests take turns over the kinds of viewers, a second apart. Medians, and the worst request, are shown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from candidate_gen.allowed import KINDS_KEPT, Eligibility
from candidate_gen.timeline import SHARED_MS, Timeline, Windows
from candidate_gen.uploads import Uploads
from candidate_gen.viewers import ViewerBitmaps
from features.eligibility import Attributes, Viewer

NOW_MS, DAY_MS, SEED = 1_700_000_400_000, 86_400_000, 1
REGIONS, LANGUAGES, AGES, LEVELS, SETS = 60, 40, (0, 12, 16, 18), 4, 300


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.viewers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--videos", type=float, default=1e8)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    figures = {"machine": machine.describe_at_rest(("numpy", "pyarrow"), console)}
    with TemporaryDirectory() as folder:
        figures |= measure(int(options.videos), options.requests, Path(folder))
    table = Table(title=f"Limits of viewers, {figures['videos']:,} videos")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if name not in ("machine", "videos"):
            table.add_row(name.replace("_", " "), f"{value:,.3f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(n_videos: int, n_requests: int, folder: Path) -> dict[str, Any]:
    """The figures by name; units are in the names."""
    rng = np.random.default_rng(SEED)
    attributes = random_attributes(rng, n_videos)
    upload_ms = np.sort(NOW_MS - rng.integers(-DAY_MS, 730 * DAY_MS, n_videos))
    eligible = np.ones(n_videos, bool)
    Uploads.build(np.zeros(n_videos, np.int64), upload_ms, eligible).save(folder)
    Windows.build(attributes, eligible).save(folder)
    _, write_ms = timed(lambda: ViewerBitmaps.write(folder, attributes))
    viewers = ViewerBitmaps.load(folder, attributes)
    timeline = Timeline(eligible, Uploads.load(folder, upload_ms), attributes, Windows.load(folder), None)
    eligibility = Eligibility(timeline, viewers)
    kinds = [random_viewer(rng) for _ in range(KINDS_KEPT)]
    _, first_ms = timed(lambda: timeline.at(NOW_MS))
    new_ms = [timed(lambda viewer=viewer: eligibility.at(NOW_MS, viewer))[1] for viewer in kinds]
    kept_ms = [
        timed(lambda i=i: eligibility.at(NOW_MS + i * 1_000 % SHARED_MS, kinds[i % KINDS_KEPT]).without())[1]
        for i in range(n_requests)
    ]
    moved_ms = [timed(lambda i=i: timeline.at(NOW_MS + i * SHARED_MS))[1] for i in range(1, 12)]
    return {
        "videos": n_videos,
        "attribute_bytes_a_video": attribute_bytes(attributes) / n_videos,
        "bitmaps": len(viewers.bits_BV),
        "bitmap_bytes_on_disk": viewers.bits_BV.nbytes,
        "bitmaps_written_s": write_ms / 1000,
        "first_stretch_ms": first_ms,
        "next_ten_minutes_p50_ms": float(np.median(moved_ms)),
        "new_kind_p50_ms": float(np.median(new_ms)),
        "kept_kind_p50_ms": float(np.median(kept_ms)),
        "kept_kind_worst_ms": max(kept_ms),
        "kept_bytes_a_kind": -(-n_videos // 8),
    }


def random_attributes(rng: np.random.Generator, n_videos: int) -> Attributes:
    """Limits as the module says: a few videos stand for every set, language, age and level; the rest draw from them."""
    sets = [[], *(rng.choice(REGIONS, rng.integers(1, 20), replace=False).tolist() for _ in range(SETS))]
    few = Attributes.of(
        pa.table(
            {
                "regions": [[f"r{region}" for region in regions] for regions in sets],
                "language": pa.array([None, *(f"l{i % LANGUAGES}" for i in range(SETS))]),
                "min_age": [AGES[i % len(AGES)] for i in range(len(sets))],
                "safety_level": [i % LEVELS for i in range(len(sets))],
            }
        )
    )

    def drawn(share: float, column: np.ndarray) -> np.ndarray:
        values = column[rng.integers(0, len(column), n_videos)]
        values[rng.random(n_videos, np.float32) >= share] = 0
        return values

    window_rows = np.flatnonzero(rng.random(n_videos, np.float32) < 1 / 200)
    from_ms = NOW_MS + rng.integers(-90 * DAY_MS, 30 * DAY_MS, len(window_rows))
    return replace(
        few,
        region_set=drawn(1 / 3, few.region_set),
        language=drawn(1 / 2, few.language),
        min_age=drawn(1 / 10, few.min_age),
        safety_level=drawn(1 / 10, few.safety_level),
        window_rows=window_rows,
        window_from_ms=from_ms,
        window_until_ms=from_ms + 90 * DAY_MS,
    )


def random_viewer(rng: np.random.Generator) -> Viewer:
    """Somebody with a region, one or two languages, an age and a tolerance."""
    return Viewer(
        region=f"r{rng.integers(REGIONS)}",
        languages=tuple(f"l{i}" for i in rng.integers(0, LANGUAGES, rng.integers(1, 3))),
        age_years=int(rng.integers(8, 30)),
        max_safety_level=int(rng.integers(LEVELS)),
    )


def attribute_bytes(attributes: Attributes) -> int:
    """Of every array, mapped or not."""
    values = (getattr(attributes, field.name) for field in fields(attributes))
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The answer, and wall milliseconds."""
    start = time.perf_counter()
    answer = work()
    return answer, 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
