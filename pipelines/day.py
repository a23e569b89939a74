"""The stages of a day, as the plan and the executor see them: what each reads, depends on, writes and does.

    ingest -> examples -> train-towers -> train-ranker -> index -> evaluate -> publish

The ranker is calibrated as it is exported; embedding the corpus is part of `index`, shard by shard; the gate is part of
`publish`. Another stage is another entry of STAGES, behind those whose files it reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.artifacts import ArtifactError, Registry
from features.digests import content_sha256
from pipelines import stages
from pipelines.adapters import Adapter
from pipelines.cluster import ClusterConfig
from pipelines.console import Stage
from pipelines.gate import to_rows
from pipelines.hashes import Files
from pipelines.publish import publish
from pipelines.stage_records import StageRecord, described
from pipelines.training.incremental import Increment
from pipelines.training.states import state_folder
from pipelines.training.trainer import TrainConfig
from pipelines.workspace import Workspace

HOW_ONLY = ("prefetch", "checkpoint_every_steps", "keep_best", "background_checkpoints", "ledger", "mlflow")
"""Fields of TrainConfig that change no result."""
WHERE_ONLY = (*HOW_ONLY, "num_workers", "threads", "use_gpu")
"""Those that an interrupted training may change and go on: who does the work, not what is learnt from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What the stages of one run share."""

    ws: Workspace
    adapter: Adapter | None = None
    """Of the raw logs; None where `ingest` is not asked for."""
    where: ClusterConfig = ClusterConfig()  # noqa: RUF009 (frozen)
    oracle: stages.Oracle | None = None
    since: str | None = None
    """Train on from the live bundle with the days from this one on; None: from nothing."""
    force: bool = False
    """Publish although the gate refuses."""
    device: str = "cpu"
    """Of torch, for embedding and building the index: vectors differ by rounding, and are not made again for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What a stage is given when it runs."""

    day: Day
    line: Stage
    inputs: Mapping[str, str]
    """Digest of each input."""
    fresh: bool
    """It was complete and is wanted once more: nothing of it may be taken over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DayStage:
    """One stage."""

    name: str
    reads: Callable[[Day], tuple[Files, ...]]
    config: Callable[[Day], dict[str, Any]]
    """The part of the recipe, and what else beside its inputs, that decides what it writes."""
    writes: Callable[[Workspace], tuple[Path, ...]]
    """Files, and folders that are its own."""
    work: Callable[[Turn], dict[str, Any]]
    """Does it; what it returns is kept in the record as `result`."""
    format: int = 1
    """Raised when a new release would write other files from the same inputs and configuration."""
    on_ray: bool = False
    damage: Callable[[Day, StageRecord], str | None] = lambda day, record: None
    """What is wrong with what it left outside the run's folder."""


def _raw(day: Day) -> tuple[Files, ...]:
    adapter = day.adapter
    if adapter is None:
        raise ValueError("there are no logs to ingest: name them with --data")
    tables = adapter.tables()
    return (Files.together("logs", [path for t in tables for path in (*adapter.files(t), *adapter.context(t))]),)


def _tables(ws: Workspace) -> Files:
    """Of what ingest wrote, what is read later: quarantined rows are for people, and name the files they came from."""
    if not ws.ingested.exists():
        return Files("tables", ws.canonical, {}, made_by="ingest")
    found = Files.below("tables", ws.canonical, made_by="ingest")
    return dataclasses.replace(found, digest=content_sha256(ws.table_hashes()))


def _examples(ws: Workspace) -> Files:
    return Files.below("examples", ws.dataset_dir, made_by="examples")


def _towers(ws: Workspace) -> Files:
    return Files.below("towers", ws.towers, made_by="train-towers")


def _ranker(ws: Workspace) -> Files:
    return Files.below("ranker", ws.ranker, made_by="train-ranker")


def _index(ws: Workspace) -> Files:
    return Files.below("index", ws.index, made_by="index")


def _frozen(ws: Workspace) -> Files:
    return Files.below("frozen ranker", ws.frozen_ranker, made_by="evaluate")


def _metrics(ws: Workspace) -> Files:
    return Files.below("metrics", ws.metrics, made_by="evaluate")


def _fields(*names: str) -> Callable[[Day], dict[str, Any]]:
    """These fields of the recipe."""
    return lambda day: {name: described(getattr(day.ws.recipe, name)) for name in names}


def _training(name: str, without: tuple[str, ...] = HOW_ONLY) -> Callable[[Day], dict[str, Any]]:
    def config(day: Day) -> dict[str, Any]:
        how: TrainConfig = getattr(day.ws.recipe, f"{name}_train")
        counted = {f.name: described(getattr(how, f.name)) for f in dataclasses.fields(how) if f.name not in without}
        trained_on = _fields("incremental")(day) if Increment.made(day.ws.dataset_dir) else {}
        return {**_fields(name, "split")(day), f"{name}_train": counted, **trained_on}

    return config


def _ingest_work(turn: Turn) -> dict[str, Any]:
    if turn.day.adapter is None:
        raise ValueError("there are no logs to ingest: name them with --data")
    stages.ingest(turn.day.ws, turn.day.adapter, turn.line)
    return {}


