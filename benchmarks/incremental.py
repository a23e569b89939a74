"""Daily warm starts beside a full retrain and a model that is never trained again: quality and cost, day by day.

    python -m benchmarks.incremental [--scale smoke] [--days 20] [--first 14] [--json FILE]

Three pairs of models answer for every day D of a simulated world in which tastes drift. Whatever is trained or counted
ends before D, and calibration is fitted on the day before:
- `full`: both models trained anew on all days up to D - 2
- `daily`: yesterday's models trained on with day D - 2 alone; the first is the full one
- `frozen`: the first day's models, with the counters and the catalogue of the day

Retrieval: recall@100 by exact search. Ranking: mean over the tasks with enough positives of AUC, and of normalised
entropy (below 1 is better than the base rate). Cost: CPU seconds of training both models, one process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from candidate_gen.infer import Towers
from candidate_gen.train import TowersTask, features_at, index_instant
from features.dataset import Dataset
from pipelines import ingest as ingestion
from pipelines.console import output
from pipelines.evaluate_ranking import evaluate_tasks, score_examples
from pipelines.evaluate_retrieval import exact_top, make_queries, method_row, user_vectors
from pipelines.recipes import Recipe, Split, recipe
from pipelines.run import machine
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.incremental import IncrementalConfig, carried_on
from pipelines.training.trainer import fit
from pipelines.training.warm_start import WarmStart
from pipelines.world import SCALES, LifeConfig, generate
from ranking.infer import Ranker
from ranking.train import RankerTask

K = 100
FIGURES = ("cpu_s", "recall", "auc", "entropy", "auc_long_view", "entropy_long_view")


@dataclass(frozen=True, slots=True)
class Models:
    """Trained towers and ranker of one kind, and the encoder they read by."""

    folder: Path
    dataset: Dataset

    def checkpoint(self, name: str) -> Path:
        """The best one, to train on from."""
        found = Checkpoints(self.folder / name / "checkpoints").find("best")
        if found is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder / name}")
        return found


def main() -> None:
    """Generate the world, train three ways day by day, print."""
    parser = argparse.ArgumentParser(prog="benchmarks.incremental", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--days", type=int, default=20, help="days of the world")
    parser.add_argument("--first", type=int, default=14, help="days of the log when the first models are trained")
    parser.add_argument("--drift", type=float, default=0.05, help="daily change of every taste; see LifeConfig")
    parser.add_argument("--every", type=int, default=2, help="a full retrain every so many days")
    parser.add_argument("--lr-share", type=float, default=IncrementalConfig().lr_share)
    parser.add_argument("--work", type=Path, default=Path("runs/incremental"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = output()
    scale = SCALES[options.scale]
    uploads_a_day = scale.n_videos / (scale.stock_days + scale.n_days)
    world = replace(
        scale,
        n_days=options.days,
        n_videos=round(uploads_a_day * (scale.stock_days + options.days)),
        life=LifeConfig(drift=options.drift),
    )
    logs = options.work / "world"
    shutil.rmtree(options.work, ignore_errors=True)
    generate(world, logs)
    chosen = recipe(f"world-{options.scale}")
    rows = list(days(logs, chosen, options, console))
    figures = {"machine": machine(), "summary": summary(rows), "days": rows}
    show(rows, figures["summary"], console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def days(logs: Path, chosen: Recipe, options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """One row a day and kind."""
    dates = sorted(path.name.removeprefix("date=") for path in (logs / "events").glob("date=*"))
    how, first, daily = IncrementalConfig(lr_share=options.lr_share), None, None
    for n_days in range(options.first, len(dates) + 1):
        tables, split = log_of(logs, tuple(dates[:n_days])), chosen.split.resolve(tuple(dates[:n_days]))
        folder = options.work / str(n_days)
        found = {}
        if first is None or (n_days - options.first) % options.every == 0:
            found["full"] = timed(partial(full, folder / "full", tables, chosen, split))
        if first is None or daily is None:
            first, cpu_s = found["full"]
            found |= {"daily": (first, cpu_s), "frozen": (first, 0.0)}
        else:
            found["daily"] = timed(partial(trained_on, folder / "daily", daily, tables, chosen, how, split))
            found["frozen"] = unchanged(first, tables), 0.0
        daily = found["daily"][0]
        for kind, (models, cpu_s) in found.items():
            row = {"day": split.test[0], "kind": kind, "cpu_s": cpu_s, **quality(models, chosen, split)}
            console.print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in row.items()))
            yield row


def log_of(logs: Path, dates: tuple[str, ...]) -> dict[str, Any]:
    """The canonical tables as they were at the end of these dates."""
    events, videos = ingestion.load_events(logs, dates), ingestion.load_table(logs, "videos")
    if videos is None:
        raise FileNotFoundError(f"{logs / 'videos.parquet'} is not there")
    uploaded = videos["upload_ts_ms"].to_numpy() <= events["ts_ms"].to_numpy().max()
    return {
        "users": ingestion.load_table(logs, "users"),
        "videos": videos.filter(pa.array(uploaded)),
        "events": events,
        "undated": None,
        "follows": ingestion.load_table(logs, "follows"),
    }


def full(folder: Path, tables: dict[str, Any], chosen: Recipe, split: Split) -> Models:
    """Everything from nothing."""
    dataset = Dataset.build(chosen.spec, train_dates=split.train, **tables)
    towers = TowersTask(dataset, chosen.towers, split.train, split.validation)
    fit(towers, chosen.towers_train, out_dir=folder / "towers")
    ranker = RankerTask(dataset, chosen.ranker, split.train, split.validation)
    fit(ranker, chosen.ranker_train, out_dir=folder / "ranker")
    return Models(folder, dataset)


def trained_on(
    folder: Path, before: Models, tables: dict[str, Any], chosen: Recipe, how: IncrementalConfig, split: Split
) -> Models:
    """One more day."""
    new = split.train[-1:]
    encoder, renewed = carried_on(before.dataset.encoder, tables, dates=new, keep_ids_days=how.keep_ids_days)
    dataset = Dataset.build(encoder.spec, train_dates=new, **tables, encoder=encoder)
    towers = TowersTask(dataset, chosen.towers, new, split.validation, undated=False)
    start = WarmStart(checkpoint=before.checkpoint("towers"), renewed=renewed)
    fit(towers, how.trained_on(chosen.towers_train), out_dir=folder / "towers", start=start)
    ranker = RankerTask(dataset, chosen.ranker, new, split.validation, before.folder / "ranker")
    start = WarmStart(checkpoint=before.checkpoint("ranker"), renewed=renewed)
    fit(ranker, how.trained_on(chosen.ranker_train), out_dir=folder / "ranker", start=start)
    return Models(folder, dataset)


def unchanged(before: Models, tables: dict[str, Any]) -> Models:
    """The same models and encoder on today's log."""
    dataset = Dataset.build(before.dataset.encoder.spec, train_dates=(), **tables, encoder=before.dataset.encoder)
    return Models(before.folder, dataset)


