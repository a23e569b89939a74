"""The video tower over a corpus in shards: vectors go to disk as they come, and a killed run goes on at its shard.

FOLDER/videos-00000.npy    float16 (rows of the shard, D), in row order: what the index is built from
FOLDER/videos-00000.json   its rows, its sha256, and the fingerprint of the tower and inputs that made it

A shard is written under a temporary name and renamed when whole, and counts as done when its record says so: a rerun
makes only shards that are missing, or whose tower or inputs have changed. V rows, N videos of a block, D width.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from candidate_gen.infer import Towers
from candidate_gen.train import features_at, index_instant
from features.dataset import Dataset
from pipelines.cluster import ClusterConfig, spread

FORMAT = 1
"""Part of every fingerprint; raised when the same tower and inputs would give other bytes."""


class Source(Protocol):
    """A corpus to embed: picklable, opened by each worker for itself, the same bytes whoever asks."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    def rows(self) -> list[range]:
        """Rows of each shard, one shard after another."""
        ...

    def fingerprint(self, shard: int) -> str:
        """Changes with the tower and with anything the shard's vectors are made from."""
        ...

    def blocks(self, shard: int) -> Iterator[np.ndarray]:
        """Vectors (N, D) of the shard's rows in order, a block at a time."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard."""

    path: Path
    first_row: int
    n_rows: int
    sha256: str
    fingerprint: str

    @property
    def rows(self) -> np.ndarray:
        """(N,) int64."""
        return np.arange(self.first_row, self.first_row + self.n_rows)

    def vectors(self) -> np.ndarray:
        """(N, D) float16, read into memory and held to its digest; raises ValueError when the file is not what was
        written."""
        written = self.path.read_bytes()
        if hashlib.sha256(written).hexdigest() != self.sha256:
            raise ValueError(
                f"{self.path} is not the file its record describes (sha256 differs): delete it and embed again"
            )
        return np.load(io.BytesIO(written), allow_pickle=False)


