"""Bundles: everything one version of the feed needs, in one verified folder, and the LIVE pointer that names one.

ROOT/bundles/VERSION/{files..., manifest.json, manifest.sha256}, ROOT/LIVE (one line: the version), ROOT/history.jsonl
(who was live when), ROOT/.staging/ (half-built bundles). Parsers do not detect damage, so every byte is hashed
before any of them opens a file; a bundle and LIVE change only by an atomic rename of something already on disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from features.digests import content_sha256

MANIFEST_FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
STAGING_MAX_AGE_S = 3600
"""A staging folder without a write for this long belongs to a dead publisher: the next publish removes it."""

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactError(Exception):
    """A bundle or a registry that must not be used; the message names bundle, file, what was found, and the cure."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """One verified version. Only `Registry.open` makes these, so holding one means every byte was checked."""

    folder: Path
    version: str
    created: str
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def content_sha256(self) -> str:
        """Bundles of equal files have the same, whenever and wherever they were made; it stands in the manifest."""
        return content_sha256({name: entry["sha256"] for name, entry in self.files.items()})

    def path(self, name: str) -> Path:
        """The file `name`, which must be listed in the manifest."""
        if name not in self.files:
            listed = ", ".join(self.files)
            raise ArtifactError(f"bundle {self.version} has no file {name!r}; it lists: {listed}")
        return self.folder / name


class Registry:
    """All published versions under one folder, and which of them is live."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._bundles = self.root / "bundles"
        self._staging = self.root / ".staging"
        self._live = self.root / "LIVE"
        self._history = self.root / "history.jsonl"

    def stage(self) -> Path:
        """A private empty folder to write a bundle's files into; `publish` takes it from there."""
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def publish(self, staged: Path, *, version: str | None = None, meta: Mapping[str, Any]) -> str:
        """Seal a staged folder with a manifest and move it, complete and on disk, to bundles/VERSION."""
        self._bundles.mkdir(parents=True, exist_ok=True)
        staged = staged.absolute()
        if staged.parent != self._staging or not staged.is_dir():
            raise ArtifactError(f"{staged} is not a staging folder of {self.root}: get one from stage()")
        self._collect_leftovers(keep=staged)
        files = {name: _measure(staged / name) for name in _walk(staged, str(staged))}
        if not files:
            raise ArtifactError(f"{staged} holds no file: write the bundle's files there before publish()")
        if clash := files.keys() & {MANIFEST, MANIFEST_DIGEST}:
            raise ArtifactError(f"{staged} already holds {sorted(clash)}: these names are written by publish() only")
        now = datetime.now(UTC)
        version = version or f"{now:%Y%m%dT%H%M%S}-{_short_hash(files)}"
        target = self._folder(version)
        _write_manifest(staged, version, now, meta, files)
        for folder, _, _ in os.walk(staged):
            _fsync_folder(Path(folder))
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ArtifactError(
                f"bundle {version} is already published; bundles never change: choose another version"
            ) from error
        _fsync_folder(self._bundles)
        return version

    def set_live(self, version: str) -> None:
        """Point LIVE at a version, after verifying it whole."""
        with self._lock():
            self._promote(version, "promote")

    def live(self) -> str | None:
        """The live version, or None when nothing was promoted yet."""
        try:
            version = self._live.read_text().strip()
        except FileNotFoundError:
            return None
        if not _VERSION.fullmatch(version):
            raise ArtifactError(
                f"{self._live} holds {version[:80]!r}, not a version: run set_live with one of {self.list()}"
            )
        return version

    def history(self) -> list[dict[str, str]]:
        """Promotions and rollbacks, oldest first: {at, action, version}. A line cut by a crash is not an entry."""
        if not self._history.exists():
            return []
        entries = []
        for line in self._history.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            entries.append(entry)
        return entries

    def rollback(self) -> str:
        """Point LIVE at the version that was live before the present one and still verifies; returns it."""
        with self._lock():
            current = self.live()
            refused = []
            for version in reversed(self._before(current)):
                try:
                    self._promote(version, "rollback")
                except ArtifactError as error:
                    refused.append(str(error))
                else:
                    return version
        reasons = "; ".join(refused) or "no other version was live before it"
        raise ArtifactError(
            f"cannot roll back from {current}: {reasons}. Published: {self.list()}; choose one with set_live"
        )

    def list(self) -> list[str]:
        """Published versions by name, which for default names is by time."""
        if not self._bundles.is_dir():
            return []
        return sorted(entry.name for entry in self._bundles.iterdir() if entry.is_dir())

    def open(self, version: str | None = None) -> Bundle:
        """The named (or live) version, verified: sizes, hashes, nothing missing, nothing extra, no link."""
        version = version or self.live()
        if version is None:
            raise ArtifactError(f"{self.root} has no live bundle: run set_live (published: {self.list()})")
        folder = self._folder(version)
        if not folder.is_dir() or folder.is_symlink():
            raise ArtifactError(f"bundle {version} is not in {self._bundles}: published are {self.list()}")
        manifest = _read_manifest(folder, version)
        _verify_files(folder, version, manifest["files"])
        return Bundle(folder, version, manifest["created"], manifest["meta"], manifest["files"])

    def _folder(self, version: str) -> Path:
        if not _VERSION.fullmatch(version):
            raise ArtifactError(f"{version!r} is not a version name: use letters, digits, dot, dash and underscore")
        return self._bundles / version

    def _promote(self, version: str, action: str) -> None:
        """History first, LIVE second: killed in between, the log has one promotion too many, and `_before` sees it."""
        self.open(version)
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = json.dumps({"at": at, "action": action, "version": version})
        cut = self._history.exists() and not self._history.read_bytes().endswith(b"\n")
        with self._history.open("a") as log:
            log.write(("\n" if cut else "") + entry + "\n")
            log.flush()
            os.fsync(log.fileno())
        fresh = self.root / f".LIVE-{uuid.uuid4().hex}"
        _write_durably(fresh, f"{version}\n".encode())
        os.replace(fresh, self._live)
        _fsync_folder(self.root)

    def _before(self, current: str | None) -> list[str]:
        """Versions to fall back to, oldest first: promotions push, a rollback pops down to where it went."""
        stack: list[str] = []
        for entry in self.history():
            version = entry["version"]
            if entry["action"] == "rollback" and version in stack:
                while stack[-1] != version:
                    stack.pop()
            else:
                stack.append(version)
        if current in stack:
            last = len(stack) - 1 - stack[::-1].index(current)
            stack = stack[:last]
        return [version for version in dict.fromkeys(reversed(stack)) if version != current][::-1]

    def _collect_leftovers(self, keep: Path) -> None:
        oldest = time.time() - STAGING_MAX_AGE_S
        for folder in self._staging.iterdir():
            if folder != keep and _newest_mtime(folder) < oldest:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One promotion at a time, across processes; the kernel lets go of it when the holder dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _verify_files(folder: Path, version: str, listed: dict[str, dict[str, Any]]) -> None:
    cure = "do not use this bundle: roll back, or publish it again"
    present = set(_walk(folder, f"bundle {version}")) - {MANIFEST, MANIFEST_DIGEST}
    if missing := sorted(listed.keys() - present):
        raise ArtifactError(f"bundle {version}: missing {', '.join(missing)}; {cure}")
    if extra := sorted(present - listed.keys()):
        raise ArtifactError(f"bundle {version}: {', '.join(extra)} not in the manifest; {cure}")
    for name, expected in listed.items():
        path = folder / name
        if (size := path.stat().st_size) != expected["size"]:
            raise ArtifactError(f"bundle {version}: {name} has {size} bytes, expected {expected['size']}; {cure}")
        if (found := _sha256(path)) != expected["sha256"]:
            raise ArtifactError(f"bundle {version}: {name} has sha256 {found}, expected {expected['sha256']}; {cure}")


