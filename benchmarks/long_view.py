"""KuaiRand's long-view protocol: how well the ranker orders each user's logged impressions, and what each part gives.

    python -m benchmarks.long_view --data ../shared/data/kuairand-pure                     # parts, by validation days
    python -m benchmarks.long_view --data ../shared/data/kuairand-pure --test --json FILE  # and the test days, once

Chosen by: trained up to 04-26, the epoch by its loss on 04-27 and 04-28, which are also what the parts are compared on.
Scored: the same number of epochs on everything up to 04-28, then 04-29 to the log's end. Counters stand still at the
first scored day, as in a bundle. GAUC over users with both classes, weighted by positives; nDCG@5 with 0 for users
without positives; primary is their mean (the starter kit of TikTok TechJam 2026). Trained rankers
stay in --work, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash
from rich.console import Console
from rich.table import Table

from features.dataset import Dataset
from features.schema import SIGNALS
from pipelines import ingest as ingestion
from pipelines.adapters.kuairand import KuaiRandAdapter
from pipelines.console import output
from pipelines.evaluate_ranking import evaluate_protocol, score_examples
from pipelines.metrics import kuairand_primary
from pipelines.recipes import SplitConfig, recipe
from pipelines.run import machine
from pipelines.stages import encoded
from pipelines.training.trainer import Progress, TrainConfig, fit
from ranking.config import RankerConfig
from ranking.infer import Ranker
from ranking.train import RankerTask

RECIPE = recipe("kuairand-pure")
SPLIT = SplitConfig(test_days=6, validation_days=2)
FULL = "the recipe"
PARTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "undated impressions off": {"undated": False},
    "surface not known": {"surface_as_context": False},
    "counters on": {"counters": True},
    "history on": {"history": True},
    "every feature": {"leave_out": ()},
}


@dataclass(frozen=True, slots=True)
class Days:
    """A dataset whose ids are known from its training dates, and the dates that are scored."""

    dataset: Dataset
    train: tuple[str, ...]
    scored: tuple[str, ...]


def main() -> None:
    """Train what is missing, print, and with `--test` score the test days."""
    parser = argparse.ArgumentParser(prog="benchmarks.long_view", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="KuaiRand-Pure, as it is downloaded")
    parser.add_argument("--work", type=Path, default=Path("runs/long-view"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts that are trained; default: all")
    parser.add_argument("--test", action="store_true", help="also train up to 04-28 and score the test days")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, canonical = output(), options.work.absolute() / "canonical"
    if not canonical.exists():
        ingestion.ingest(KuaiRandAdapter(options.data), canonical, on_progress=lambda p: console.print(str(p)))
    dates = tuple(sorted(set(ingestion.load_events(canonical)["date"].to_pylist())))
    split = SPLIT.resolve(dates)
    choosing = Days(dataset_of(canonical, options.work / "choosing", split.train), split.train, split.validation)
    how, figures = RECIPE.ranker_train, {"machine": machine(), "split": asdict(split), "parts": []}
    seeds = range(1, options.seeds + 1)
    for name in options.only or PARTS:
        config = replace(RECIPE.ranker, **PARTS[name])
        runs = [score(choosing, config, replace(how, seed=seed), options.work, console) for seed in seeds]
        figures["parts"].append({"name": name, "runs": runs})
    if options.test:
        figures["test"] = test(canonical, options.work, split, figures["parts"][0]["runs"], console)
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def dataset_of(canonical: Path, folder: Path, train_dates: tuple[str, ...]) -> Dataset:
    """Encoded once."""
    if not (folder / "dates.json").exists():
        encoded(canonical, RECIPE.spec, train_dates).save(folder)
    return Dataset.load(folder)


def score(days: Days, config: RankerConfig, how: TrainConfig, work: Path, console: Console) -> dict[str, Any]:
    """Train (unless it was), then the protocol's figures of the scored days."""
    folder, epochs = trained(days, config, how, work, console)
    scores, rows = long_view_scores(days, folder)
    labels, users = _labels(days.dataset, rows), days.dataset.examples.user_row[rows]
    gauc, ndcg5, primary = kuairand_primary(labels, scores, users)
    return {"seed": how.seed, "epochs": epochs, "gauc": gauc, "ndcg5": ndcg5, "primary": primary}