@dataclass(frozen=True, slots=True)
class Embedded:
    """Finished shards as the index builder reads them (`candidate_gen.index.Shards`)."""

    shards: tuple[Shard, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Vectors in each shard."""
        return tuple(shard.n_rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of every vector."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and vectors of one shard, held to its digest."""
        return self.shards[number].rows, self.shards[number].vectors()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an embedding run stands."""

    videos_done: int
    videos: int
    per_s: float
    """Videos a second of this run; shards found finished do not count."""
    eta_s: float

    def __str__(self) -> str:
        return f"{self.videos_done:,} of {self.videos:,} videos, {self.per_s:,.0f} videos/s, {self.eta_s:,.0f} s left"


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """The videos of a dataset as of an instant: the first of `dates`, or the end of the log without any."""

    dataset_dir: Path
    towers_dir: Path
    towers: str
    """`tower_digest` of the folder."""
    dates: tuple[str, ...]
    dim: int
    device: str = "cpu"
    """Of torch; vectors made on another differ by rounding, and are not made again for that."""
    shard_rows: int = 1_000_000
    block_rows: int = 65_536

    @classmethod
    def of(cls, dataset_dir: Path, towers_dir: Path, dates: tuple[str, ...], device: str = "cpu") -> Catalogue:
        """With the towers that lie in the folder now."""
        digest = tower_digest(towers_dir)
        dim = opened(towers_dir, digest, device).dim
        return cls(dataset_dir=dataset_dir, towers_dir=towers_dir, towers=digest, dates=dates, dim=dim, device=device)

    def rows(self) -> list[range]:
        """Rows 1 .. V of the catalogue, `shard_rows` a shard."""
        return split_rows(len(Dataset.load(self.dataset_dir).videos), self.shard_rows)

    def fingerprint(self, shard: int) -> str:
        """Of the towers and of what the shard's videos are encoded as: new videos leave other shards alone."""
        digest = xxhash.xxh3_128(f"{FORMAT} {self.towers}".encode())
        for block in self.inputs(shard):
            for array in block:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def blocks(self, shard: int) -> Iterator[np.ndarray]:
        """Read, look up, multiply; `block_rows` videos at a time."""
        towers = opened(self.towers_dir, self.towers, self.device)
        columns = Dataset.load(self.dataset_dir).videos.columns
        for sparse_NW, dense_ND, candidate_dense_NC in self.inputs(shard):
            yield towers.embed(columns, sparse_NW, dense_ND, candidate_dense_NC)

    def inputs(self, shard: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Sparse slots, dense features and (video, instant) features of the shard's videos, a block at a time."""
        dataset = Dataset.load(self.dataset_dir)
        day, now_ms = index_instant(dataset, self.dates)
        of_shard = self.rows()[shard]
        for start in range(of_shard.start, of_shard.stop, self.block_rows):
            rows = np.arange(start, min(start + self.block_rows, of_shard.stop))
            at = slice(start, start + len(rows))
            yield dataset.videos.sparse[at], dataset.videos.dense[at], features_at(dataset, rows, day, now_ms)


def embed(
    source: Source,
    folder: Path,
    *,
    workers: int = 1,
    where: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[Shard]:
    """Make the shards that are not there yet; returns all of them in row order. With one worker in this process, with
    more as Ray tasks, which must see `folder` under the same path."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("videos-*.tmp"):
        leftover.unlink()
    spans = source.rows()
    done = {number: found for number in range(len(spans)) if (found := _finished(source, folder, number, spans))}
    meter = _Meter(spans, done, on_progress)
    missing = [number for number in range(len(spans)) if number not in done]
    alone = workers <= 1 or len(missing) <= 1  # then blocks can be counted as they are written

    def make(number: int, on_block: Callable[[int], None] = lambda _: None) -> tuple[int, Shard]:
        return number, make_shard(source, folder, number, on_block)

    made = (make(n, meter.count) for n in missing) if alone else spread(make, missing, workers=workers, where=where)
    for number, shard in made:
        done[number] = shard
        if not alone:
            meter.count(shard.n_rows)
    return [done[number] for number in range(len(spans))]


def make_shard(source: Source, folder: Path, number: int, on_block: Callable[[int], None] = lambda _: None) -> Shard:
    """Write one shard and then its record; a kill at any moment leaves either no record or the right one."""
    path, record = _paths(folder, number)
    rows = source.rows()[number]
    temporary = folder / f"{path.stem}.{os.getpid()}.tmp"
    digest, came = hashlib.sha256(), 0
    with temporary.open("wb") as file:

        def write(piece: bytes) -> None:
            digest.update(piece)
            file.write(piece)

        write(_header(len(rows), source.dim))
        for vector_ND in source.blocks(number):
            if not np.isfinite(vector_ND).all():
                raise ValueError(f"{path.name}: the tower gave NaN or infinity; it did not train properly")
            write(vector_ND.astype(np.float16).tobytes())
            came += len(vector_ND)
            on_block(len(vector_ND))
        if came != len(rows):
            raise ValueError(f"{path.name}: the source gave {came:,} vectors for {len(rows):,} rows")
        file.flush()
        os.fsync(file.fileno())
    shard = Shard(path, rows.start, len(rows), digest.hexdigest(), source.fingerprint(number))
    record.unlink(missing_ok=True)  # else a kill between the renames leaves an old record beside new vectors
    temporary.rename(path)
    described = {name: value for name, value in asdict(shard).items() if name != "path"}
    temporary.write_text(json.dumps(described, indent=2))
    temporary.rename(record)
    return shard


def split_rows(n_videos: int, shard_rows: int) -> list[range]:
    """Rows 1 .. n_videos (row 0 is the unknown video) in shards."""
    end = n_videos + 1
    return [range(start, min(start + shard_rows, end)) for start in range(1, end, shard_rows)]


@lru_cache(maxsize=1)
def opened(towers_dir: Path, digest: str, device: str = "cpu") -> Towers:
    """The towers in the folder, read once a process and shared by its shards; `digest` is their `tower_digest`."""
    if (found := tower_digest(towers_dir)) != digest:
        raise ValueError(f"{towers_dir} holds towers {found[:12]}, this corpus wants {digest[:12]}: embed again")
    return Towers.load(towers_dir, device)


def tower_digest(towers_dir: Path) -> str:
    """sha256 over the exported towers."""
    digest = hashlib.sha256()
    for name in ("towers.json", "towers.safetensors"):
        digest.update((towers_dir / name).read_bytes())
    return digest.hexdigest()


def _finished(source: Source, folder: Path, number: int, spans: list[range]) -> Shard | None:
    """The shard, if its record is there, its file has its size, and tower and inputs are still the same."""
    path, record = _paths(folder, number)
    try:
        shard = Shard(path=path, **json.loads(record.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or not whole: a power cut, say
        return None
    if not path.exists():
        return None
    size = len(_header(shard.n_rows, source.dim)) + shard.n_rows * source.dim * 2
    wanted = (spans[number].start, len(spans[number]), size)
    if (shard.first_row, shard.n_rows, path.stat().st_size) != wanted:
        return None
    return shard if shard.fingerprint == source.fingerprint(number) else None


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"videos-{number:05d}.npy", folder / f"videos-{number:05d}.json"


def _header(n_rows: int, dim: int) -> bytes:
    """The head of a .npy file of float16 (n_rows, dim)."""
    head = io.BytesIO()
    described = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (n_rows, dim)}
    np.lib.format.write_array_header_1_0(head, described)
    return head.getvalue()


class _Meter:
    """Counts videos and tells the rate of this run."""

    def __init__(self, spans: list[range], done: dict[int, Shard], tell: Callable[[Progress], None]) -> None:
        self._tell, self._started, self._made = tell, time.monotonic(), 0
        self._found = sum(shard.n_rows for shard in done.values())
        self._videos = sum(map(len, spans))

    def count(self, n_videos: int) -> None:
        """So many more are made."""
        self._made += n_videos
        per_s = self._made / max(time.monotonic() - self._started, 1e-9)
        done = self._found + self._made
        self._tell(Progress(done, self._videos, per_s, (self._videos - done) / per_s))
