"""Watch time by D2Q against plain regression: the same network, data and loss, and another target.

    python -m benchmarks.watch_time --kuairand ../shared/data/kuairand-pure --world small --json FILE

- `D2Q`: the quantile of the watch time among videos of like duration, as the recipe has it
- `one bucket`: the quantile among all videos; what is left of D2Q without the duration
- `log seconds` and `seconds`: plain regression of the logarithm and of the watch time itself, scaled to 0 .. 1

All four are fitted by the same cross-entropy, whose minimiser is the expected target: an expected quantile turned back
is near a median, a regression of seconds gives a mean. Hence both, MAE (best at the median) and the mean prediction
over the mean. On the simulated world also: does the score order impressions by the affinity that is true there?
Rankers read no histories here, which is four times as fast. Trained ones stay in --work.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from features.dataset import Dataset
from pipelines import ingest as ingestion
from pipelines.adapters import Adapter
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.adapters.kuairand import KuaiRandAdapter
from pipelines.console import output
from pipelines.evaluate_ranking import evaluate_watch
from pipelines.metrics import xauc
from pipelines.recipes import Recipe, Split, recipe
from pipelines.run import machine
from pipelines.stages import encoded
from pipelines.training.trainer import fit
from pipelines.world import SCALES, World, generate
from ranking.infer import Ranker
from ranking.train import RankerTask
from ranking.watch import GRID, WatchQuantiles

CAP_QUANTILE = 0.999
"""Regressions see watch times up to this quantile: one looped video must not set the scale."""
TARGETS = ("D2Q", "one bucket", "log seconds", "seconds")
CHUNK, PAIRS = 4096, 50_000
"""Rows scored at once; rows on which the order by affinity is measured."""


class WatchTask(RankerTask):
    """The ranker with another target in the place of the duration buckets' quantiles."""

    def __init__(self, *arguments: Any, target: str) -> None:
        self._target = target
        super().__init__(*arguments)

    def _fit_watch(self) -> WatchQuantiles:
        fitted = super()._fit_watch()
        watch_ms = np.asarray(self._dataset.examples.watch_ms[self._dated_rows], np.float64)
        if self._target == "D2Q":
            return fitted
        if self._target == "one bucket":
            return WatchQuantiles.fit(watch_ms, np.zeros(len(watch_ms)), None)
        cap_ms = float(np.nanquantile(watch_ms, CAP_QUANTILE))
        table = GRID * cap_ms if self._target == "seconds" else np.expm1(GRID * np.log1p(cap_ms))
        return WatchQuantiles(np.zeros(0), table[None, :], None)


@dataclass(frozen=True, slots=True)
class Log:
    """Data, how a ranker is trained on it, and the truth where there is one."""

    name: str
    dataset: Dataset
    recipe: Recipe
    split: Split
    truth: World | None


