"""Encoders, losses and temperatures of `reelrank sequential` side by side, by the validation items alone.

    python -m benchmarks.sequential_choice --data FILE [--recipe kuairand-pure] [--work DIR] [--only NAME ...]

Each variant is the recipe with a few changes, one seed. Work folders are those of `reelrank sequential`: a killed
benchmark goes on at its last epoch, a finished variant is not trained again. No test item is scored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.console import Stages
from pipelines.run import machine
from pipelines.sequential.recipes import RECIPES, sequential_recipe
from pipelines.sequential.run import run_benchmark

SAMPLED = ("model.loss=sampled",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "hstu": ("model.encoder.kind=hstu",),
    "sampled": SAMPLED,
    "mixed, logQ": (*SAMPLED, "model.uniform_negatives=256", "model.in_batch_negatives=256"),
    "in-batch, logQ": (*SAMPLED, "model.uniform_negatives=0", "model.in_batch_negatives=512"),
    "in-batch, no logQ": (
        *SAMPLED,
        "model.uniform_negatives=0",
        "model.in_batch_negatives=512",
        "model.correct_sampling=false",
    ),
    "temperature .05": ("model.temperature=0.05",),
    "dot product": ("model.l2_norm=false", "model.temperature=1.0"),
    "sasrec, absolute": ("model.encoder.kind=sasrec", "model.encoder.positions=absolute"),
    "ligr, absolute": ("model.encoder.positions=absolute",),
    "float32": ("train.precision=fp32",),
}


def main() -> None:
    """Train what is not yet trained and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.sequential_choice", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", choices=list(RECIPES), default="kuairand-pure")
    parser.add_argument("--work", type=Path, default=Path("runs/sequential-choice"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(options.data, options.recipe, options.work, name) for name in options.only]
    figures = {"recipe": options.recipe, "machine": machine(), "variants": rows}
    show(figures, Console(width=110))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(data: Path, recipe: str, work: Path, name: str) -> dict[str, Any]:
    """One variant's validation figures, beside popularity's."""
    folder = work / name.replace(", ", "-").replace(" ", "-")
    result = run_benchmark(data, sequential_recipe(recipe, VARIANTS[name]), folder, Stages(), score_test=False)
    seed = result["seeds"][0]
    return {
        "variant": name,
        "changes": VARIANTS[name],
        "validation": seed["validation"],
        "best_epoch": seed["best_epoch"] + 1,
        "epochs": len(seed["epochs"]),
        "cpu_s_per_epoch": sum(e["cpu_s"] for e in seed["epochs"]) / len(seed["epochs"]),
        "popularity": result["popularity"]["validation"],
    }


def show(figures: dict[str, Any], console: Console) -> None:
    """A row a variant, popularity first."""
    names = ("ndcg@10", "hr@10", "hr@50", "hr@200", "coverage@10")
    table = Table(title=f"{figures['recipe']}: validation items, one seed")
    for column in ("", *names, "best epoch", "CPU s an epoch"):
        table.add_column(column, justify="right" if column else "left")
    popularity = figures["variants"][0]["popularity"]
    table.add_row("popularity", *(f"{popularity[n]:.4f}" for n in names), "", "")
    for row in figures["variants"]:
        cells = [f"{row['validation'][n]:.4f}" for n in names]
        table.add_row(
            row["variant"], *cells, f"{row['best_epoch']} of {row['epochs']}", f"{row['cpu_s_per_epoch']:.0f}"
        )
    console.print(table)
    console.print(f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores")


if __name__ == "__main__":
    main()
