"""What an epoch of `reelrank sequential` costs on a file of MovieLens-1M's size, without MovieLens.

    python -m benchmarks.sequential_speed [--json FILE] [--steps 12] [--set model.encoder.kind=hstu ...]

6,040 users, 3,706 items, 1,000,209 ratings of random items, Zipf-like; lengths log-normal from 20 up, as MovieLens-1M's
are (median 96, mean 165.6). A sample of an epoch's steps and of the validation users is timed, the epoch extrapolated.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipelines.run import machine
from pipelines.sequential.data import load
from pipelines.sequential.metrics import rank_targets
from pipelines.sequential.recipes import sequential_recipe
from pipelines.sequential.train import Trainer

USERS, ITEMS, RATINGS, SHORTEST, MEDIAN = 6040, 3706, 1_000_209, 20, 96
WARM_UP_STEPS = 2
VALIDATION_USERS = 512


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.sequential_speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], help="change the ml-1m recipe")
    options = parser.parse_args()
    figures = measure(options.steps, options.set)
    show(figures, Console(width=110))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(steps: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds of reading, of a training epoch and of a validation, wall and CPU."""
    recipe = sequential_recipe("ml-1m", overrides)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratings.dat"
        _write_ratings(file)
        clock = _Clock()
        sequences = load(file, recipe.source)
        read = clock.seconds()
        trainer = Trainer(
            sequences,
            recipe.model,
            recipe.train,
            exclude=recipe.exclude,
            folder=Path(folder),
            device=torch.device("cpu"),
        )
        epoch, validation = _time_epoch(trainer, steps), _time_validation(trainer)
        return {
            "overrides": overrides,
            "machine": machine() | {"threads": torch.get_num_threads()},
            "torch": torch.__version__,
            "bf16": trainer.bf16,
            "read": read,
            "epoch": epoch,
            "validation": validation,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def show(figures: dict[str, Any], console: Console) -> None:
    """One row a part."""
    table = Table(title="MovieLens-1M's size: " + (" ".join(figures["overrides"]) or "the ml-1m recipe"))
    for column in ("", "wall s", "CPU s"):
        table.add_column(column, justify="right" if column else "left")
    for name, what in (
        ("read", "read the file"),
        ("epoch", "train an epoch"),
        ("validation", "rank 6,040 validation items"),
    ):
        table.add_row(what, f"{figures[name]['wall_s']:.1f}", f"{figures[name]['cpu_s']:.1f}")
    console.print(table)
    where = figures["machine"]
    console.print(
        f"{where['cpu']}, {where['threads']} threads, torch {figures['torch']}, "
        f"{'bf16' if figures['bf16'] else 'fp32'}, peak memory {figures['peak_gib']:.1f} GiB; an epoch is extrapolated "
        "from a sample of its steps"
    )


def _write_ratings(file: Path) -> None:
    rng = np.random.default_rng(0)
    spread = np.sqrt(2 * np.log((RATINGS / USERS - SHORTEST) / (MEDIAN - SHORTEST)))  # mean over median, log-normal
    length = SHORTEST + (MEDIAN - SHORTEST) * np.exp(spread * rng.normal(size=USERS))
    length = np.maximum(SHORTEST, np.floor(length * RATINGS / length.sum())).astype(np.int64)
    length[int(length.argmax())] += RATINGS - length.sum()
    share = 1 / (np.arange(ITEMS) + 50.0)
    user = np.repeat(np.arange(1, USERS + 1), length)
    item = 1 + rng.choice(ITEMS, RATINGS, p=share / share.sum())
    ts = 956_700_000 + rng.integers(0, 90_000_000, RATINGS)
    rows = zip(user.tolist(), item.tolist(), ts.tolist(), strict=True)
    file.write_text("".join(f"{u}::{i}::3::{t}\n" for u, i, t in rows))


def _time_epoch(trainer: Trainer, steps: int) -> dict[str, float]:
    """Every how many-th batch of an epoch, so that short and long ones are drawn alike."""
    batches = list(trainer._batches(0))
    per_batch = int(trainer.windows.size_W.sum()) / len(batches)
    trainer.model.train()
    for chosen in batches[:WARM_UP_STEPS]:
        trainer._step(trainer.windows.take(chosen), per_batch)
    by_size = sorted(batches, key=lambda chosen: int(trainer.windows.size_W[chosen].sum()))
    sample = by_size[:: max(1, len(by_size) // steps)]
    clock = _Clock()
    for chosen in sample:
        trainer._step(trainer.windows.take(chosen), per_batch)
    targets = sum(int(trainer.windows.size_W[chosen].sum()) for chosen in sample)
    return clock.seconds(int(trainer.windows.size_W.sum()) / targets)


def _time_validation(trainer: Trainer) -> dict[str, float]:
    trainer.model.eval()
    every = np.random.default_rng(0).permutation(len(trainer.validation))
    part = trainer.validation.take(every[:VALIDATION_USERS])
    with torch.no_grad():
        clock = _Clock()
        rank_targets(trainer.scorer(), trainer.sequences, part, trainer.exclude, tops=0)
    return clock.seconds(len(trainer.validation) / len(part))


class _Clock:
    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self, times: float = 1.0) -> dict[str, float]:
        """Since it was made, extrapolated to `times` as much."""
        return {
            "wall_s": (time.perf_counter() - self.wall) * times,
            "cpu_s": (time.process_time() - self.cpu) * times,
        }


if __name__ == "__main__":
    main()
