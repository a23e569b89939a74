"""The stages of a run, each a function of the workspace: it reads files, writes files, and says what it did.

ingest -> examples -> train towers, ranker -> index -> evaluate; `pipelines.publish` follows. Declared in
`pipelines.day`, run or skipped by `pipelines.execute`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from candidate_gen.index import VideoIndex, build
from candidate_gen.index.check import recall_against_shards
from candidate_gen.index.device import is_cpu
from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask
from features.artifacts import Registry
from features.dataset import Dataset
from features.hashing import collision_rate
from features.schema import SIGNALS
from features.spec import Categorical, FeatureSpec
from pipelines import ingest as ingestion
from pipelines.adapters import Adapter
from pipelines.cluster import ClusterConfig, joined_cpus, spread, usable_cpus
from pipelines.console import Stage
from pipelines.embed import Catalogue, Embedded, embed
from pipelines.evaluate_channels import ask_sources, evaluate_channels
from pipelines.evaluate_ranking import (
    evaluate_protocol,
    evaluate_tasks,
    evaluate_watch,
    reliability_points,
    score_examples,
)
from pipelines.evaluate_retrieval import (
    evaluate_retrieval,
    make_queries,
    popularity_lists,
    popularity_recall,
    tower_recall,
    user_vectors,
)
from pipelines.evaluate_tables import describe, evaluate_tables
from pipelines.recipes import Split
from pipelines.slices import evaluate_slices, slicings
from pipelines.slot_effect import slot_effect
from pipelines.training.incremental import Increment, carried_on, new_dates, require_same_model
from pipelines.training.progress import Progress, TrainResult
from pipelines.training.sharding import plan_table
from pipelines.training.states import StateError, keep_state, open_state
from pipelines.training.train import Job, train_all
from pipelines.training.warm_start import WarmStart
from pipelines.training.worker_lock import hold_while_alive, wait_for_workers
from pipelines.workspace import Workspace
from ranking.config import RankerConfig
from ranking.freeze import freeze
from ranking.infer import Ranker
from ranking.train import RankerTask

SAMPLE_USERS, CHECKED_USERS, CHECKED_K = 4096, 200, 100
"""Users whose vectors an index is shaped for; of these, those whose exact top it is checked against."""
Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""(user_id, video_id, ts_ms) -> true probability a signal; only a simulated world has one."""


def ingest(ws: Workspace, adapter: Adapter, stage: Stage) -> None:
    """Raw logs -> canonical tables; bad rows go to quarantine and are counted."""
    for leftover in ws.root.glob(f".{ws.canonical.name}.ingest-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    report = ingestion.ingest(
        adapter,
        ws.canonical,
        max_bad_share=ws.recipe.max_bad_share,
        on_progress=lambda p: stage.progress(str(p)),
    )
    stage.rows = sum(count.rows_in for count in report.tables.values())
    quarantined = sum(count.quarantined for count in report.tables.values())
    events = report.tables["events"]
    stage.note = f"{events.kept:,} events kept, {quarantined:,} rows quarantined, {len(report.dates)} days"
    stage.details = [report.note] if report.note else []


def examples(ws: Workspace, stage: Stage, since: str | None = None, base: str | None = None) -> None:
    """Canonical tables -> encoded, memory-mapped examples with their histories and counters; with `since`, as the
    models of bundle `base` read them, to be trained on with the days from then on."""
    training = ws.recipe.split.resolve(ingestion.event_dates(ws.canonical)).train
    shutil.rmtree(ws.dataset_dir, ignore_errors=True)
    if since is None:
        dataset = encoded(ws.canonical, ws.recipe.spec, training, ws.dataset_dir)
    else:
        dataset = _examples_since(ws, since, base, training)
    stage.rows = len(dataset.examples)
    stage.note = f"{len(dataset.users):,} users, {len(dataset.videos):,} videos"
    stage.details = [f"{name}: {share:.2%} of the known ids share their row" for name, share in _collisions(dataset)]


def encoded(canonical: Path, spec: FeatureSpec, train_dates: tuple[str, ...], folder: Path | None = None) -> Dataset:
    """The canonical tables as examples, in memory or in a folder; what is fitted is fitted on the training dates."""
    return Dataset.build(
        spec, **canonical_tables(canonical), train_dates=train_dates, folder=folder, workers=usable_cpus()
    )


