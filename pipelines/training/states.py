"""What a bundle's models were trained to, kept for the day after: REGISTRY/training/VERSION/.

    encoder/    {towers,ranker}/checkpoint/    {towers,ranker}/{towers,ranker}.json    trained.json

trained.json is written last and holds size and sha256 of every other file. Files are linked where the file system
allows it, so that keeping a state costs no space while the run's folder has it too. It stays on the machine or the
storage where training runs: what serves never reads it.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from features.digests import file_sha256
from features.transforms import Encoder
from pipelines.storage import copy_or_link
from pipelines.training.checkpoint import Checkpoints

FORMAT = 1
STATES = "training"
KEPT = 3
"""States kept, the newest and the live one's among them."""
MODELS = ("towers", "ranker")


class StateError(ValueError):
    """There is nothing to train on from, or it is damaged; the message says the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedState:
    """A verified state."""

    folder: Path
    version: str
    """Of the bundle."""
    dates: tuple[str, ...]
    """Every day that these models were trained on, by them or by those they began from."""

    @property
    def encoder(self) -> Encoder:
        """By which both models read."""
        return Encoder.load(self.folder / "encoder")

    def checkpoint(self, model: str) -> Path:
        """Parameters and optimizers of `towers` or `ranker` at their best epoch."""
        return self.folder / model / "checkpoint"

    def exported(self, model: str) -> Path:
        """Folder of what the model exported beside its weights."""
        return self.folder / model


def keep_state(
    registry: Path, version: str, *, training: Path, encoder: Encoder, dates: tuple[str, ...], live: str | None
) -> None:
    """Keep the state of the models that bundle `version` was made of. `training`: the run's training folder; `dates`:
    all days behind the models; `live`: a version whose state must not be dropped to make room."""
    root = registry / STATES
    partial = root / f".{version}-{uuid.uuid4().hex}"
    try:
        (partial / "encoder").mkdir(parents=True)
        encoder.save(partial / "encoder")
        for model in MODELS:
            best = Checkpoints(training / model / "checkpoints").find("best")
            if best is None:
                raise StateError(f"{training / model} holds no checkpoint: train before publishing")
            for part in best.iterdir():
                copy_or_link(part, partial / model / "checkpoint" / part.name)
            for described in (training / model).glob("*.json"):
                shutil.copy2(described, partial / model / described.name)
        written = {"format": FORMAT, "bundle": version, "dates": dates, "files": _hashes(partial)}
        (partial / "trained.json").write_text(json.dumps(written, indent=1))
        shutil.rmtree(root / version, ignore_errors=True)
        partial.rename(root / version)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    newest = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    for name in set(newest) - {*newest[-KEPT:], version, live}:
        shutil.rmtree(root / name)


def state_folder(registry: Path, version: str) -> Path:
    """Where a bundle's state lies, if it is kept."""
    return registry / STATES / version


def open_state(registry: Path, version: str) -> TrainedState:
    """The state behind a bundle, every byte held to its digest."""
    folder = state_folder(registry, version)
    record = folder / "trained.json"
    if not record.exists():
        raise StateError(
            f"{folder} is not there, so there is nothing to train on from: bundle {version} was published without its "
            "training state, or elsewhere. Run once without --since"
        )
    written = json.loads(record.read_text())
    if written["format"] != FORMAT:
        raise StateError(f"{record} has format {written['format']}, this release reads {FORMAT}: run without --since")
    found = _hashes(folder)
    if found != {name: list(entry) for name, entry in written["files"].items()}:
        names = sorted(name for name in {**found, **written["files"]} if found.get(name) != written["files"].get(name))
        raise StateError(f"{folder}: {', '.join(names[:3])} differ from trained.json: run once without --since")
    return TrainedState(folder=folder, version=version, dates=tuple(written["dates"]))


def _hashes(folder: Path) -> dict[str, list]:
    """[bytes, sha256] of every file but the record."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "trained.json":
            found[str(path.relative_to(folder))] = [path.stat().st_size, file_sha256(path)]
    return found
