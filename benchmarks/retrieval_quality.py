"""Recall of the towers beside what needs no training, and without each of their parts, on a prepared run's days.

    reelrank ingest --recipe kuairand-pure --data PATH --run RUN
    python -m benchmarks.retrieval_quality RUN --on validation          # choose by this
    python -m benchmarks.retrieval_quality RUN --on test --json FILE    # score once; nothing is trained again

Towers are trained on the training days, the epoch is chosen by validation loss. Every row answers the same queries
over the same corpus (`pipelines.evaluate_retrieval`). Trained towers stay in RUN/retrieval_quality, so a stopped
benchmark goes on where it was; with --json the figures are written after every row.

Q queries, K returned, V video rows, D vector width.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import xxhash
from rich.console import Console
from rich.table import Table

from candidate_gen.covisit import CovisitConfig, Covisits, liked
from candidate_gen.index import VideoIndex
from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask, features_at, index_instant
from features.dataset import Dataset
from features.history import UNDATED_TS_MS
from features.schema import SIGNALS
from pipelines.console import output
from pipelines.evaluate_retrieval import (
    Queries,
    exact_top,
    index_top,
    make_queries,
    method_row,
    popular_top,
    popularity_lists,
    user_vectors,
)
from pipelines.ingest import load_events
from pipelines.run import machine
from pipelines.training.trainer import Progress, fit
from pipelines.workspace import Workspace

MAIN = "two towers"
ENCODERS = ("ligr", "hstu", "none")
POPULARITY_DAYS = (1, 3, 7, None)
EMBED_CHUNK = 8192
SAMPLE_USERS = 4096
"""Users of the validation day whose vectors the index is shaped for."""
RESAMPLES = 1000
REPORTED = ("torch", "torchrec", "faiss-cpu", "numpy", "polars")


def main() -> None:
    """Train what is missing, score every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run whose logs are ingested")
    parser.add_argument("--on", choices=("validation", "test"), default="validation", help="days that are scored")
    parser.add_argument("--only", nargs="*", help="towers to train and score, by name; default: all")
    parser.add_argument("--queries", type=int, default=5_000, help="at most this many (user, day), drawn at random")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every row")
    options = parser.parse_args()
    console, figures = output(), {}
    for figures in measure(Workspace.open(options.run), options.on, options.queries, options.only, console.print):
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    show(figures, console)


def variants(base: TowerConfig, n_eligible: int) -> dict[str, TowerConfig]:
    """The towers of the recipe, then what they are without each of their parts, one change a row.

    Where the catalogue is trained on exactly, logQ and uniform negatives have no part: those rows are to be compared
    with the sampled softmax, which then has a row of its own."""
    sampled = replace(base, full_softmax_up_to=0)
    made = {MAIN: base}
    made |= {_encoder_row(kind): replace(base, encoder=kind) for kind in ENCODERS if kind != base.encoder}
    if n_eligible <= base.full_softmax_up_to:
        made["sampled softmax"] = sampled
    made["sampled, logQ off"] = replace(sampled, correct_sampling=False)
    made["sampled, logQ from a stream"] = replace(sampled, frequencies="streaming")
    made["sampled, uniform negatives off"] = replace(sampled, uniform_ratio=0.0)
    made["content off"] = replace(base, content=False)
    made["id dropout off"] = replace(base, id_dropout=0.0)
    return made


