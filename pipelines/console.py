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
        """Time a stage; print its line when it ends."""
        stage, started = Stage(name), time.monotonic()
        if self.console.is_terminal:
            with self.console.status(f"{name} ...") as status:
                stage._tell = lambda text: status.update(f"{name}: {text}")
                yield stage
        else:
            last = [started]

            def tell(text: str) -> None:
                if time.monotonic() - last[0] > REFRESH_S:
                    last[0] = time.monotonic()
                    self.console.print(f"  {name}: {text}", soft_wrap=True)

            stage._tell = tell
            yield stage
        stage.seconds = time.monotonic() - started
        rows = f"{stage.rows:,} rows" if stage.rows is not None else ""
        self.console.print(f"{name:<16}{rows:>16}{stage.seconds:>8.1f} s  {stage.note}", soft_wrap=True)
        for line in stage.details:
            self.console.print(f"    {line}", soft_wrap=True, markup=False)
        self.done.append(stage)

    def records(self) -> list[dict]:
        """For `run.json` and the report."""
        return [{"name": s.name, "seconds": s.seconds, "rows": s.rows, "note": s.note} for s in self.done]