def canonical_tables(canonical: Path) -> dict[str, Any]:
    """What examples are built from, by the names of `Dataset.build`."""
    return {
        "users": canonical_table(canonical, "users"),
        "videos": canonical_table(canonical, "videos"),
        "events": ingestion.event_parts(canonical),
        "undated": ingestion.load_table(canonical, "undated"),
        "follows": ingestion.load_table(canonical, "follows"),
    }


def _examples_since(ws: Workspace, since: str, base: str | None, training: tuple[str, ...]) -> Dataset:
    if base is None:
        raise StateError(f"{ws.registry} has no live bundle to train on from: run once without --since")
    state = open_state(ws.registry, base)
    if state.encoder.spec != ws.recipe.spec:
        raise StateError(f"the recipe's features are not those of bundle {base}: run once without --since")
    dates, tables = new_dates(since, training, state), canonical_tables(ws.canonical)
    encoder, renewed = carried_on(state.encoder, tables, dates=dates, keep_ids_days=ws.recipe.incremental.keep_ids_days)
    dataset = Dataset.build(
        encoder.spec, **tables, train_dates=dates, encoder=encoder, folder=ws.dataset_dir, workers=usable_cpus()
    )
    Increment(base=base, dates=dates, dates_before=state.dates, renewed=renewed).save(ws.dataset_dir)
    return dataset


def train_model(
    ws: Workspace,
    name: str,
    stage: Stage,
    *,
    key: str = "",
    fresh: bool = False,
    where: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
) -> TrainResult:
    """The "towers", or the "ranker", which is calibrated as it is exported, in a group of Ray Train workers. Goes on
    from the last checkpoint, unless that was learnt from something else (another `key`) or a `fresh` start is wanted.
    Examples of an increment are trained on top of the state they were made for."""
    split = ws.split(ws.dataset())
    make, model, how = {
        "towers": (_towers_task, ws.recipe.towers, ws.recipe.towers_train),
        "ranker": (_ranker_task, ws.recipe.ranker, ws.recipe.ranker_train),
    }[name]
    dates, earlier, start = split.train, None, None
    if (increment := Increment.load(ws.dataset_dir)) is not None:
        state = open_state(ws.registry, increment.base)
        require_same_model(state, name, asdict(model))
        dates, earlier, how = increment.dates, state.exported(name), ws.recipe.incremental.trained_on(how)
        start = WarmStart(checkpoint=state.checkpoint(name), renewed=increment.renewed)
    folder, lock = ws.training / name, ws.training / f".{name}.lock"
    wait_for_workers(lock, stage.progress)
    mark = folder / "learnt-from"
    if fresh or not mark.exists() or mark.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(key)
    arguments = (ws.dataset_dir, model, dates, split.validation, earlier, lock)
    job = Job(make_task=make, args=arguments, config=how, out_dir=folder, start=start)
    (result,) = train_all([job], where=where, on_progress=_tell(stage))
    _collect(folder, ws.root / name)
    stage.details = plan_table(result.plan).splitlines()
    stage.note = result.summary()
    return result


def keep_trained(ws: Workspace, version: str) -> None:
    """What bundle `version`, just published, was trained to, for the day after."""
    dataset, increment = ws.dataset(), Increment.load(ws.dataset_dir)
    dates = ws.split(dataset).train if increment is None else (*increment.dates_before, *increment.dates)
    live = Registry(ws.registry).live()
    keep_state(ws.registry, version, training=ws.training, encoder=dataset.encoder, dates=dates, live=live)


def index(ws: Workspace, stage: Stage, device: str = "cpu") -> None:
    """Embed the corpus and build the index that is evaluated, as of the first instant of the test days; the tower, and
    the training and assignment of lists, on a device of torch.

    A vector knows its video's age and counters at one instant: this index knows nothing that the test days counted.
    Publishing builds another as of the log's end."""
    ws.require(ws.towers / "towers.json", "reelrank train")
    dataset = ws.dataset()
    split = ws.split(dataset)
    built, _ = embed_and_index(ws, dataset, split.test, split.validation, ws.index, stage, device)
    stage.rows, stage.note = len(built), built.kind


