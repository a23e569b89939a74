"""A day's stages in order: each is skipped or run, and leaves its record as the last thing it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

from features.durable import disk_told
from pipelines.cluster import cluster
from pipelines.console import Stage, Stages
from pipelines.day import Day, DayStage, Turn
from pipelines.hashes import Hashes, files_below
from pipelines.plan import Decision, Selection, decide
from pipelines.stage_records import StageRecord


class InputsChangedError(RuntimeError):
    """An input was written while a stage read it: nobody knows what the stage has seen, so it is not done."""


def log_hashes(day: Day) -> Hashes:
    """With what earlier runs hashed of the raw logs."""
    return Hashes(day.ws.records / "logs.json")


def execute(
    day: Day,
    shown: Stages,
    selection: Selection = Selection(),  # noqa: B008 (frozen)
    *,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Run what is asked for and not done yet, in a folder that the caller has `locked`. Ray, where a stage wants it, is
    started once and stopped behind the last such stage; on a cluster everything that can be spread is spread over it.
    """
    stages, hashes = selection.stages(), log_hashes(day)
    with ExitStack() as ray:
        for number, stage in enumerate(stages):
            decision = decide(stage, day, hashes, selection)
            if not decision.run:
                shown.skipped(_skipped(decision, day))
            else:
                if stage.on_ray or day.where.address is not None:
                    ray.enter_context(cluster(day.where))
                with shown.stage(stage.name) as line, disk_told(day.ws.root):
                    line.why, line.fingerprint = decision.why, decision.fingerprint
                    after_each()
                    _do(decision, day, line, hashes)
            if day.where.address is None and not any(later.on_ray for later in stages[number + 1 :]):
                ray.close()
            after_each()


def _do(decision: Decision, day: Day, line: Stage, hashes: Hashes) -> None:
    """From the record that says "begun" to the one that says "done"."""
    stage, folder = decision.stage, day.ws.records
    record = StageRecord(
        stage=stage.name,
        fingerprint=decision.fingerprint,
        format=stage.format,
        config=decision.config,
        inputs=decision.inputs,
        input_bytes=decision.input_bytes,
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )
    record.save(folder)
    began = time.monotonic()
    result = stage.work(Turn(day=day, line=line, inputs=decision.inputs, fresh=decision.complete))
    line.progress("hashing what was read and written")
    _require_unchanged(decision, day, hashes)
    done = replace(
        record,
        wall_s=round(time.monotonic() - began, 3),
        rows=line.rows,
        note=line.note,
        outputs=_written(stage, day, hashes),
        result=result,
    )
    if decision.stage.name == "ingest":
        hashes.keep(path for files in decision.reads for path in files.paths.values())
        hashes.save()
    done.save(folder)
    if result.get("resumed_from_step"):
        line.status = "resumed"


def _require_unchanged(decision: Decision, day: Day, hashes: Hashes) -> None:
    for files in decision.stage.reads(day):
        if hashes.digest(files) != decision.inputs[files.name]:
            raise InputsChangedError(
                f"{files.name} ({files.place}) changed while {decision.stage.name} read them: run again when nothing "
                "writes there"
            )


def _written(stage: DayStage, day: Day, hashes: Hashes) -> dict[str, tuple[int, str]]:
    root = day.ws.root
    paths = [path for target in stage.writes(day.ws) for path in files_below(target)]
    found = hashes.of({path.relative_to(root).as_posix(): path for path in paths})
    return {name: (entry.bytes, entry.sha256) for name, entry in found.items()}


def _skipped(decision: Decision, day: Day) -> Stage:
    """The stage as it was when it ran."""
    record = StageRecord.load(day.ws.records, decision.stage.name)
    rows, note = (record.rows, record.note) if record is not None else (None, "")
    name = decision.stage.name
    return Stage(name, rows=rows, note=note, why=decision.why, fingerprint=decision.fingerprint)
