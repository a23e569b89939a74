"""What a person sees of long work: one line a stage with its rows and wall time, and a live line while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console

FILE_WIDTH = 140
"""Columns of what is printed to a file or a pipe, so that tables keep their ids whole."""


def output() -> Console:
    """Where results go: standard output, wide enough for tables when it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)


REFRESH_S = 10.0
"""Without a terminal, progress is printed this often instead of rewriting a line."""


@dataclass(slots=True)
class Stage:
    """A stage while it runs; it fills in its rows, note and details."""

    name: str
    rows: int | None = None
    note: str = ""
    details: list[str] = field(default_factory=list)
    """Lines shown below the stage's own."""
    seconds: float = 0.0
    status: str = "running"
    """Then ran, resumed (from a checkpoint), skipped, or failed."""
    why: str = ""
    """Of running or being skipped."""
    fingerprint: str = ""
    _tell: object = None

    def progress(self, text: str) -> None:
        """Show where the work stands."""
        if callable(self._tell):
            self._tell(text)


@dataclass(slots=True)
class Stages:
    """The stages of a run, in order, each timed."""

    console: Console = field(default_factory=lambda: Console(file=sys.stderr, highlight=False))
    done: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage; print its line when it ends. One that raises is kept as failed."""
        stage, started = Stage(name), time.monotonic()
        self.done.append(stage)
        try:
            with self._shown(stage, started):
                yield stage
        except BaseException:
            stage.seconds, stage.status = time.monotonic() - started, "failed"
            raise
        stage.seconds = time.monotonic() - started
        if stage.status == "running":
            stage.status = "ran"
        rows = f"{stage.rows:,} rows" if stage.rows is not None else ""
        self.console.print(f"{name:<16}{rows:>16}{stage.seconds:>8.1f} s  {stage.note}", soft_wrap=True)
        for line in stage.details:
            self.console.print(f"    {line}", soft_wrap=True, markup=False)

    def skipped(self, stage: Stage) -> None:
        """Print and keep a stage that is not run."""
        stage.status = "skipped"
        self.done.append(stage)
        self.console.print(f"{stage.name:<16}{'skipped':>16}            {stage.why}", soft_wrap=True, markup=False)

    @contextmanager
    def _shown(self, stage: Stage, started: float) -> Iterator[None]:
        """A live line while the stage runs."""
        name = stage.name
        if self.console.is_terminal:
            with self.console.status(f"{name} ...") as status:
                stage._tell = lambda text: status.update(f"{name}: {text}")
                yield
        else:
            last = [started]

            def tell(text: str) -> None:
                if time.monotonic() - last[0] > REFRESH_S:
                    last[0] = time.monotonic()
                    self.console.print(f"  {name}: {text}", soft_wrap=True)

            stage._tell = tell
            yield

    def records(self) -> list[dict]:
        """For `run.json` and the report."""
        names = ("name", "status", "why", "fingerprint", "seconds", "rows", "note")
        return [{name: getattr(stage, name) for name in names} for stage in self.done]
