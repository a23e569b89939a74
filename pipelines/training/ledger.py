"""Which units each step consumed, written down by every worker: the proof that a run read each row as often as it says.

    FOLDER/worker-0.jsonl     {"position": 17, "epoch": 0, "units": [512, 7, ...]}    one line a step

`position` is the number of steps done before. A line counts if the checkpoint that a run goes on from, or ends with,
has a later position: the lines of steps that died with their worker are cut off when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Consumed:
    """One worker's units of one step."""

    position: int
    epoch: int
    units: np.ndarray


class Ledger:
    """One worker's file, open for appending."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / f"worker-{rank}.jsonl").open("a")

    def add(self, *, position: int, epoch: int, units: np.ndarray) -> None:
        """A step that was made."""
        self._lines.write(json.dumps({"position": position, "epoch": epoch, "units": units.tolist()}) + "\n")

    def sync(self) -> None:
        """To the disk, before the checkpoint that these lines belong to."""
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._lines.close()


def cut_ledger(folder: Path, steps_done: int) -> None:
    """Drop the lines of steps from this position on, in the files of all workers there ever were."""
    for file in folder.glob("worker-*.jsonl"):
        end = 0
        for line in file.open("rb"):
            if not line.endswith(b"\n") or json.loads(line)["position"] >= steps_done:
                break
            end += len(line)
        os.truncate(file, end)


def read_ledger(folder: Path) -> Iterator[Consumed]:
    """Every line of every worker."""
    for file in sorted(folder.glob("worker-*.jsonl")):
        for line in file.open():
            fields = json.loads(line)
            yield Consumed(fields["position"], fields["epoch"], np.array(fields["units"], np.int64))
