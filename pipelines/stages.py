"""The stages of a run, each a function of the workspace: it reads files, writes files, and says what it did.

ingest -> examples -> train -> index -> evaluate -> gate and publish. Run one after another by
`pipelines.run`, or one at a time from the command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl

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
from pipelines.cluster import spread, usable_cpus
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
from pipelines.gate import GateError, Verdict, judge, passed, to_rows
from pipelines.recipes import Split
from pipelines.sharding import plan_table
from pipelines.slices import evaluate_slices, slicings
from pipelines.slot_effect import slot_effect
from pipelines.train import Job, train_all
from pipelines.trainer import Progress
from pipelines.workspace import Workspace
from ranking.config import RankerConfig
from ranking.freeze import freeze
from ranking.infer import Ranker
from ranking.train import RankerTask
from serving.bundle import write_bundle
from serving.golden import record

SAMPLE_USERS, CHECKED_USERS, CHECKED_K = 4096, 200, 100
"""Users whose vectors an index is shaped for; of these, those whose exact top it is checked against."""
Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""(user_id, video_id, ts_ms) -> true probability a signal; only a simulated world has one."""


def ingest(ws: Workspace, adapter: Adapter, stage: Stage) -> None:
    """Raw logs -> canonical tables; bad rows go to quarantine and are counted."""
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


def examples(ws: Workspace, stage: Stage) -> None:
    """Canonical tables -> encoded, memory-mapped examples with their histories and counters."""
    split = ws.recipe.split.resolve(ingestion.event_dates(ws.canonical))
    dataset = encoded(ws.canonical, ws.recipe.spec, split.train, ws.dataset_dir)
    shutil.rmtree(ws.training, ignore_errors=True)  # checkpoints of other examples must not be resumed
    stage.rows = len(dataset.examples)
    stage.note = f"{len(dataset.users):,} users, {len(dataset.videos):,} videos"
    stage.details = [f"{name}: {share:.2%} of the known ids share their row" for name, share in _collisions(dataset)]


def encoded(canonical: Path, spec: FeatureSpec, train_dates: tuple[str, ...], folder: Path | None = None) -> Dataset:
    """The canonical tables as examples, in memory or in a folder; what is fitted is fitted on the training dates."""
    return Dataset.build(
        spec,
        users=_table(canonical, "users"),
        videos=_table(canonical, "videos"),
        events=ingestion.event_parts(canonical),
        undated=ingestion.load_table(canonical, "undated"),
        follows=ingestion.load_table(canonical, "follows"),
        train_dates=train_dates,
        folder=folder,
        workers=usable_cpus(),
    )


def train_models(ws: Workspace, stage: Stage, names: Sequence[str] = ("towers", "ranker")) -> None:
    """Towers and ranker one after the other in one group of Ray Train workers; the ranker is calibrated as it is
    exported. Goes on from the last checkpoint of the same examples."""
    split = ws.split(ws.dataset())
    makers = {
        "towers": (_towers_task, ws.recipe.towers, ws.recipe.towers_train),
        "ranker": (_ranker_task, ws.recipe.ranker, ws.recipe.ranker_train),
    }
    jobs = []
    for name in names:
        make, model, how = makers[name]
        arguments = (ws.dataset_dir, model, split.train, split.validation)
        jobs.append(Job(make_task=make, args=arguments, config=how, out_dir=ws.training / name))
    results = train_all(jobs, on_progress=_tell(stage))
    for name in names:
        _collect(ws.training / name, ws.root / name)
    stage.details = [line for r in results for line in plan_table(r.plan).splitlines()]
    stage.note = ", ".join(
        f"{r.name}: {len(r.epochs)} epochs, validation loss {r.best_validation_loss:.4f} at epoch {r.best_epoch + 1}"
        for r in results
    )


def index(ws: Workspace, stage: Stage, device: str = "cpu") -> None:
    """Embed the corpus and build the index that is evaluated, as of the first instant of the test days; the tower, and
    the training and assignment of lists, on a device of torch.

    A vector knows its video's age and counters at one instant: this index knows nothing that the test days counted.
    Publishing builds another as of the log's end."""
    ws.require(ws.towers / "towers.json", "reelrank train")
    dataset = ws.dataset()
    split = ws.split(dataset)
    built, _ = _embed_and_index(ws, dataset, split.test, split.validation, ws.index, stage, device)
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