def evaluate(ws: Workspace, stage: Stage, oracle: Oracle | None = None) -> dict:
    """Measure retrieval and ranking on the test days; write and return `metrics.json`."""
    ws.require(ws.index / "index.json", "reelrank index build")
    dataset = ws.dataset()
    split = ws.split(dataset)
    events = _frame(ingestion.load_events(ws.canonical))
    stage.progress("retrieval")
    vectors = VideoIndex(ws.index)
    retrieval = evaluate_retrieval(
        dataset,
        Towers.load(ws.towers),
        vectors,
        vectors.vectors[np.arange(vectors.n_rows)],
        popularity_lists(
            dataset,
            events.filter(~pl.col("date").is_in(split.test)),
            ws.recipe.retrieval_signal,
            (*ws.recipe.popularity_baselines, None),
        ),
        dates=split.test,
        signal=ws.recipe.retrieval_signal,
        ks=ws.recipe.recall_at,
    )
    stage.progress("channels")
    metrics = {
        "fingerprint": ws.fingerprint(),
        "split": {"train": split.train, "validation": split.validation, "test": split.test},
        "retrieval": retrieval,
        "channels": _channels(ws, dataset, vectors, split.test),
        **_ranking(ws, dataset, split, events, oracle, stage),
    }
    ws.metrics.write_text(json.dumps(metrics, indent=1))
    stage.rows = len(dataset.rows_on(split.test))
    k = retrieval["index_recall"]["k"]
    stage.note = f"recall@{k} {tower_recall(retrieval, k):.3f} (popularity {popularity_recall(retrieval, k):.3f})"
    return metrics


def _towers_task(
    folder: Path,
    config: TowerConfig,
    train: tuple[str, ...],
    validation: tuple[str, ...],
    earlier: Path | None = None,
    lock: Path | None = None,
) -> TowersTask:
    if lock is not None:
        hold_while_alive(lock)
    return TowersTask(Dataset.load(folder), config, train, validation, undated=earlier is None)


def _ranker_task(
    folder: Path,
    config: RankerConfig,
    train: tuple[str, ...],
    validation: tuple[str, ...],
    earlier: Path | None = None,
    lock: Path | None = None,
) -> RankerTask:
    if lock is not None:
        hold_while_alive(lock)
    return RankerTask(Dataset.load(folder), config, train, validation, earlier)


def embed_and_index(
    ws: Workspace,
    dataset: Dataset,
    test_dates: tuple[str, ...],
    asked_on: tuple[str, ...],
    folder: Path,
    stage: Stage,
    device: str,
) -> tuple[VideoIndex, float]:
    """Shard by shard, as of the first of the test dates, or of the log's end without any; shaped for users as they
    asked on other dates. Also the share of those users' exact top that the index finds."""
    source = Catalogue.of(ws.dataset_dir, ws.towers, test_dates, device)
    # Ray hides GPUs from tasks that do not ask for one; one process feeds the device.
    vectors, workers = ws.vectors / ("evaluated" if test_dates else "published"), joined_cpus() if is_cpu(device) else 1

    def tell(progress: object) -> None:
        stage.progress(str(progress))

    shards = Embedded(tuple(embed(source, vectors, workers=workers, on_progress=tell)))
    encode = partial(spread, workers=workers)
    queries = make_queries(dataset, asked_on, ws.recipe.retrieval_signal, at_most=SAMPLE_USERS)
    if not len(queries):
        raise ValueError(
            f"no user has an unseen positive of {ws.recipe.retrieval_signal!r} on {', '.join(asked_on)}: the index "
            "cannot be shaped or checked; hold out other days (--set split.validation_days=...)"
        )
    users_QD = user_vectors(dataset, Towers.load(ws.towers), queries)
    for left in (path for path in folder.glob("*") if path.is_file()):  # of an index of another kind
        left.unlink()
    config, n_rows = ws.recipe.index, len(dataset.videos) + 1
    build(shards, n_rows, config, folder, query_QD=users_QD, parallel=encode, device=device, on_progress=tell)
    index = VideoIndex.open(folder)
    tell("checking against exact search")
    found = recall_against_shards(index, shards, users_QD[:CHECKED_USERS], CHECKED_K)
    stage.details.append(
        f"of {min(CHECKED_USERS, len(users_QD))} users' exact top {CHECKED_K} the index finds {found:.1%}"
    )
    return index, found


