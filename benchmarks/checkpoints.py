"""How long a checkpoint keeps training waiting: written by the loop itself, and in the background from a copy.

    python -m benchmarks.checkpoints [--json FILE] [--rounds 5] [--rows 75000] [--folder FOLDER]

The reference DLRM, 26 tables of R x 64, one process; an epoch of 60 steps has checkpoints after the 20th and the 40th.
Three runs by turns: without these, waiting for them, in the background. What a checkpoint costs is what its epoch takes
longer than the one without, halved: the wait itself, and how much slower steps are beside the writer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.dlrm import DIM, TABLES, DlrmTask
from benchmarks.machine import describe_at_rest, line
from pipelines.training.trainer import TrainConfig, fit

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu")
BATCH, STEPS, EVERY = 512, 60, 20
CHECKPOINTS = (STEPS - 1) // EVERY
CONFIG = TrainConfig(epochs=1, batch_size=BATCH)
WAYS = {
    "none": CONFIG,
    "waiting": replace(CONFIG, checkpoint_every_steps=EVERY, background_checkpoints=False),
    "background": replace(CONFIG, checkpoint_every_steps=EVERY, background_checkpoints=True),
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoints", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=75_000)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; the disk matters")
    options = parser.parse_args()
    console = Console(width=110)
    machine = describe_at_rest(PACKAGES, console)
    task = DlrmTask(rows=options.rows, samples=BATCH * STEPS)
    rounds = []
    for number in range(options.rounds):
        rounds.append({way: epoch(task, config, options.folder) for way, config in WAYS.items()})
        told = ", ".join(f"{way} {of['epoch_s']:.2f} s" for way, of in rounds[-1].items())
        console.print(f"round {number + 1}: {told}")
    figures = {
        "machine": machine,
        "state_mib": TABLES * options.rows * (DIM + 1) * 4 / 2**20,
        "rounds": rounds,
        "cost_s": {way: median(cost_s(of, way) for of in rounds) for way in ("waiting", "background")},
        "wait_s": {way: median(of[way]["wait_s"] for of in rounds) for way in ("waiting", "background")},
    }
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def epoch(task: DlrmTask, config: TrainConfig, folder: Path | None) -> dict[str, float]:
    """Seconds of an epoch's training, and of waiting for one of its checkpoints."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        report = fit(task, config, out_dir=Path(out)).epochs[0]
    epoch_s = BATCH * STEPS / report.samples_per_s
    return {"epoch_s": epoch_s, "wait_s": epoch_s * report.checkpoint_wait_share / CHECKPOINTS}


def cost_s(of: dict[str, dict[str, float]], way: str) -> float:
    """What one checkpoint cost in this round."""
    return (of[way]["epoch_s"] - of["none"]["epoch_s"]) / CHECKPOINTS


def show(figures: dict[str, Any], console: Console) -> None:
    """Both ways, and their ratio."""
    table = Table("written", "the loop waits, s", "costs in all, s")
    for way in ("waiting", "background"):
        table.add_row(way, f"{figures['wait_s'][way]:.2f}", f"{figures['cost_s'][way]:.2f}")
    console.print(table)
    ratio = figures["wait_s"]["waiting"] / max(figures["wait_s"]["background"], 1e-9)
    console.print(
        f"State of {figures['state_mib']:,.0f} MiB, once more in memory for the background. The loop waits {ratio:.1f} "
        f"times less. Medians of {len(figures['rounds'])} rounds, {CHECKPOINTS} checkpoints each."
    )
    console.print(line(figures["machine"]))


if __name__ == "__main__":
    main()
