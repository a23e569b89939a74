"""Workers of a driver that was killed live on for seconds, and write: whoever takes over waits for their end.

Each worker holds a shared lock on a file for as long as its process lives; the kernel lets go of it, whatever the end.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

WAIT_S = 120.0
"""Ray's workers notice the death of their driver within seconds, longer on a busy machine."""

_held: list[IO[str]] = []


def hold_while_alive(file: Path) -> None:
    """In a worker."""
    handle = file.open("a")
    fcntl.flock(handle, fcntl.LOCK_SH)
    _held.append(handle)


def wait_for_workers(file: Path, tell: Callable[[str], None]) -> None:
    """In the driver, before anything is touched; raises TimeoutError when some worker does not end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with file.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited_s = time.monotonic() - began
            if waited_s > WAIT_S:
                raise TimeoutError(
                    f"workers of an earlier run still write beside {file} after {WAIT_S:.0f} s: end them (their "
                    "processes are called ray::), then run again"
                )
            tell(f"waiting for workers of a run that was killed, {waited_s:.0f} s")
            time.sleep(0.2)