def main() -> None:
    """Train what is missing, score the test days, print."""
    parser = argparse.ArgumentParser(prog="benchmarks.watch_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kuairand", type=Path, help="KuaiRand-Pure, as it is downloaded")
    parser.add_argument("--world", choices=SCALES, help="also on a simulated world of this scale")
    parser.add_argument("--work", type=Path, default=Path("runs/watch-time"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, figures = output(), {"machine": machine(), "logs": []}
    for log in logs(options.kuairand, options.world, options.work.absolute()):
        rows = []
        for target in TARGETS:
            for seed in range(1, options.seeds + 1):
                console.print(f"{log.name}: {target}, seed {seed}")
                rows.append({"target": target, "seed": seed} | measured(log, target, seed, options.work))
        figures["logs"].append({"name": log.name, "split": asdict(log.split), "rows": rows})
        show(log.name, rows, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def logs(kuairand: Path | None, scale: str | None, work: Path) -> list[Log]:
    """The logs that were asked for, ingested and encoded once."""
    found = []
    if kuairand is not None:
        found.append(_log("kuairand", KuaiRandAdapter(kuairand), recipe("kuairand-pure"), work, None))
    if scale is not None:
        raw = work / f"world-{scale}" / "raw"
        if not (raw / "events").exists():
            generate(SCALES[scale], raw)
        found.append(
            _log(f"world-{scale}", CanonicalAdapter(raw), recipe(f"world-{scale}"), work, World(SCALES[scale]))
        )
    return found


def _log(name: str, adapter: Adapter, chosen: Recipe, work: Path, truth: World | None) -> Log:
    folder = work / name
    if not (folder / "canonical").exists():
        ingestion.ingest(adapter, folder / "canonical")
    dates = tuple(sorted(path.name.removeprefix("date=") for path in (folder / "canonical" / "events").glob("date=*")))
    split = chosen.split.resolve(dates)
    if not (folder / "dataset" / "dates.json").exists():
        encoded(folder / "canonical", chosen.spec, split.train).save(folder / "dataset")
    return Log(name, Dataset.load(folder / "dataset"), chosen, split, truth)


def measured(log: Log, target: str, seed: int, work: Path) -> dict[str, Any]:
    """Figures of one target on the test days."""
    folder = work / log.name / f"{target.replace(' ', '-')}-{seed}"
    if not (folder / "training.json").exists():
        config = replace(log.recipe.ranker, history=False, counters=False)
        task = WatchTask(log.dataset, config, log.split.train, log.split.validation, target=target)
        fit(task, replace(log.recipe.ranker_train, seed=seed), out_dir=folder)
    rows = log.dataset.rows_on(log.split.test)
    score_N, watch_ms_N = _scores(log.dataset, Ranker.load(folder), rows)
    out = evaluate_watch(log.dataset, rows, watch_ms_N)
    out["calibration"] = out["mean_predicted_s"] / out["mean_s"]
    if log.truth is not None:
        out |= _order_by_affinity(log.truth, log.dataset, rows, score_N, watch_ms_N)
    return out


def _scores(dataset: Dataset, ranker: Ranker, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logit of the target, and milliseconds (N,)."""
    logits, watch = [], []
    for start in range(0, len(rows), CHUNK):
        inputs = dataset.inputs(rows[start : start + CHUNK], with_slot=False)
        logits.append(ranker.logits(inputs)[1])
        watch.append(ranker.score(inputs).watch_ms_N)
    return np.concatenate(logits), np.concatenate(watch)


def _order_by_affinity(
    truth: World, d: Dataset, rows: np.ndarray, score_N: np.ndarray, watch_ms_N: np.ndarray
) -> dict[str, float]:
    """XAUC and Spearman's correlation of the score, and XAUC of the predicted seconds, against the true affinity."""
    at = np.random.default_rng(0).permutation(len(rows))[:PAIRS]
    e = d.examples.take(rows[at])
    affinity = truth.affinity(d.users.ids_of(e.user_row), d.videos.ids_of(e.video_row), e.ts_ms)
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (affinity, score_N[at])]
    return {
        "affinity_xauc": xauc(affinity, score_N[at]),
        "affinity_spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
        "affinity_xauc_of_seconds": xauc(affinity, watch_ms_N[at]),
    }


def show(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    """A row a target (means over the seeds), then MAE and XAUC by bucket of the duration."""
    columns = [key for key in rows[0] if key not in ("target", "seed", "buckets", "rows")]
    table = Table("target", *columns, title=f"{name}, {rows[0]['rows']:,} test impressions", title_justify="left")
    labels = [bucket["duration_s"] for bucket in rows[0]["buckets"]]
    by_bucket = Table("MAE s / XAUC at a duration of", *[f"{label} s" for label in labels])
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        table.add_row(target, *[f"{np.mean([row[key] for row in own]):.4f}" for key in columns])
        cells = []
        for k in range(len(labels)):
            error, order = (np.mean([row["buckets"][k][key] for row in own]) for key in ("mae_s", "xauc"))
            cells.append(f"{error:.2f} / {order:.4f}")
        by_bucket.add_row(target, *cells)
    console.print(table)
    console.print(by_bucket)


if __name__ == "__main__":
    main()