def measure(
    ws: Workspace, on: str, at_most: int, only: list[str] | None, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """All figures so far, after every row."""
    dataset, signal, ks = ws.dataset(), ws.recipe.retrieval_signal, ws.recipe.recall_at
    split = ws.split(dataset)
    dates = split.validation if on == "validation" else split.test
    queries = make_queries(dataset, dates, signal, at_most=at_most)
    scores = Scores(dataset, queries, ks)
    figures = {**_described(ws, on, dates), **scores.described(), "rows": scores.rows}
    events = load_events(ws.canonical)
    past = pl.DataFrame(pl.from_arrow(events)).filter(pl.col("date") < min(dates))
    for name, rows in popularity_lists(dataset, past, signal, POPULARITY_DAYS).items():
        scores.add(name, popular_top(rows, queries, max(ks)))
    day, now_ms = index_instant(dataset, dates)
    if (np.asarray(dataset.history.ts_ms) == UNDATED_TS_MS).any():
        scores.add("popularity, undated too", popular_top(_most_liked(dataset, signal, now_ms), queries, max(ks)))
    scores.add("co-visitation", covisit_top(dataset, queries, now_ms, max(ks)))
    yield figures
    for name, config in variants(ws.recipe.towers, scores.catalogue).items():
        if only and name not in only:
            continue
        towers, training = trained(ws, dataset, name, config, tell)
        vectors_VD, users_QD = embed(dataset, towers, day, now_ms), user_vectors(dataset, towers, queries)
        exact_QK = exact_top(vectors_VD, users_QD, queries, dataset.eligible, max(ks))
        scores.add(name, exact_QK, training=training)
        if name == MAIN:
            chunk = (np.arange(1, len(vectors_VD)), vectors_VD[1:])
            asked_before = make_queries(dataset, split.validation, signal, at_most=SAMPLE_USERS)
            sample_QD = user_vectors(dataset, towers, asked_before)
            with TemporaryDirectory(dir=ws.root) as folder:
                index = VideoIndex.build([chunk], len(vectors_VD), ws.recipe.index, Path(folder), query_QD=sample_QD)
                through_QK = index_top(index, users_QD, queries, dataset.eligible, max(ks))
            scores.add(f"{MAIN}, through the index", through_QK)
            figures["index_of_exact"] = {f"@{k}": _overlap(exact_QK[:, :k], through_QK[:, :k]) for k in ks}
        figures["differences"] = scores.differences()
        yield figures


def covisit_top(dataset: Dataset, queries: Queries, before_ms: int, k: int) -> np.ndarray:
    """Rows (Q, k) by item-to-item co-visitation, counted before an instant and asked with the whole history of L
    events; -1 where the neighbours ran out."""
    config, length = CovisitConfig(), dataset.encoder.spec.history_length
    covisits = Covisits.count(dataset.history, dataset.eligible, config, before_ms=before_ms)
    ends_Q = dataset.history.ends_at(queries.user_row_Q, queries.ts_ms_Q)
    top_QK = np.full((len(queries), k), -1, np.int64)
    for q in range(len(queries)):
        window = dataset.history.windows(queries.user_row_Q[q : q + 1], ends_Q[q : q + 1], length)
        rows, score = covisits.similar(*liked(window, config))
        score = np.where(np.isin(rows, queries.seen[q]), -np.inf, score)
        best = np.argsort(-score, kind="stable")[:k]
        best = best[score[best] > 0]
        top_QK[q, : len(best)] = rows[best]
    return top_QK


def _most_liked(dataset: Dataset, signal: str, before_ms: int) -> np.ndarray:
    """Eligible video rows by positives in all histories before an instant, those without a time among them."""
    log = dataset.history
    liked_M = (np.asarray(log.signals) >> SIGNALS.index(signal)) & (np.asarray(log.ts_ms) < before_ms)
    counts_V = np.bincount(log.video_row, weights=liked_M, minlength=len(dataset.eligible)) * dataset.eligible
    return np.argsort(-counts_V, kind="stable")[: np.count_nonzero(counts_V)]


def trained(
    ws: Workspace, dataset: Dataset, name: str, config: TowerConfig, tell: Callable[[str], None]
) -> tuple[Towers, dict[str, Any]]:
    """Towers of this configuration, from RUN/retrieval_quality where they are there; and how they were trained."""
    how = ws.recipe.towers_train
    described = json.dumps([asdict(config), asdict(how)], sort_keys=True)
    folder = ws.root / "retrieval_quality" / f"{name.replace(' ', '-')}-{xxhash.xxh32_hexdigest(described.encode())}"
    record = folder / "trained.json"
    if not record.exists():
        split, began, last_told = ws.split(dataset), time.process_time(), time.monotonic()

        def on_progress(p: Progress) -> None:
            nonlocal last_told
            if p.validation_loss is not None or time.monotonic() > last_told + 30:
                last_told = time.monotonic()
                tell(f"{name}: epoch {p.epoch + 1}/{p.epochs}, step {p.step}/{p.steps}, loss {p.loss:.4f}, "
                     f"validation loss {p.validation_loss}, {p.eta_s:.0f} s left")  # fmt: skip

        task = TowersTask(dataset, config, split.train, split.validation)
        result = fit(task, how, out_dir=folder, on_progress=on_progress)
        shutil.rmtree(folder / "checkpoints")
        training = {
            "epochs": len(result.epochs),
            "best_epoch": result.best_epoch + 1,
            "validation_loss": result.best_validation_loss,
            "cpu_s": time.process_time() - began,
        }
        record.write_text(json.dumps(training))
    return Towers.load(folder), json.loads(record.read_text())


def embed(dataset: Dataset, towers: Towers, day: int, now_ms: int) -> np.ndarray:
    """(V, D) float32 as of an instant."""
    starts = range(0, len(dataset.videos) + 1, EMBED_CHUNK)
    chunks = [np.arange(s, min(s + EMBED_CHUNK, len(dataset.videos) + 1)) for s in starts]
    return np.concatenate(
        [towers.video_vectors(dataset.videos, rows, features_at(dataset, rows, day, now_ms)) for rows in chunks]
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """The table's rows, and every query's recall, from which their differences are estimated."""

    dataset: Dataset
    queries: Queries
    ks: tuple[int, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    recall_Q: dict[str, np.ndarray] = field(default_factory=dict)
    """At the least k, by row."""

    @property
    def catalogue(self) -> int:
        """Eligible videos."""
        return int(self.dataset.eligible.sum())

    def described(self) -> dict[str, Any]:
        """What is asked."""
        q = self.queries
        return {
            "catalogue": self.catalogue,
            "queries": len(q),
            "users": len(np.unique(q.user_row_Q)),
            "positives": sum(map(len, q.relevant)),
            "cold_queries": sum(len(rows) > 0 for rows in q.cold),
            "cold_positives": sum(map(len, q.cold)),
            "chance": {f"recall@{k}": min(1.0, k / self.catalogue) for k in self.ks},
        }

    def add(self, name: str, top_QK: np.ndarray, **more: Any) -> None:
        """Score a method's answers."""
        self.rows.append({**method_row(name, top_QK, self.queries, self.ks, self.catalogue), **more})
        shown_QK = top_QK[:, : min(self.ks)]
        pairs = zip(self.queries.relevant, shown_QK, strict=True)
        self.recall_Q[name] = np.array([np.isin(wanted, shown).mean() for wanted, shown in pairs])

    def differences(self) -> list[dict[str, Any]]:
        """MAIN less each other row, with a 95% interval: users are resampled with all their queries (the percentile
        bootstrap; the same resamples for every row)."""
        if MAIN not in self.recall_Q:
            return []
        user_Q = np.unique(self.queries.user_row_Q, return_inverse=True)[1]
        n_U = np.bincount(user_Q)
        rng = np.random.default_rng(1)
        draws_RU = rng.multinomial(len(n_U), np.full(len(n_U), 1 / len(n_U)), size=RESAMPLES)
        found = []
        for name, recall_Q in self.recall_Q.items():
            less_Q = self.recall_Q[MAIN] - recall_Q
            resampled_R = draws_RU @ np.bincount(user_Q, weights=less_Q) / (draws_RU @ n_U)
            low, high = np.quantile(resampled_R, [0.025, 0.975])
            found.append({"name": name, "less": float(less_Q.mean()), "low": float(low), "high": float(high)})
        return found


def show(figures: dict[str, Any], console: Console) -> None:
    """The table, then what the index loses."""
    f = figures
    console.print(
        f"{f['run']}, {f['on']} days {', '.join(f['days'])}: {f['queries']:,} queries of {f['users']:,} users for "
        f"{f['positives']:,} unseen {f['signal']} among {f['catalogue']:,} videos; cold: {f['cold_positives']:,} of "
        f"them, in {f['cold_queries']:,} queries, on videos under 24 hours old",
        soft_wrap=True,
    )
    ks = [name.removeprefix("recall@") for name in f["chance"]]
    less = {d["name"]: f"{d['less']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" for d in f.get("differences", [])}
    columns = [*(f"recall@{k}" for k in ks), *(f"cold@{k}" for k in ks), "coverage"]
    table = Table("method", *columns, f"{MAIN} less this, @{ks[0]}", "epoch", "CPU s")
    for row in f["rows"]:
        figure = [f"{row[name]:.4f}" if row[name] is not None else "-" for name in columns]
        t = row.get("training")
        spent = [f"{t['best_epoch']} of {t['epochs']}", f"{t['cpu_s']:.0f}"] if t else ["", ""]
        table.add_row(row["name"], *figure, less.get(row["name"], "") if row["name"] != MAIN else "", *spent)
    console.print(table)
    console.print("chance: " + ", ".join(f"{name} {value:.4f}" for name, value in f["chance"].items()))
    for at, share in f.get("index_of_exact", {}).items():
        console.print(f"the index returns {share:.2%} of the exact top {at.removeprefix('@')}")
    console.print(f"{f['machine']['cpu']}, {f['machine']['cores']} cores, {f['machine']['memory']}", soft_wrap=True)
    console.print(", ".join(f"{name} {number}" for name, number in f["versions"].items()), soft_wrap=True)


def _described(ws: Workspace, on: str, dates: tuple[str, ...]) -> dict[str, Any]:
    return {
        "run": ws.recipe.name,
        "on": on,
        "days": dates,
        "signal": ws.recipe.retrieval_signal,
        "towers": asdict(ws.recipe.towers),
        "training": asdict(ws.recipe.towers_train),
        "machine": machine(),
        "versions": {name: version(name) for name in REPORTED},
    }


def _encoder_row(kind: str) -> str:
    return "sequence encoder off" if kind == "none" else f"encoder {kind}"


def _overlap(exact_QK: np.ndarray, found_QK: np.ndarray) -> float:
    return float(np.mean([np.isin(exact, found).mean() for exact, found in zip(exact_QK, found_QK, strict=True)]))


if __name__ == "__main__":
    main()
