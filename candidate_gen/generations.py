"""What a live index keeps on disk beside its log: the overlay of each compaction, and one file that says which counts.

V rows of an overlay (row 0 unused), D width. A generation is written, sealed and only then named by `state.json`, which
is replaced by a rename: a crash leaves the old generation with its log, or the new one with what came after.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from candidate_gen import durable
from candidate_gen.index import IndexConfig, VideoIndex

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Generation:
    """An overlay: videos that came since the base was built, ids ascending from row 1."""

    number: int
    ids_V: np.ndarray
    base_rows_V: np.ndarray
    vectors_VD: np.ndarray
    """float16, what the next generation is built from."""
    dead_rows: np.ndarray
    """Base rows removed or replaced up to here."""
    index: VideoIndex | None
    """None where so few videos are scanned as the delta is: at most `IndexConfig.exact_below`."""


class Generations:
    """The folder of a live index, less its log."""

    def __init__(self, folder: Path, base: str) -> None:
        self._folder, self._base = folder, base
        self.first_segment = 1
        """Of the log: what came before it lies in the generation."""
        self._number = 0

    def open(self) -> Generation | None:
        """The generation that counts, every byte verified; None before the first compaction."""
        path = self._folder / "state.json"
        if not path.exists():
            durable.replace(
                path, _signed({"format": FORMAT, "base": self._base, "number": 0, "segment": 1, "files": {}})
            )
        state = _read_signed(path)
        if state["format"] != FORMAT or state["base"] != self._base:
            raise ValueError(
                f"{path} is format {state['format']} for base {state['base']}; this base is {self._base}: give each "
                "published index a folder of its own and send it the updates since its build"
            )
        self.first_segment, self._number = state["segment"], state["number"]
        self._remove_others()
        if self._number == 0:
            return None
        folder = self._path(self._number)
        durable.verify(folder, state["files"])
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("ids_V", "base_rows_V", "vectors_VD", "dead_rows")
        }
        index = VideoIndex(folder / "index") if (folder / "index").exists() else None
        return Generation(number=self._number, index=index, **arrays)

    def write(
        self,
        ids_V: np.ndarray,
        base_rows_V: np.ndarray,
        vectors_VD: np.ndarray,
        dead_rows: np.ndarray,
        first_segment: int,
        config: IndexConfig,
    ) -> Generation:
        """Build, write and seal the next generation, then let it count, together with the log from a segment on."""
        number = self._number + 1
        folder = self._path(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, array in (("ids_V", ids_V), ("base_rows_V", base_rows_V), ("vectors_VD", vectors_VD),
                            ("dead_rows", dead_rows)):  # fmt: skip
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        index = None
        if len(ids_V) - 1 > config.exact_below:
            rows = np.arange(1, len(ids_V))
            chunks = [(rows, vectors_VD[1:].astype(np.float32))]
            index = VideoIndex.build(chunks, len(ids_V), config, folder / "index")
        state: dict[str, Any] = {"format": FORMAT, "base": self._base, "number": number, "segment": first_segment}
        state["files"] = durable.seal(folder)
        durable.sync_folder(self._folder)
        durable.replace(self._folder / "state.json", _signed(state))
        self.first_segment, self._number = first_segment, number
        self._remove_others()
        return Generation(number, ids_V, base_rows_V, vectors_VD, dead_rows, index)

    def _remove_others(self) -> None:
        """Searches that still read an older generation keep its pages: the files lose only their names."""
        for path in self._folder.glob("generation-*"):
            if path != self._path(self._number):
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"generation-{number:06d}"


def fingerprint(ids_V: np.ndarray, dim: int) -> str:
    """Tells one base from another: its size, width, and a sample of at most 65,536 ids."""
    sample = np.ascontiguousarray(ids_V[:: max(len(ids_V) // 65_536, 1)], "<i8")
    return f"{len(ids_V)}x{dim}-{hashlib.sha256(sample.tobytes()).hexdigest()[:16]}"


def _signed(state: dict[str, Any]) -> bytes:
    body = json.dumps(state, sort_keys=True).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _read_signed(path: Path) -> dict[str, Any]:
    body, _, digest = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise ValueError(f"{path} does not match its own sha256; restore the folder from a copy")
    return json.loads(body)
