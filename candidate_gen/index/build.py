"""From shards of vectors to an index on disk, streamed: a sample trains, shards are encoded one by one (in parallel, if
the caller maps them so), lists are merged range by range. Killed at any moment, the same call goes on where it stopped.

    sample -> train -> encode shard 0, 1, ... -> merge -> check against exact search
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from candidate_gen.index.config import IndexConfig
from candidate_gen.index.lists import Piece, write_lists
from candidate_gen.index.shards import Shards, sample
from candidate_gen.index.stored import StoredVectors, create
from candidate_gen.index.trained import FILES, Trained

FORMAT = 2
"""Version of index.json; raised when an older reader would go wrong."""
ENCODE_BLOCK = 262_144
MERGE_BLOCK = 4_000_000
"""Vectors merged in memory at a time."""
FLAT_SAMPLE = 262_144
"""Vectors that set the value ranges of the stored ones where no lists are trained."""

Map = Callable[[Callable[[int], int], Sequence[int]], Iterable[int]]
"""Calls a function for each shard number, in any order, and yields what it returns: `map`, or tasks of a cluster."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage of a build is; str() is a line for people."""

    stage: str
    done: int = 0
    total: int = 0
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        if not self.total:
            return self.stage
        rate = self.done / max(self.elapsed_s, 1e-9)
        left_s = (self.total - self.done) / max(rate, 1e-9)
        return f"{self.stage}: {self.done:,} of {self.total:,} videos, {rate:,.0f}/s, {_human_s(left_s)} left"


class _Watch:
    """Tells progress and keeps the wall time of each stage."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        self._name, self._began = name, time.perf_counter()
        self.say()

    def say(self, done: int = 0, total: int = 0, text: str = "") -> None:
        self.seconds[self._name] = time.perf_counter() - self._began
        self._tell(Progress(text or self._name, done, total, self.seconds[self._name]))


def build(
    shards: Shards,
    n_rows: int,
    config: IndexConfig,
    folder: Path,
    *,
    query_QD: np.ndarray | None = None,
    trained: Trained | None = None,
    parallel: Map = map,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, float]:
    """Write an index of all shards, rows in 1 .. n_rows-1, into `folder`; see `VideoIndex.open`. Returns the seconds of
    each stage; the folder holds no times, so that the same vectors give the same bytes.

    `query_QD` are sample queries (some thousands of user vectors) that lists and codes are shaped for; `trained` reuses
    the lists and codes of another index. On a `device` of torch lists are trained and vectors assigned to them: most
    products of a build; codes are made on the CPU. Raises ValueError for rows out of range or twice, vectors that are
    not finite, and an empty corpus.
    """
    videos = sum(shards.counts)
    if not videos:
        raise ValueError("no vectors to index: the catalogue has no eligible video")
    folder.mkdir(parents=True, exist_ok=True)
    watch, kind = _Watch(on_progress), config.kind_for(videos)
    work = _work_folder(folder, shards, n_rows, config, query_QD)
    lists = config.lists_for(videos) if kind == "ivf" else 0
    if not (work / "trained.json").exists():
        _train(work, shards, n_rows, lists, config, query_QD, trained, watch, device)
    watch.stage("encode")
    done = 0
    for count in parallel(_ShardEncoder(work, shards, n_rows, kind, device), range(len(shards.counts))):
        done += count
        watch.say(done, videos)
    watch.stage("merge")
    names = _merge(work, folder, shards, n_rows, kind, watch)
    watch.say()
    watch.stage("hash")
    files = digests(folder, names)
    watch.say()
    described = {"kind": kind, "videos": videos, "n_rows": n_rows, "lists": lists, "config": asdict(config)}
    describe(folder, {**described, "files": files})
    shutil.rmtree(work)
    return {name: round(s, 3) for name, s in watch.seconds.items()}


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file."""
    return {name: _digest(folder / name) for name in names}


def describe(folder: Path, described: dict[str, Any]) -> None:
    """Write index.json with its own hash; with it the index is complete."""
    described = {**described, "format": FORMAT}
    described["sha256"] = _digest_of(described)
    temporary = folder / "index.json.tmp"
    temporary.write_text(json.dumps(described, indent=2, sort_keys=True))
    os.replace(temporary, folder / "index.json")


def _work_folder(folder: Path, shards: Shards, n_rows: int, config: IndexConfig, query_QD: np.ndarray | None) -> Path:
    """Unfinished work of the very same build, or an empty folder."""
    work = folder / "building"
    asked = "" if query_QD is None else hashlib.sha256(np.ascontiguousarray(query_QD).tobytes()).hexdigest()
    wanted = json.dumps([FORMAT, shards.fingerprint, shards.counts, n_rows, asdict(config), asked])
    mark = work / "build.json"
    if not (mark.exists() and mark.read_text() == wanted):
        shutil.rmtree(work, ignore_errors=True)
        (folder / "index.json").unlink(missing_ok=True)
        work.mkdir()
        mark.write_text(wanted)
    return work


def _train(
    work: Path,
    shards: Shards,
    n_rows: int,
    lists: int,
    config: IndexConfig,
    query_QD: np.ndarray | None,
    trained: Trained | None,
    watch: _Watch,
    device: str,
) -> None:
    watch.stage("sample")
    sample_ND = sample(shards, max(config.train_per_list * lists, FLAT_SAMPLE), config.seed)
    if not np.isfinite(sample_ND).all():
        raise ValueError("vectors hold NaN or infinity; the towers did not train properly")
    create(work / "stored.faiss", sample_ND, n_rows, config.stored_for(sum(shards.counts)))
    watch.stage("train")
    if lists:
        made = trained or Trained.fit(sample_ND, lists, config, query_QD, lambda text: watch.say(text=text), device)
        made.save(work)
    (work / "trained.json").write_text(json.dumps({"lists": lists}))