def trained(days: Days, config: RankerConfig, how: TrainConfig, work: Path, console: Console) -> tuple[Path, int]:
    """Folder of the exported ranker, and the best epoch, counted from 1."""
    described = json.dumps([asdict(config), asdict(how), days.train, days.scored], sort_keys=True)
    folder = work / "rankers" / xxhash.xxh64_hexdigest(described.encode())
    record = folder / "trained.json"
    if not record.exists():

        def tell(p: Progress) -> None:
            if p.validation_loss is not None:
                console.print(f"seed {how.seed}, epoch {p.epoch + 1}: {p.samples_per_s:,.0f} samples/s, "
                              f"validation loss {p.validation_loss:.4f}")  # fmt: skip

        # Where the epochs are given there is nothing to choose by: the last training day stands in.
        watched = days.scored if how.patience else days.train[-1:]
        result = fit(RankerTask(days.dataset, config, days.train, watched), how, out_dir=folder, on_progress=tell)
        record.write_text(json.dumps({"best_epoch": result.best_epoch + 1}))
    return folder, json.loads(record.read_text())["best_epoch"]


def long_view_scores(days: Days, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, example rows) of the scored days."""
    ranker, rows = Ranker.load(folder), days.dataset.rows_on(days.scored)
    probability_NT, _ = score_examples(days.dataset, ranker, rows)
    return probability_NT[:, ranker.tasks.index("long_view")].astype(np.float64), rows


def test(canonical: Path, work: Path, split: Any, chosen: list[dict[str, Any]], console: Console) -> dict[str, Any]:
    """Each seed with the epochs it chose, on the test days, beside what needs no ranker."""
    train = (*split.train, *split.validation)
    days = Days(dataset_of(canonical, work / "scoring", train), train, split.test)
    runs, scores, rows = [], np.zeros(0), np.zeros(0, np.int64)
    for run in chosen:
        how = replace(RECIPE.ranker_train, seed=run["seed"], epochs=run["epochs"], patience=0)
        runs.append(score(days, RECIPE.ranker, how, work, console))
        scores, rows = long_view_scores(days, trained(days, RECIPE.ranker, how, work, console)[0])
    tables = {name: ingestion.load_table(canonical, name) for name in ("videos", "undated")}
    frames = {name: pl.DataFrame(pl.from_arrow(table)) for name, table in tables.items() if table is not None}
    others = evaluate_protocol(
        days.dataset,
        rows,
        scores,
        train_rows=days.dataset.rows_on(train),
        events=pl.DataFrame(pl.from_arrow(ingestion.load_events(canonical))),
        videos=frames["videos"],
        undated=frames.get("undated"),
        progress=console.print,
    )
    return {"runs": runs, "rows": len(rows), "others": [row for row in others if row["name"] != "reelrank ranker"]}


def show(figures: dict[str, Any], console: Console) -> None:
    """A row a part by the validation days, then the test days."""
    table = Table("validation days", "GAUC", "nDCG@5", "primary, mean of the seeds", "spread", "epochs")
    for part in figures["parts"]:
        table.add_row(part["name"], *_cells(part["runs"]), ", ".join(str(run["epochs"]) for run in part["runs"]))
    console.print(table)
    if "test" in figures:
        found = figures["test"]
        table = Table(f"test days, {found['rows']:,} impressions", "GAUC", "nDCG@5", "primary", "spread")
        table.add_row("reelrank ranker", *_cells(found["runs"]))
        for row in sorted(found["others"], key=lambda row: -row["primary"]):
            table.add_row(row["name"], *_cells([row]))
        console.print(table)
    console.print(f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores")


def _cells(runs: list[dict[str, Any]]) -> tuple[str, ...]:
    means = [f"{np.mean([run[name] for run in runs]):.4f}" for name in ("gauc", "ndcg5", "primary")]
    primaries = [run["primary"] for run in runs]
    spread = f"{min(primaries):.4f} .. {max(primaries):.4f}" if len(runs) > 1 else ""
    return (*means, spread)


def _labels(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return np.asarray(dataset.examples.signals[rows, SIGNALS.index("long_view")], np.float64)


if __name__ == "__main__":
    main()
