"""Files that are whole after a crash: written, flushed to disk, then put in place by a rename."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def replace(path: Path, raw: bytes) -> None:
    """Put `raw` at `path`: a reader, and a restart at any instant, finds the old bytes or the new ones."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(fresh, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names created, renamed or removed in `folder` are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path) -> dict[str, str]:
    """Flush every file below `folder` to disk; sha256 by relative path."""
    digests = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
        sync_folder(Path(parent))
    return digests


def verify(folder: Path, digests: dict[str, str]) -> None:
    """Raise ValueError, naming the file, unless `folder` holds what `seal` saw: before any parser opens a file."""
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; restore the folder from a copy")
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"{path} has sha256 {found}, expected {expected}; restore the folder from a copy")
