"""What a stage leaves behind to be known by: RUN/stages/NAME.json, written whole and last.

A stage counts as done when its record is finished, the record's fingerprint is that of today's inputs and
configuration, and every file it wrote still has the content it had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.hashes import FileHash, Hashes, write_json

RECORD_FORMAT = 1
SHOWN_CHANGES = 3
"""Fields of the configuration that a reason names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """One execution of a stage."""

    stage: str
    fingerprint: str
    """Of the stage's format, its configuration and the content of its inputs."""
    format: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Digest of each input."""
    input_bytes: int
    started: str
    wall_s: float | None = None
    """None: it was begun and not finished."""
    rows: int | None = None
    note: str = ""
    outputs: dict[str, tuple[int, str]] | None = None
    """(bytes, sha256) of every file written, by its path below the run's folder."""
    result: dict[str, Any] | None = None
    """What else the stage has to say, such as the bundle's version."""

    def save(self, folder: Path) -> None:
        """Replace the stage's record in one piece."""
        write_json(folder / f"{self.stage}.json", {"record_format": RECORD_FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Path, stage: str) -> StageRecord | None:
        """The stage's record; None when there is none, or none that this release reads."""
        try:
            written = json.loads((folder / f"{stage}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(written, dict) or written.pop("record_format", None) != RECORD_FORMAT:
            return None
        outputs = written["outputs"]
        written["outputs"] = outputs and {name: tuple(entry) for name, entry in outputs.items()}
        return cls(**written)

    def damage(self, root: Path, hashes: Hashes) -> str | None:
        """The first output that is not what it was; None when all are."""
        for name, (size, sha256) in (self.outputs or {}).items():
            path = root / name
            if not path.is_file():
                return f"{name} is gone"
            if hashes.of({name: path})[name] != FileHash(size, sha256):
                return f"{name} is not what was written"
        return None


def fingerprint(stage: str, format: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 of all that decides what a stage writes."""
    return hashlib.sha256(json.dumps([stage, format, config, inputs], sort_keys=True).encode()).hexdigest()


def described(value: Any) -> Any:
    """A configuration as JSON has it; classes keep their names, for fields alone do not tell two kinds apart."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: described(getattr(value, f.name)) for f in fields(value)}
        return {"is": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a configuration holds {value!r}, which JSON has no place for")


def changes(before: Any, after: Any) -> str:
    """The first fields that differ between two described configurations, as `path: old -> new`."""
    old, new = dict(_flat(before)), dict(_flat(after))
    differ = [path for path in {**old, **new} if old.get(path, _NONE) != new.get(path, _NONE)]
    shown = [f"{path}: {old.get(path, _NONE)} -> {new.get(path, _NONE)}" for path in differ[:SHOWN_CHANGES]]
    more = len(differ) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


_NONE = "-"


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, entry in entries for leaf in _flat(entry, f"{path}.{key}" if path else str(key))]
    return [(path, value)]