def _collisions(dataset: Dataset) -> Iterator[tuple[str, float]]:
    """What hashing costs each id feature: those that keep to known ids, and authors."""
    spec, encoder = dataset.encoder.spec, dataset.encoder
    for side, features in (("user", spec.user), ("video", spec.video)):
        for feature in features:
            if not isinstance(feature, Categorical):
                continue
            known = encoder.known.get(f"{side}.{feature.name}")
            if known is None and feature.column == "author_id":
                known = np.asarray(dataset.author_id[dataset.author_id != 0])
            if known is not None:
                yield feature.name, collision_rate(known, feature.rows, spec.seed)


def _collect(trained: Path, out: Path) -> None:
    """Copy what the task exported away from the checkpoints; not how it went, whose times differ from run to run."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in trained.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors") and path.name != "training.json":
            shutil.copy2(path, out / path.name)


def _ranking(
    ws: Workspace, dataset: Dataset, split: Split, events: pl.DataFrame, oracle: Oracle | None, stage: Stage
) -> dict:
    made = freeze(ws.ranker, ws.frozen_ranker, ws.recipe.tables)
    ranker, e = Ranker.load(ws.frozen_ranker), dataset.examples
    rows = dataset.rows_on(split.test)
    probability_NT, watch_ms_N = score_examples(
        dataset, ranker, rows, lambda n: stage.progress(f"ranking: {n:,} of {len(rows):,} rows")
    )
    truth = None
    if oracle is not None:
        test = events[rows]
        truth = oracle(test["user_id"].to_numpy(), test["video_id"].to_numpy(), test["ts_ms"].to_numpy())
    t = ranker.tasks.index("long_view")
    labels = e.signals[rows, SIGNALS.index("long_view")]
    undated = ingestion.load_table(ws.canonical, "undated")
    stage.progress("ranking: what coded tables cost")
    tables = evaluate_tables(dataset, Ranker.load(ws.ranker), ranker, rows, made)
    stage.details.append(describe(tables))
    return {
        "tables": tables,
        "ranking": evaluate_tasks(
            dataset, rows, ranker.tasks, probability_NT, dataset.rows_on(split.validation), truth
        ),
        "slices": evaluate_slices(
            dataset,
            rows,
            ranker.tasks,
            probability_NT,
            slicings(dataset, rows, dataset.rows_on(split.train), events["surface"].to_numpy()[rows].tolist()),
        ),
        "slots": slot_effect(ws.ranker, dataset, dataset.rows_on(split.train)),
        "watch": evaluate_watch(dataset, rows, watch_ms_N),
        "collisions": [{"table": name, "collision_rate": share} for name, share in _collisions(dataset)],
        "reliability": {"long_view": reliability_points(labels, probability_NT[:, t])},
        "primary": evaluate_protocol(
            dataset,
            rows,
            probability_NT[:, t],
            train_rows=dataset.rows_on((*split.train, *split.validation)),
            events=events,
            videos=_frame(canonical_table(ws.canonical, "videos")),
            undated=_frame(undated) if undated is not None else None,
            progress=stage.progress,
        ),
    }


def _channels(ws: Workspace, dataset: Dataset, index: VideoIndex, dates: tuple[str, ...]) -> dict:
    follows = ingestion.load_table(ws.canonical, "follows")
    for leftover in ws.root.glob(".channels-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(dir=ws.root, prefix=".channels-") as folder:
        answers = ask_sources(dataset, Towers.load(ws.towers), index, follows, ws.recipe, dates, Path(folder))
        return evaluate_channels(answers, ws.recipe.feed.blend)


def canonical_table(canonical: Path, name: str) -> pa.Table:
    """An ingested table; raises FileNotFoundError saying how to make it."""
    table = ingestion.load_table(canonical, name)
    if table is None:
        raise FileNotFoundError(
            f"{canonical / name}.parquet is not there: run `reelrank ingest --run {canonical.parent}` first"
        )
    return table


def _frame(table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    if not isinstance(frame, pl.DataFrame):
        raise TypeError(f"expected a table, found {type(frame)}")
    return frame


def _tell(stage: Stage) -> Callable[[Progress], None]:
    def tell(p: Progress) -> None:
        stage.progress(p.line())

    return tell
