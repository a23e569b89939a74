"""A bundle's manifest: name, size and sha256 of every file, and a digest of its own.

Parsers do not detect damage, so every byte is hashed before any of them opens a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from features.digests import content_sha256, file_sha256
from features.durable import write_durably

MANIFEST_FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"

_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactError(Exception):
    """A bundle or a registry that must not be used; the message names bundle, file, what was found, and the cure."""


def verify_files(folder: Path, version: str, listed: dict[str, dict[str, Any]]) -> None:
    """Every file there with its size and hash, and nothing else; raises ArtifactError naming the first that is not."""
    cure = "do not use this bundle: roll back, or publish it again"
    present = set(walk(folder, f"bundle {version}")) - {MANIFEST, MANIFEST_DIGEST}
    if missing := sorted(listed.keys() - present):
        raise ArtifactError(f"bundle {version}: missing {', '.join(missing)}; {cure}")
    if extra := sorted(present - listed.keys()):
        raise ArtifactError(f"bundle {version}: {', '.join(extra)} not in the manifest; {cure}")
    for name, expected in listed.items():
        path = folder / name
        if (size := path.stat().st_size) != expected["size"]:
            raise ArtifactError(f"bundle {version}: {name} has {size} bytes, expected {expected['size']}; {cure}")
        if (found := file_sha256(path)) != expected["sha256"]:
            raise ArtifactError(f"bundle {version}: {name} has sha256 {found}, expected {expected['sha256']}; {cure}")


def read_manifest(folder: Path, version: str) -> dict[str, Any]:
    """The manifest, once its own digest, its shape and every path in it have been checked."""
    for name in (MANIFEST, MANIFEST_DIGEST):
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise ArtifactError(f"bundle {version}: no plain file {name}; publish the bundle again")
    raw = (folder / MANIFEST).read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    expected = (folder / MANIFEST_DIGEST).read_bytes().decode("ascii", "replace")
    if expected != found + "\n":
        raise ArtifactError(
            f"bundle {version}: {MANIFEST} has sha256 {found}, {MANIFEST_DIGEST} expects {expected.strip()!r}; "
            "publish the bundle again"
        )
    try:
        manifest = json.loads(raw)
        _check(manifest, version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"bundle {version}: {MANIFEST} is malformed ({error!r}); publish the bundle again"
        ) from error
    return manifest


def _check(manifest: dict[str, Any], version: str) -> None:
    if manifest["format"] != MANIFEST_FORMAT:
        raise ValueError(f"format {manifest['format']}, this release reads {MANIFEST_FORMAT}")
    if manifest["version"] != version:
        raise ValueError(f"it is the manifest of {manifest['version']!r}, in a folder named {version!r}")
    if not isinstance(manifest["meta"], dict) or not isinstance(manifest["created"], str):
        raise TypeError("meta must be an object and created a string")
    for name, entry in manifest["files"].items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or set(name) & set("\\\0"):
            raise ValueError(f"it names {name!r}, which is not a plain path inside the bundle")
        if not isinstance(entry["size"], int) or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"the entry of {name} is {entry}")


def write_manifest(
    staged: Path, version: str, now: datetime, meta: Mapping[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """The manifest and its digest; raises ArtifactError when `meta` is no JSON."""
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": version,
        "created": now.isoformat(timespec="milliseconds"),
        "meta": dict(meta),
        "content_sha256": content_sha256({name: entry["sha256"] for name, entry in files.items()}),
        "files": files,
    }
    try:
        raw = json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"meta of bundle {version} cannot be written as JSON: {error}") from error
    write_durably(staged / MANIFEST, raw)
    write_durably(staged / MANIFEST_DIGEST, (hashlib.sha256(raw).hexdigest() + "\n").encode())


def check_bytes(raw: bytes, version: str, name: str, expected: dict[str, Any]) -> None:
    """Raises ArtifactError when they are not those of the manifest's entry."""
    if (found := hashlib.sha256(raw).hexdigest()) != expected["sha256"]:
        raise ArtifactError(
            f"bundle {version}: {name} has sha256 {found}, expected {expected['sha256']}: do not use it"
        )


def walk(folder: Path, owner: str) -> list[str]:
    """Relative paths of the plain files below `folder`, sorted; a link or a device is refused, not followed."""
    names = []
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ArtifactError(f"{owner}: {path.relative_to(folder)} is a link or special; use plain files only")
            if stat.S_ISREG(mode):
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def measure(path: Path) -> dict[str, Any]:
    """Size and hash of a staged file, once its bytes are on disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def short_hash(files: dict[str, dict[str, Any]]) -> str:
    """Of names, sizes and hashes: the last part of a default version."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
