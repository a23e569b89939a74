"""Which stages run and which are skipped, and why: for the executor stage by stage, for `--dry-run` all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pipelines.day import STAGES, Day, DayStage
from pipelines.hashes import Files, Hashes
from pipelines.stage_records import StageRecord, changes, fingerprint


class MissingInputError(FileNotFoundError):
    """A stage was asked for whose inputs are not there; the message names the stage that makes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which stages are asked for: all that are not done, from one on whatever there is, or some by name."""

    start: str | None = None
    """This stage and all behind it run even when nothing has changed."""
    only: tuple[str, ...] = ()
    """These alone, even when nothing has changed."""

    def __post_init__(self) -> None:
        if self.start is not None and self.only:
            raise ValueError("--from and --only exclude each other: give one of them")
        for option, names in (("--from", (self.start,) if self.start is not None else ()), ("--only", self.only)):
            for name in names:
                _require_stage(name, option)

    def stages(self) -> tuple[DayStage, ...]:
        """What is considered, in order."""
        return tuple(stage for stage in STAGES if not self.only or stage.name in self.only)

    def forced(self, stage: DayStage) -> str | None:
        """Why the stage runs whatever there is."""
        if self.only:
            return "asked for by name"
        names = [s.name for s in STAGES]
        if self.start is not None and names.index(stage.name) >= names.index(self.start):
            return f"--from {self.start}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is to become of one stage."""

    stage: DayStage
    run: bool
    why: str
    reads: tuple[Files, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests; empty where a stage before it will write some of them first."""
    input_bytes: int = 0
    fingerprint: str = ""
    complete: bool = False
    """It is done and undamaged, and would be skipped if it were not forced."""


def decide(stage: DayStage, day: Day, hashes: Hashes, selection: Selection) -> Decision:
    """Hold the stage's record against what its inputs and configuration are now. Reads, writes nothing; raises
    MissingInputError when an input is not there."""
    reads = stage.reads(day)
    for files in reads:
        if not files.paths:
            raise MissingInputError(_missing(stage, files))
    inputs = {files.name: hashes.digest(files) for files in reads}
    config = stage.config(day)
    mark = fingerprint(stage.name, stage.format, config, inputs)
    record = StageRecord.load(day.ws.records, stage.name)
    stale = _stale(stage, day, hashes, record, mark, config, inputs)
    forced = selection.forced(stage)
    return Decision(
        stage=stage,
        run=stale is not None or forced is not None,
        why=stale or forced or f"unchanged, and undamaged ({mark[:8]})",
        reads=reads,
        config=config,
        inputs=inputs,
        input_bytes=sum(files.bytes for files in reads),
        fingerprint=mark,
        complete=stale is None,
    )


def plan(day: Day, hashes: Hashes, selection: Selection) -> list[Decision]:
    """What a run would do. A stage behind one that runs will see inputs that nobody knows yet."""
    decisions: list[Decision] = []
    running: set[str] = set()
    for stage in selection.stages():
        reads = stage.reads(day)
        before = [files.made_by for files in reads if files.made_by in running]
        if before:
            why = selection.forced(stage) or f"after {', '.join(dict.fromkeys(map(str, before)))}"
            size = sum(files.bytes for files in reads)
            decisions.append(Decision(stage=stage, run=True, why=why, reads=reads, input_bytes=size))
        else:
            decisions.append(decide(stage, day, hashes, selection))
        if decisions[-1].run:
            running.add(stage.name)
    return decisions


def print_plan(decisions: Sequence[Decision], console: Console) -> None:
    """One line a stage."""
    shown = Table("stage", "reads", "size", "", "why", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.columns[2].justify = "right"
    for d in decisions:
        names = [f"{f.name} ({len(f.paths):,} files)" if len(f.paths) > 1 else f.name for f in d.reads]
        size = human_bytes(d.input_bytes) if any(f.paths for f in d.reads) else "?"
        shown.add_row(d.stage.name, ", ".join(names), size, "run" if d.run else "skip", d.why)
    console.print(shown)
    if any(d.run and not d.fingerprint for d in decisions):
        console.print('A stage that waits ("after") is skipped after all if its inputs come out as they were.')


def human_bytes(size: int) -> str:
    """1,234 B, 5.6 KiB, 7.8 MiB ..."""
    scaled, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if scaled < 1024 or unit == "TiB":
            break
        scaled /= 1024
    return f"{size:,} B" if unit == "B" else f"{scaled:,.1f} {unit}"


def _stale(
    stage: DayStage,
    day: Day,
    hashes: Hashes,
    record: StageRecord | None,
    mark: str,
    config: dict[str, Any],
    inputs: dict[str, str],
) -> str | None:
    """Why the stage's outputs are not those of today; None when they are."""
    if record is None:
        return "not made yet"
    if record.fingerprint != mark:
        if record.format != stage.format:
            return f"made by an older release (format {record.format}, now {stage.format})"
        if record.config != config:
            return f"configuration changed ({changes(record.config, config)})"
        changed = [name for name in inputs if record.inputs.get(name) != inputs[name]]
        return f"changed: {', '.join(changed)}"
    if record.wall_s is None:
        return f"begun {record.started} and not finished"
    return record.damage(day.ws.root, hashes) or stage.damage(day, record)


def _require_stage(name: str, option: str) -> None:
    known = [stage.name for stage in STAGES]
    if name not in known:
        raise ValueError(f"{option} {name!r}: there is no such stage; choose from {', '.join(known)}")


def _missing(stage: DayStage, files: Files) -> str:
    cure = "look at --data" if files.made_by is None else f"run `--only {files.made_by}` first, or the whole day"
    return f"{stage.name} reads {files.name}, which is not there yet ({files.place}): {cure}"