def quality(models: Models, chosen: Recipe, split: Split) -> dict[str, float]:
    """Of the test day."""
    dataset = models.dataset
    towers, ranker = Towers.load(models.folder / "towers"), Ranker.load(models.folder / "ranker")
    day, now_ms = index_instant(dataset, split.test)
    rows = np.arange(len(dataset.videos) + 1)
    vectors_VD = towers.video_vectors(dataset.videos, rows, features_at(dataset, rows, day, now_ms))
    queries = make_queries(dataset, split.test, chosen.retrieval_signal)
    top = exact_top(vectors_VD, user_vectors(dataset, towers, queries), queries, dataset.eligible, K)
    found = method_row("", top, queries, (K,), int(dataset.eligible.sum()))
    tested = dataset.rows_on(split.test)
    probability_NT, _ = score_examples(dataset, ranker, tested)
    tasks = evaluate_tasks(dataset, tested, ranker.tasks, probability_NT, dataset.rows_on(split.validation))
    measured = [task for task in tasks if "auc" in task]
    by_name = {task["task"]: task for task in measured}
    return {
        "recall": found[f"recall@{K}"],
        "auc": float(np.mean([task["auc"] for task in measured])),
        "entropy": float(np.mean([task["normalised_entropy"] for task in measured])),
        "auc_long_view": by_name["long_view"]["auc"],
        "entropy_long_view": by_name["long_view"]["normalised_entropy"],
    }


def timed(work: Callable[[], Models]) -> tuple[Models, float]:
    """What it made, and its CPU seconds."""
    started = time.process_time()
    made = work()
    return made, time.process_time() - started


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the days after the first that were also retrained in full: each kind's mean share of `full`, by figure."""
    full_rows = {row["day"]: row for row in rows if row["kind"] == "full"}
    del full_rows[min(full_rows)]  # there all three are one
    shares = {}
    for kind in ("daily", "frozen"):
        same = [row for row in rows if row["kind"] == kind and row["day"] in full_rows]
        shares[kind] = {
            name: float(np.mean([row[name] / full_rows[row["day"]][name] for row in same])) for name in FIGURES
        }
    return shares


def show(rows: list[dict[str, Any]], shares: dict[str, dict[str, float]], console: Console) -> None:
    """The curves, and what they come to."""
    table = Table(title="quality of the day, by how the models were trained")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    for kind, figures in shares.items():
        table.add_section()
        table.add_row("share of full", kind, *(f"{figures[name]:.4f}" for name in FIGURES))
    console.print(table)


if __name__ == "__main__":
    main()
