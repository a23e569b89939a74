"""What files hold, by sha256: the identity that stages know their inputs and outputs by.

Every file is read once a process as long as its size and time of change (or a store's version of it) stay. Raw logs,
which may be large and come again every day, are remembered from run to run in the same way; names and times only save
reading, they say nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from features.digests import content_sha256
from pipelines.cluster import usable_cpus
from pipelines.storage import Location, sha256_of, stamp

SETTLED_NS = 2 * 10**9
"""A file that changed less than this before it was hashed may change again without its time showing it: it is not
remembered (git's "racy" entries)."""


class FileHash(NamedTuple):
    """One file's content."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Files:
    """What a stage reads or writes."""

    name: str
    place: Location | str
    """Where they lie, to be told."""
    paths: Mapping[str, Location]
    """By the names that count: below the folder they have in common, so that they may lie elsewhere."""
    made_by: str | None = None
    """The stage that writes them; None for raw logs."""
    digest: str | None = None
    """Where whoever wrote them has hashed them all."""

    @classmethod
    def below(cls, name: str, place: Path, made_by: str | None = None) -> Files:
        """The one file, or all files of a folder."""
        root = place.parent if place.is_file() else place
        return cls(name, place, {path.relative_to(root).as_posix(): path for path in files_below(place)}, made_by)

    @classmethod
    def together(cls, name: str, paths: Iterable[Location]) -> Files:
        """These files, wherever they lie."""
        found = sorted(set(paths), key=str)
        try:
            place = os.path.commonpath([str(path.parent) for path in found]) if found else ""
        except ValueError:  # some on this machine, some elsewhere
            place = ""
        return cls(name, place, {str(path)[len(place) :].lstrip("/"): path for path in found})

    @property
    def bytes(self) -> int:
        """Of all the files."""
        return sum(stamp(path)["size"] for path in self.paths.values())


def files_below(place: Path) -> list[Path]:
    """The one file, or all files of a folder, in order."""
    return [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]


class Hashes:
    """sha256 of files, remembered by path, size and time of change."""

    def __init__(self, remembered: Path | None = None) -> None:
        """`remembered`: a JSON file of hashes of earlier runs; `save` writes it again."""
        self._file = remembered
        self._known: dict[str, tuple[int, int | str | None, str]] = {}
        self._kept: set[str] = set()
        if remembered is not None and remembered.exists():
            self._known = {path: tuple(entry) for path, entry in json.loads(remembered.read_text()).items()}
            self._kept = set(self._known)

    def of(self, paths: Mapping[str, Location]) -> dict[str, FileHash]:
        """Content of every file, by its name; raises FileNotFoundError for one that is gone."""
        with ThreadPoolExecutor(usable_cpus(), thread_name_prefix="sha256") as pool:
            return dict(zip(paths, pool.map(self._one, paths.values()), strict=True))

    def digest(self, files: Files) -> str:
        """One for all the files, of their names and content."""
        if files.digest is not None:
            return files.digest
        return content_sha256({name: entry.sha256 for name, entry in self.of(files.paths).items()})

    def keep(self, paths: Iterable[Location]) -> None:
        """Remember these beyond this process."""
        self._kept.update(map(str, paths))

    def save(self) -> None:
        """Write what is to be remembered."""
        if self._file is None:
            return
        kept = {path: entry for path, entry in self._known.items() if path in self._kept}
        write_json(self._file, kept)

    def _one(self, path: Location) -> FileHash:
        asked_ns, now = time.time_ns(), stamp(path)
        size, version = now["size"], now["version"]
        *known, sha256 = self._known.get(str(path), (-1, None, ""))
        if version is None or known != [size, version]:
            sha256 = sha256_of(path)
            if version is not None and not (isinstance(path, Path) and version >= asked_ns - SETTLED_NS):
                self._known[str(path)] = (size, version, sha256)
        return FileHash(size, sha256)


def write_json(path: Path, value: object) -> None:
    """In one piece: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.write_text(json.dumps(value, indent=1))
    os.replace(beside, path)