@dataclass(frozen=True, slots=True)
class _ShardEncoder:
    """Encodes one shard into files of its own; can be sent to another process."""

    work: Path
    shards: Shards
    n_rows: int
    kind: str
    device: str

    def __call__(self, number: int) -> int:
        """Returns the shard's vectors; a shard that is done is left alone."""
        count, out = self.shards.counts[number], self.work / f"shard-{number:05d}"
        if out.exists():
            return count
        rows, vector_ND = self.shards.read(number)
        self._check(number, rows, vector_ND)
        stored = StoredVectors(self.work / "stored.faiss", writable=True)
        trained = Trained.load(self.work) if self.kind == "ivf" else None
        parts = []
        for begin in range(0, count, ENCODE_BLOCK):
            block_ND = np.asarray(vector_ND[begin : begin + ENCODE_BLOCK], dtype=np.float32)
            stored.write(rows[begin : begin + ENCODE_BLOCK], block_ND)
            if trained is not None:
                parts.append(trained.encode(block_ND, self.device))
        stored.flush()
        arrays = {"rows": rows}
        if trained is not None and parts:
            list_N, code_NB = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(list_N, kind="stable")
            bounds = np.searchsorted(list_N[order], np.arange(trained.clusters.lists + 1))
            arrays = {"rows": rows[order], "codes": code_NB[order], "bounds": bounds.astype(np.int64)}
        temporary = self.work / f"{out.name}.{os.getpid()}.tmp"
        temporary.mkdir()
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        os.replace(temporary, out)
        return count

    def _check(self, number: int, rows: np.ndarray, vector_ND: np.ndarray) -> None:
        if len(rows) != len(vector_ND) or (len(rows) and (rows.min() < 1 or rows.max() >= self.n_rows)):
            raise ValueError(f"shard {number}: rows must lie in 1 .. {self.n_rows - 1} and come once")
        if not np.isfinite(vector_ND).all():
            raise ValueError(f"shard {number}: vectors hold NaN or infinity; the towers did not train properly")


def _merge(work: Path, folder: Path, shards: Shards, n_rows: int, kind: str, watch: _Watch) -> list[str]:
    """Lists and rows of all shards together, then everything moves into its place; returns the files' names."""
    numbers = [n for n, count in enumerate(shards.counts) if count]
    came = np.zeros(n_rows, bool)
    for number in numbers:
        rows = np.load(work / f"shard-{number:05d}" / "rows.npy", allow_pickle=False)
        if came[rows].any() or len(np.unique(rows)) != len(rows):
            raise ValueError(f"shard {number}: rows must lie in 1 .. {n_rows - 1} and come once")
        came[rows] = True
    np.save(work / "indexed.npy", np.packbits(came, bitorder="little"), allow_pickle=False)
    names = ["stored.faiss", "indexed.npy"]
    if kind == "ivf":
        bounds = np.stack([_open(work, n, "bounds") for n in numbers])
        sizes_L = np.diff(bounds, axis=1).sum(axis=0)
        pieces = _pieces(work, numbers, bounds, sizes_L, watch)
        write_lists(work, sizes_L, pieces, Trained.load(work).codebook.code_bytes)
        names += ["lists.bin", "lists.npy", *FILES]
    for name in names:
        os.replace(work / name, folder / name)
    return names


def _pieces(
    work: Path, numbers: list[int], bounds_SL: np.ndarray, sizes_L: np.ndarray, watch: _Watch
) -> Iterator[tuple[int, int, list[Piece]]]:
    """Ranges of lists of about MERGE_BLOCK vectors, with each shard's part."""
    files = [(_open(work, n, "codes"), _open(work, n, "rows")) for n in numbers]
    before_L = np.concatenate([[0], np.cumsum(sizes_L)])
    first = 0
    while first < len(sizes_L):
        last = max(first + 1, int(np.searchsorted(before_L, before_L[first] + MERGE_BLOCK)))
        last = min(last, len(sizes_L))
        parts = []
        for (code_NB, rows), bounds_L in zip(files, bounds_SL, strict=True):
            here = slice(int(bounds_L[first]), int(bounds_L[last]))
            list_n = np.repeat(np.arange(first, last), np.diff(bounds_L[first : last + 1]))
            parts.append((list_n, code_NB[here], rows[here]))
        yield first, last, parts
        watch.say(int(before_L[last]), int(before_L[-1]))
        first = last


def _open(work: Path, number: int, name: str) -> np.ndarray:
    return np.load(work / f"shard-{number:05d}" / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def _human_s(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def verify(folder: Path) -> None:
    """Hash every file of an index before anything parses one; raises ValueError naming the file and both hashes.

    An index inside a bundle is covered by the bundle's own manifest."""
    described, _ = read_description(folder / "index.json")
    for name, expected in described["files"].items():
        found = _digest(folder / name) if (folder / name).is_file() else {"bytes": -1, "sha256": "missing"}
        if found != expected:
            raise ValueError(f"{folder / name} is damaged: found {found}, index.json says {expected}; build it again")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest_of(described: dict[str, Any]) -> str:
    bare = {name: value for name, value in described.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def read_description(path: Path) -> tuple[dict[str, Any], IndexConfig]:
    """index.json, checked; raises ValueError naming the file."""
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']}, this release reads {FORMAT}")
        if described["sha256"] != _digest_of(described):
            raise ValueError("its own sha256 does not match")
        for name in ("videos", "n_rows", "lists"):
            if type(described[name]) is not int or described[name] < 0:
                raise ValueError(f"{name} is {described[name]!r}")
        return described, IndexConfig(**described["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe an index: {error!r}; build the index again") from error
