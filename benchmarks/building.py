"""Indexes built once for all benchmarks: in a process of their own, with what it took kept beside them."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus

THREADS = 2
Build = Callable[..., dict[str, float]]
"""build(corpus, n, folder, *arguments) -> wall seconds by stage; writes the index into the folder."""


class Rate:
    """Prints how many videos are done, how fast, and how long the rest takes; at most every ten seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._printed = time.perf_counter()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.perf_counter()
        if now - self._printed >= 10:
            self._printed = now
            rate = self._done / (now - self._start)
            left_s = (self._total - self._done) / rate
            print(f"{self._what}: {self._done:,} of {self._total:,}, {rate:,.0f}/s, {left_s:.0f} s left", flush=True)


def built(
    name: str, build: Build, corpus: Corpus, n: int, work: Path, console: Console, *arguments: Any
) -> dict[str, Any]:
    """Folder and figures of an index of the corpus' first n videos; taken from `work` where it was built before."""
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    folder = work / f"{label}-{corpus.fingerprint(n)}"
    record = folder.with_suffix(".json")
    if record.exists():
        figures, when = json.loads(record.read_text()), "earlier"
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a build that did not finish
        folder.mkdir(parents=True)
        with FreshProcess(THREADS) as process:
            figures, when = process.run(_timed, build, corpus, n, folder, arguments), "now"
        record.write_text(json.dumps(figures))
    console.print(
        f"{name}, {n:,} videos: built {when} in {figures['wall_s']:.0f} s, {figures['cpu_s']:.0f} s of CPU, "
        f"peak {figures['peak_mib']:,.0f} MiB"
    )
    return figures


def _timed(build: Build, corpus: Corpus, n: int, folder: Path, arguments: tuple[Any, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    stages_s = build(corpus, n, folder, *arguments)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "folder": str(folder),
        "wall_s": time.perf_counter() - start,
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in used),
        "peak_mib": max(one.ru_maxrss for one in used) / 1024,
        "disk_mib": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20,
        "stages_s": stages_s,
    }
