"""The whole day: raw logs in, a live bundle out, and `run.json`, which says how it went and can be trusted to.

ingest -> examples -> train both models -> embed and index -> evaluate -> gate -> publish
"""

from __future__ import annotations

import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pipelines.console import Stages
from pipelines.day import Day
from pipelines.execute import execute
from pipelines.exits import EXIT_FAILED, EXIT_REFUSED, exit_code, message
from pipelines.hashes import write_json
from pipelines.plan import Selection
from pipelines.stage_records import StageRecord
from pipelines.workspace import Workspace, WorkspaceBusyError

REPORTED = ("torch", "torchrec", "fbgemm-gpu-cpu", "faiss-cpu", "ray", "pyarrow", "numpy", "grpcio")


class RunReport:
    """`run.json`, kept up to date while the run goes: killed at any moment, it says "running" and no exit code."""

    def __init__(self, shown: Stages, file: Path, copy: Path | None = None) -> None:
        """`file` is written when its folder is there; `copy` always."""
        self._shown, self._file, self._copy = shown, file, copy
        self.record: dict[str, Any] = {
            "status": "running",
            "exit_code": None,
            "error": None,
            "command": sys.argv[1:],
            "created": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "machine": machine(),
            "versions": {name: version(name) for name in REPORTED if _installed(name)},
        }

    def save(self, *, own: bool = True) -> None:
        """Write it as things stand; without `own`, the copy alone."""
        self.record["stages"] = self._shown.records()
        if self._copy is not None:
            write_json(self._copy, self.record)
        if own and self._file.parent.is_dir():
            write_json(self._file, self.record)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """However the block ends, the report says so. SIGTERM and Ctrl-C end it as a failure. Where another process
        writes the folder, its report stays."""
        try:
            with _exit_on_sigterm():
                yield
        except KeyboardInterrupt as error:
            self._failed(EXIT_FAILED, "stopped by Ctrl-C")
            raise SystemExit(EXIT_FAILED) from error
        except SystemExit as error:
            self._failed(int(error.code or 0) or EXIT_FAILED, "stopped by SIGTERM")
            raise
        except WorkspaceBusyError as error:
            self._failed(EXIT_FAILED, message(error), own=False)
            raise
        except Exception as error:
            self._failed(exit_code(error) or EXIT_FAILED, message(error))
            raise
        self.record |= {"status": "ok", "exit_code": 0}
        self.save()

    def _failed(self, code: int, told: str, *, own: bool = True) -> None:
        failed = [stage.name for stage in self._shown.done if stage.status == "failed"]
        next_step = "mend what the message names, then run the same command: stages that are finished are skipped"
        self.record |= {
            "status": "refused" if code == EXIT_REFUSED else "failed",
            "exit_code": code,
            "error": {"stage": failed[-1] if failed else None, "message": told, "next": next_step},
        }
        self.save(own=own)


def run(day: Day, shown: Stages, report: RunReport, selection: Selection = Selection()) -> bool:  # noqa: B008 (frozen)
    """Execute the stages and add what they found to the report; returns whether a bundle was published."""
    report.record["title"] = f"reelrank: {day.ws.recipe.name}"
    execute(day, shown, selection, after_each=report.save)
    if day.ws.metrics.exists():
        report.record |= measured(json.loads(day.ws.metrics.read_text()))
    published = next((stage for stage in shown.done if stage.name == "publish"), None)
    if published is None:
        return False
    report.record |= _published(day.ws)
    return published.status == "ran"


def measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """The report's part of `metrics.json`."""
    return {
        "data": metrics["fingerprint"],
        "split": metrics["split"],
        "retrieval": metrics["retrieval"]["rows"],
        "retrieval_note": _retrieval_note(metrics["retrieval"]),
        "pools": metrics["channels"]["pools"],
        "channels": metrics["channels"]["rows"],
        "ranking": metrics["ranking"],
        "primary": metrics["primary"],
        "slices": metrics["slices"],
        "slots": metrics["slots"],
        "watch": metrics["watch"],
        "collisions": metrics["collisions"],
        "reliability": metrics["reliability"],
    }


def machine() -> dict:
    """Where the figures were taken."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(psutil.Process().cpu_affinity()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _published(ws: Workspace) -> dict[str, Any]:
    record = StageRecord.load(ws.records, "publish")
    return dict(record.result or {}) if record is not None else {}


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Schedulers stop a job with SIGTERM: leave by SystemExit, so that files are closed and the report is written. Any
    other exception of a handler is printed and forgotten while Ray waits for its workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(EXIT_FAILED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _retrieval_note(retrieval: dict) -> str:
    found, through = retrieval["index_recall"], retrieval["through_index"]
    k = found["k"]
    return (
        f"{retrieval['queries']:,} queries (a user on a test day) for unseen {retrieval['signal']} among "
        f"{retrieval['catalogue']:,} videos. The index returns {found['of_exact']:.1%} of the exact top {k}; on its "
        f"{found['queries']} queries recall@{k} through it is {through[f'recall@{k}']:.4f}."
    )


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True