def _read_manifest(folder: Path, version: str) -> dict[str, Any]:
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
        _check_manifest(manifest, version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"bundle {version}: {MANIFEST} is malformed ({error!r}); publish the bundle again"
        ) from error
    return manifest


def _check_manifest(manifest: dict[str, Any], version: str) -> None:
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


def _write_manifest(
    staged: Path, version: str, now: datetime, meta: Mapping[str, Any], files: dict[str, dict[str, Any]]
) -> None:
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
    _write_durably(staged / MANIFEST, raw)
    _write_durably(staged / MANIFEST_DIGEST, (hashlib.sha256(raw).hexdigest() + "\n").encode())


def _walk(folder: Path, owner: str) -> list[str]:
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


def _measure(path: Path) -> dict[str, Any]:
    """Size and hash of a staged file, once its bytes are on disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _short_hash(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]


def _write_durably(path: Path, raw: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _newest_mtime(folder: Path) -> float:
    """Of the folder and all in it; now where something vanished meanwhile: its publisher has just renamed it."""
    try:
        times = [folder.lstat().st_mtime]
        for parent, folders, files in os.walk(folder):
            times += [Path(parent, name).lstat().st_mtime for name in [*folders, *files]]
    except FileNotFoundError:
        return time.time()
    return max(times)
