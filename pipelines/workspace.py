"""A run's folder: where each stage leaves what the next one reads.

RUN/recipe.json       the full configuration          RUN/towers/  RUN/ranker/    exported models, training results
RUN/canonical/        ingested tables, quarantine     RUN/index/                  vectors and FAISS index
RUN/dataset/          encoded, memory-mapped          RUN/metrics.json            what evaluation found
RUN/vectors/          video vectors in shards         RUN/stages/                what each stage was made of
RUN/training/         checkpoints                     RUN/.lock                   one run at a time
RUN/run.json          stages, times, gate, feeds      RUN/report.html             the same for people
RUN/registry/         bundles and LIVE; `--registry` puts it elsewhere
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from features.dataset import Dataset
from features.digests import content_sha256
from pipelines.recipes import Recipe, Split, recipe, to_json


class WorkspaceBusyError(RuntimeError):
    """Another process writes the run's folder; the message names it."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of a run and its recipe."""

    root: Path
    recipe: Recipe
    registry: Path

    @classmethod
    def create(
        cls, root: Path, chosen: Recipe, overrides: tuple[str, ...] = (), registry: Path | None = None
    ) -> Workspace:
        """Make the folder and write the recipe down; an existing folder is taken over by the new recipe."""
        ws = cls.planned(root, chosen, registry)
        ws.root.mkdir(parents=True, exist_ok=True)
        (ws.root / "recipe.json").write_text(to_json(chosen))
        (ws.root / "recipe-name.json").write_text(json.dumps({"name": chosen.name, "overrides": overrides}))
        return ws

    @classmethod
    def planned(cls, root: Path, chosen: Recipe, registry: Path | None = None) -> Workspace:
        """What `create` would make, with nothing written."""
        root = root.absolute()
        return cls(root, chosen, (registry or root / "registry").absolute())

    @classmethod
    def open(cls, root: Path, registry: Path | None = None) -> Workspace:
        """A folder that `create` made; raises FileNotFoundError saying how to make one."""
        root = root.absolute()
        path = root / "recipe-name.json"
        if not path.exists():
            raise FileNotFoundError(f"{root} is not a run folder (no recipe-name.json): start with `reelrank ingest`")
        written = json.loads(path.read_text())
        chosen = recipe(written["name"], written["overrides"])
        return cls(root, chosen, (registry or root / "registry").absolute())

    @property
    def canonical(self) -> Path:
        """Ingested tables."""
        return self.root / "canonical"

    @property
    def ingested(self) -> Path:
        """What ingest wrote into them, hashed."""
        return self.canonical / "ingest.json"

    @property
    def dataset_dir(self) -> Path:
        """Encoded training data."""
        return self.root / "dataset"

    @property
    def towers(self) -> Path:
        """Exported towers."""
        return self.root / "towers"

    @property
    def ranker(self) -> Path:
        """Exported ranker."""
        return self.root / "ranker"

    @property
    def frozen_ranker(self) -> Path:
        """The ranker as a bundle carries it, which is what evaluation judges."""
        return self.root / "ranker-frozen"

    @property
    def training(self) -> Path:
        """Checkpoints and training results."""
        return self.root / "training"

    @property
    def vectors(self) -> Path:
        """Video vectors in shards, a folder an instant."""
        return self.root / "vectors"

    @property
    def index(self) -> Path:
        """The built index."""
        return self.root / "index"

    @property
    def metrics(self) -> Path:
        """What evaluation measured."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """How the last run went."""
        return self.root / "run.json"

    @property
    def records(self) -> Path:
        """A record a stage (`pipelines.stage_records`)."""
        return self.root / "stages"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time writes this folder; raises WorkspaceBusyError while another does. The kernel lets go
        of the lock when its holder dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                raise WorkspaceBusyError(
                    f"{self.root} is being written by process {lock.read().strip() or '?'}: wait for it, or give "
                    "another folder"
                ) from error
            lock.truncate(0)
            lock.write(f"{os.getpid()}")
            lock.flush()
            yield

    def dataset(self) -> Dataset:
        """The encoded data, memory-mapped; raises FileNotFoundError when the examples stage has not run."""
        self.require(self.dataset_dir / "dates.json", "reelrank ingest")
        return Dataset.load(self.dataset_dir)

    def split(self, dataset: Dataset) -> Split:
        """The recipe's split of the days that are there."""
        return self.recipe.split.resolve(dataset.dates)

    def require(self, path: Path, command: str) -> None:
        """Raise FileNotFoundError naming the command that makes `path`."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there yet: run `{command} --run {self.root}` first")

    def fingerprint(self) -> str:
        """Digest of the ingested files: two metrics with equal fingerprints were measured on the same data."""
        return content_sha256(self.table_hashes())[:16]

    def table_hashes(self) -> dict[str, str]:
        """sha256 of every file of the ingested tables, as ingest wrote it. Without the quarantined rows, which name the
        files they came from, wherever these lay."""
        written = json.loads(self.ingested.read_text())["sha256"]
        return {name: sha256 for name, sha256 in written.items() if not name.startswith("quarantine/")}