def publish(ws: Workspace, stage: Stage, *, force: bool = False, device: str = "cpu") -> tuple[str, list[Verdict]]:
    """Gate, lay out the bundle with an index as of the log's end, record golden answers, publish and make it live;
    returns version and verdicts. `device`: as of `index`.

    Raises GateError when a rule fails, unless `force`; what was forced stands in the manifest.
    """
    ws.require(ws.metrics, "reelrank evaluate")
    metrics, registry = json.loads(ws.metrics.read_text()), Registry(ws.registry)
    verdicts = judge(metrics, _live_metrics(registry), ws.recipe.gate)
    if not passed(verdicts) and not force:
        broken = [
            f"  {v.rule}: found {_number(v.candidate)}, wanted {_number(v.bound)}" for v in verdicts if not v.passed
        ]
        raise GateError("the gate refused this candidate:\n" + "\n".join(broken) + "\n`--force` publishes it anyway")
    staged = registry.stage()
    stage.progress("writing the bundle")
    dataset = ws.dataset()
    folder = ws.root / "index-published"
    index, found = _embed_and_index(ws, dataset, (), dataset.dates[-1:], folder, stage, device)
    if found < ws.recipe.gate.min_index_recall and not force:
        raise GateError(
            f"the gate refused this candidate:\n  the index to be published returns the exact top {CHECKED_K}: found "
            f"{_number(found)}, wanted {_number(ws.recipe.gate.min_index_recall)}\n`--force` publishes it anyway"
        )
    popular_dates = dataset.dates if ws.recipe.popular_days is None else dataset.dates[-ws.recipe.popular_days :]
    write_bundle(
        staged,
        dataset,
        videos=_table(ws.canonical, "videos"),
        towers_dir=ws.towers,
        ranker_dir=ws.frozen_ranker,
        index=index,
        feed_config=ws.recipe.feed,
        metrics=metrics,
        popular_examples=dataset.rows_on(popular_dates),
    )
    stage.progress("recording golden answers")
    record(staged, now_ms=int(dataset.examples.ts_ms.max()) + 1)
    meta = {"recipe": ws.recipe.name, "data": metrics["fingerprint"], "gate": to_rows(verdicts), "forced": force}
    version = registry.publish(staged, meta=meta)
    registry.set_live(version)
    stage.note = f"{version} is live"
    return version, verdicts


def _towers_task(folder: Path, config: TowerConfig, train: tuple[str, ...], validation: tuple[str, ...]) -> TowersTask:
    return TowersTask(Dataset.load(folder), config, train, validation)


def _ranker_task(folder: Path, config: RankerConfig, train: tuple[str, ...], validation: tuple[str, ...]) -> RankerTask:
    return RankerTask(Dataset.load(folder), config, train, validation)


def _embed_and_index(
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
    vectors, workers = ws.vectors / ("evaluated" if test_dates else "published"), usable_cpus() if is_cpu(device) else 1

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
    """Copy what the task exported, and how it was trained, away from the checkpoints."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in trained.iterdir():
        if path.is_file() and path.suffix in (".json", ".safetensors"):
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
            videos=_frame(_table(ws.canonical, "videos")),
            undated=_frame(undated) if undated is not None else None,
            progress=stage.progress,
        ),
    }


def _channels(ws: Workspace, dataset: Dataset, index: VideoIndex, dates: tuple[str, ...]) -> dict:
    follows = ingestion.load_table(ws.canonical, "follows")
    with TemporaryDirectory(dir=ws.root) as folder:
        answers = ask_sources(dataset, Towers.load(ws.towers), index, follows, ws.recipe, dates, Path(folder))
        return evaluate_channels(answers, ws.recipe.feed.blend)


def _live_metrics(registry: Registry) -> dict | None:
    """Metrics of the live bundle; a live bundle that is damaged raises ArtifactError rather than count as absent."""
    if registry.live() is None:
        return None
    return json.loads(registry.open(None).path("metrics.json").read_text())


def _table(canonical: Path, name: str):
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
        stage.progress(
            f"{p.name}, epoch {p.epoch + 1}/{p.epochs}, step {p.step}/{p.steps} loss {p.loss:.4f} "
            f"{p.samples_per_s:,.0f} samples/s, {p.eta_s:.0f} s left"
        )

    return tell


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
