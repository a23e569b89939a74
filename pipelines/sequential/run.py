"""A sequential benchmark from file to figures: popularity, each seed's best epoch on the test items once, mean, spread.

RUN/benchmark.json     recipe and fingerprint of the data     RUN/seed-1/         checkpoints of a seed
RUN/result.json        everything below, for machines         RUN/seed-1.json     its figures, once it is done
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipelines.console import Stage, Stages
from pipelines.run import machine
from pipelines.sequential.data import Sequences, describe, load
from pipelines.sequential.metrics import KS, popularity, rank_targets, summarise
from pipelines.sequential.recipes import SequentialRecipe
from pipelines.sequential.train import Trainer


def run_benchmark(
    file: Path,
    recipe: SequentialRecipe,
    folder: Path,
    shown: Stages,
    *,
    seeds: int = 1,
    device: str = "cpu",
    fresh: bool = False,
    score_test: bool = True,
) -> dict[str, Any]:
    """Train and measure `seeds` seeds from the recipe's own on; goes on where a killed run stopped.

    With `score_test` off, the test items stay untouched: for choosing between configurations.
    """
    where = _device(device)
    with shown.stage("read") as stage:
        sequences = load(file, recipe.source)
        counts = describe(sequences)
        stage.rows = int(counts["interactions"])
        stage.note = f"{counts['users']:,} users ({counts['evaluated_users']:,} evaluated), {counts['items']:,} items"
    _open_folder(folder, recipe, sequences, fresh)
    with shown.stage("popularity"):
        baseline = {role: _popularity(sequences, recipe, role) for role in _roles(score_test)}
    runs = []
    for seed in range(recipe.train.seed, recipe.train.seed + seeds):
        with shown.stage(f"seed {seed}") as stage:
            runs.append(_seed(sequences, recipe, seed, folder, where, stage, score_test))
    result = {
        "recipe": asdict(recipe),
        "data": {"file": file.name, **counts},
        "machine": machine() | {"device": _device_name(where)},
        "versions": {name: version(name) for name in ("torch", "numpy", "polars")},
        "popularity": baseline,
        "seeds": runs,
        "summary": {role: _mean_and_spread([run[role] for run in runs]) for role in _roles(score_test)},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def _roles(score_test: bool) -> tuple[str, ...]:
    return ("validation", "test") if score_test else ("validation",)


def _seed(
    sequences: Sequences,
    recipe: SequentialRecipe,
    seed: int,
    folder: Path,
    device: torch.device,
    stage: Stage,
    score_test: bool,
) -> dict[str, Any]:
    """One seed's figures; kept beside its checkpoints, so that no test item is scored twice."""
    kept = folder / f"seed-{seed}.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if all(role in figures for role in _roles(score_test)):
        return figures
    settings = {"exclude": recipe.exclude, "device": device, "tell": stage.progress}
    train = replace(recipe.train, seed=seed)
    trainer = Trainer(sequences, recipe.model, train, folder=folder / f"seed-{seed}", **settings)
    trainer.fit()
    figures = {
        "seed": seed,
        "best_epoch": trainer.best.epoch,
        "bf16": trainer.bf16,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "validation": trainer.evaluate("validation"),
        "epochs": [asdict(e) for e in trainer.epochs],
    }
    if score_test:
        if recipe.refit:
            trainer = Trainer(
                sequences,
                recipe.model,
                train,
                folder=folder / f"seed-{seed}-refit",
                refit_epochs=trainer.best.epoch + 1,
                **settings,
            )
            trainer.fit()
        figures["test"] = trainer.evaluate("test")
    kept.write_text(json.dumps(figures, indent=1))
    stage.note = (
        f"best of {len(figures['epochs'])} epochs: {figures['best_epoch'] + 1}, validation NDCG@10 "
        f"{figures['validation']['ndcg@10']:.4f}"
    )
    return figures


def _popularity(sequences: Sequences, recipe: SequentialRecipe, role: Any) -> dict[str, float]:
    windows = sequences.windows(role, recipe.model.length)
    ranking = rank_targets(popularity(sequences, windows), sequences, windows, recipe.exclude)
    return summarise(ranking, sequences.n_items)


def _open_folder(folder: Path, recipe: SequentialRecipe, sequences: Sequences, fresh: bool) -> None:
    """Take over an empty folder or one of the same recipe and data; anything else is refused."""
    digest = hashlib.sha256()
    for array in (sequences.start_U, sequences.item_N, sequences.ts_ms_N):
        digest.update(np.ascontiguousarray(array).tobytes())
    identity = json.dumps({"recipe": asdict(recipe), "data": digest.hexdigest()}, indent=1, sort_keys=True)
    file = folder / "benchmark.json"
    if fresh and file.exists():
        shutil.rmtree(folder)
    if file.exists() and file.read_text() != identity:
        raise ValueError(
            f"{folder} holds a run of another recipe or other data: give another --run, or --fresh to start over"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(identity)


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: give cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; `reelrank doctor` says why")
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _mean_and_spread(figures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over seeds (NaN of one)."""
    return {
        name: {
            "mean": float(np.mean([f[name] for f in figures])),
            "sd": float(np.std([f[name] for f in figures], ddof=1)) if len(figures) > 1 else math.nan,
        }
        for name in figures[0]
    }


def print_result(result: dict[str, Any], console: Console) -> None:
    """A row for popularity, the model, and what others published."""
    role = "test" if "test" in result["summary"] else "validation"
    names = [f"{metric}@{k}" for k in KS for metric in ("hr", "ndcg")] + [f"coverage@{KS[0]}"]
    table = Table(title=f"{result['recipe']['name']}: {role} items, whole catalogue ranked")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("popularity", *(f"{result['popularity'][role][name]:.4f}" for name in names))
    summary, seeds = result["summary"][role], len(result["seeds"])
    shown = [f"{summary[n]['mean']:.4f}" + (f" ±{summary[n]['sd']:.4f}" if seeds > 1 else "") for n in names]
    table.add_row(f"reelrank, {seeds} seed{'s' if seeds > 1 else ''}", *shown)
    if role == "test":
        for other in result["recipe"]["published"]:
            cells = [f"{other['hr10']:.4f}", f"{other['ndcg10']:.4f}", *[""] * (len(names) - 2)]
            table.add_row(f"{other['name']} (published)", *cells)
    console.print(table)
    counts, where = result["data"], result["machine"]
    console.print(
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['interactions']:,} interactions; "
        f"{where['cpu']}, {where['cores']} cores, {where['device']}, torch {result['versions']['torch']}",
        soft_wrap=True,
    )