def _examples_config(day: Day) -> dict[str, Any]:
    """Of a full run as of an increment, which hangs on what it begins from too."""
    if day.since is None:
        return _fields("spec", "split")(day)
    return {**_fields("spec", "split", "incremental")(day), "since": day.since, "base": _base(day)}


def _base(day: Day) -> str | None:
    """The live bundle; where that is the one this very increment published, what it began from: the same command once
    more is the same increment."""
    live, folder = Registry(day.ws.registry).live(), day.ws.records
    published, examples = StageRecord.load(folder, "publish"), StageRecord.load(folder, "examples")
    same = published is not None and live == (published.result or {}).get("bundle")
    if same and examples is not None and examples.config.get("since") == day.since:
        return examples.config["base"]
    return live


def _examples_work(turn: Turn) -> dict[str, Any]:
    stages.examples(turn.day.ws, turn.line, turn.day.since, _base(turn.day) if turn.day.since else None)
    return {}


def _train_work(name: str) -> Callable[[Turn], dict[str, Any]]:
    def work(turn: Turn) -> dict[str, Any]:
        """Checkpoints belong to the examples and the learning that they were begun with, whoever did the work."""
        learnt_from = [name, turn.inputs, _training(name, without=WHERE_ONLY)(turn.day)]
        key = hashlib.sha256(json.dumps(learnt_from, sort_keys=True).encode()).hexdigest()
        result = stages.train_model(turn.day.ws, name, turn.line, key=key, fresh=turn.fresh, where=turn.day.where)
        return {"resumed_from_step": result.resumed_from_step, "steps": result.steps}

    return work


def _index_work(turn: Turn) -> dict[str, Any]:
    stages.index(turn.day.ws, turn.line, turn.day.device)
    return {}


def _evaluate_work(turn: Turn) -> dict[str, Any]:
    stages.evaluate(turn.day.ws, turn.line, turn.day.oracle)
    return {}


def _publish_work(turn: Turn) -> dict[str, Any]:
    day = turn.day
    version, verdicts = publish(day.ws, turn.line, force=day.force, device=day.device)
    content = Registry(day.ws.registry).open(version).content_sha256
    turn.line.details.append(f"content {content}")
    stages.keep_trained(day.ws, version)
    return {"bundle": version, "content_sha256": content, "gate": to_rows(verdicts)}


def _bundle_damage(day: Day, record: StageRecord) -> str | None:
    """The bundle that was published, verified whole. Whether it is live is the operator's business: after a rollback
    the same day is not published again. While it is, what it was trained to must be there for the day after."""
    registry = Registry(day.ws.registry)
    try:
        version = registry.open((record.result or {})["bundle"]).version
    except ArtifactError as error:
        return str(error)
    if version == registry.live() and not state_folder(day.ws.registry, version).is_dir():
        return f"{version} is live, and what it was trained to is not kept"
    return None


def _place(ws: Workspace) -> str:
    """Where bundles go; inside the run's folder that is the same place when the folder has moved."""
    return str(ws.registry.relative_to(ws.root) if ws.registry.is_relative_to(ws.root) else ws.registry)


STAGES: tuple[DayStage, ...] = (
    DayStage(
        name="ingest",
        reads=_raw,
        config=lambda day: {"adapter": day.adapter and day.adapter.name},
        writes=lambda ws: (ws.canonical,),
        work=_ingest_work,
        on_ray=True,
    ),
    DayStage(
        name="examples",
        reads=lambda day: (_tables(day.ws),),
        config=_examples_config,
        writes=lambda ws: (ws.dataset_dir,),
        work=_examples_work,
        on_ray=True,
    ),
    DayStage(
        name="train-towers",
        reads=lambda day: (_examples(day.ws),),
        config=_training("towers"),
        writes=lambda ws: (ws.towers,),
        work=_train_work("towers"),
        on_ray=True,
    ),
    DayStage(
        name="train-ranker",
        reads=lambda day: (_examples(day.ws),),
        config=_training("ranker"),
        writes=lambda ws: (ws.ranker,),
        work=_train_work("ranker"),
        on_ray=True,
    ),
    DayStage(
        name="index",
        reads=lambda day: (_examples(day.ws), _towers(day.ws)),
        config=_fields("index", "retrieval_signal", "split"),
        writes=lambda ws: (ws.index,),
        work=_index_work,
    ),
    DayStage(
        name="evaluate",
        reads=lambda day: (
            _tables(day.ws), _examples(day.ws), _towers(day.ws), _ranker(day.ws), _index(day.ws),
        ),
        config=lambda day: {
            **_fields("split", "retrieval_signal", "recall_at", "popularity_baselines", "tables", "feed")(day),
            "oracle": day.oracle is not None,
        },
        writes=lambda ws: (ws.metrics, ws.frozen_ranker),
        work=_evaluate_work,
    ),
    DayStage(
        name="publish",
        reads=lambda day: (
            _tables(day.ws), _examples(day.ws), _towers(day.ws), _frozen(day.ws), _metrics(day.ws),
        ),
        config=lambda day: {
            **_fields("name", "feed", "gate", "index", "popular_days", "retrieval_signal", "split")(day),
            "registry": _place(day.ws),
        },
        writes=lambda ws: (),
        work=_publish_work,
        damage=_bundle_damage,
    ),
)  # fmt: skip
