"""Bundles: everything one version of the feed needs, in one verified folder, and the LIVE pointer that names one.

ROOT/bundles/VERSION/{files..., manifest.json, manifest.sha256}, ROOT/LIVE (one line: the version), ROOT/history.jsonl
(who was live when), ROOT/.staging/ (half-built bundles). Parsers do not detect damage, so every byte is hashed
before any of them opens a file; a bundle and LIVE change only by an atomic rename of something already on disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

from features.digests import content_sha256
from features.durable import DiskError, disk_told, fsync_folder, newest_mtime, write_durably
from features.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    ArtifactError,
    check_bytes,
    measure,
    read_manifest,
    short_hash,
    verify_files,
    walk,
    write_manifest,
)

__all__ = ["ArtifactError", "Bundle", "LiveMovedError", "Registry", "doomed", "fallbacks"]

STAGING_MAX_AGE_S = 3600
"""A staging folder without a write for this long belongs to a dead publisher: the next publish removes it. A bundle so
young that was never live may be about to be: pruning leaves it."""

VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_URL = re.compile(r"[a-z][a-z0-9]+:/")  # a Path keeps one slash of two


class LiveMovedError(ArtifactError):
    """LIVE is not the version that a candidate was judged against; the candidate stays published, LIVE as it is."""


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


def fallbacks(history: list[dict[str, str]], current: str | None) -> list[str]:
    """Versions to roll back to, oldest first: promotions push, a rollback pops down to where it went."""
    stack: list[str] = []
    for entry in history:
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


def doomed(created: Mapping[str, str], live: str | None, history: list[dict[str, str]], keep: int) -> list[str]:
    """What pruning to the newest `keep` versions removes, of versions and when they were made (ISO 8601).

    LIVE, the version that rollback goes to, and one made within the hour that was never live (its publisher may be
    about to make it so) stay whatever `keep` says."""
    if keep < 0:
        raise ValueError(f"keep {keep}: give 0 or more")
    been_live, young = {entry["version"] for entry in history}, time.time() - STAGING_MAX_AGE_S
    by_age = sorted(created, key=lambda version: created[version])
    kept = {live, *by_age[max(len(by_age) - keep, 0) :]}
    kept |= set([v for v in fallbacks(history, live) if v in created][-1:])
    kept |= {v for v in created if v not in been_live and datetime.fromisoformat(created[v]).timestamp() > young}
    return [version for version in by_age if version not in kept]


class Registry:
    """All published versions under one folder, and which of them is live."""

    def __init__(self, root: str | Path) -> None:
        """Raises ValueError for a URL: those are `features.remote`'s."""
        if _URL.match(str(root)):
            raise ValueError(f"registry {root}: give a folder here, and `reelrank registry pull` into it from a URL")
        self.root = Path(root).absolute()
        self._bundles = self.root / "bundles"
        self._staging = self.root / ".staging"
        self._live = self.root / "LIVE"
        self._history = self.root / "history.jsonl"

    def stage(self) -> Path:
        """A private empty folder to write a bundle's files into; `publish` takes it from there."""
        folder = self._staging / uuid.uuid4().hex
        with disk_told(self.root):
            folder.mkdir(parents=True)
        return folder

    def publish(self, staged: Path, *, version: str | None = None, meta: Mapping[str, Any]) -> str:
        """Seal a staged folder with a manifest and move it, complete and on disk, to bundles/VERSION."""
        staged = self._mine(staged)
        self._collect_leftovers(keep=staged)
        files = {name: measure(staged / name) for name in walk(staged, str(staged))}
        if not files:
            raise ArtifactError(f"{staged} holds no file: write the bundle's files there before publish()")
        if clash := files.keys() & {MANIFEST, MANIFEST_DIGEST}:
            raise ArtifactError(f"{staged} already holds {sorted(clash)}: these names are written by publish() only")
        now = datetime.now(UTC)
        version = version or f"{now:%Y%m%dT%H%M%S}-{short_hash(files)}"
        self._folder(version)  # before anything is written under a name that cannot be one
        with disk_told(self.root):
            write_manifest(staged, version, now, meta, files)
        self._move_in(staged, version)
        return version

    def adopt(self, staged: Path, version: str) -> None:
        """Publish a staged copy of a bundle that another registry has sealed, once every byte of it is verified."""
        staged = self._mine(staged)
        verify_files(staged, version, read_manifest(staged, version)["files"])
        with disk_told(self.root):
            for name in walk(staged, str(staged)):
                measure(staged / name)
        self._move_in(staged, version)

    def set_live(self, version: str, *, if_live: str | EllipsisType | None = ...) -> None:
        """Point LIVE at a version, after verifying it whole. `if_live`: only while LIVE still names this one (None: no
        version yet); raises LiveMovedError when another publisher was faster."""
        with self._lock():
            if if_live is not ... and (now := self.live()) != if_live:
                raise LiveMovedError(
                    f"LIVE of {self.root} moved from {if_live} to {now} while {version} was judged against {if_live}: "
                    "publish again, which judges it against the new one"
                )
            self._promote(version, "promote")

    def live(self) -> str | None:
        """The live version, or None when nothing was promoted yet."""
        try:
            version = self._live.read_text().strip()
        except FileNotFoundError:
            return None
        if not VERSION.fullmatch(version):
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
            for version in reversed(fallbacks(self.history(), current)):
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

    def describe(self, version: str) -> Bundle:
        """The version as its manifest tells it; its files are not hashed, so serve what `open` returns."""
        folder = self._folder(version)
        if not folder.is_dir() or folder.is_symlink():
            raise ArtifactError(f"bundle {version} is not in {self._bundles}: published are {self.list()}")
        manifest = read_manifest(folder, version)
        return Bundle(folder, version, manifest["created"], manifest["meta"], manifest["files"])

    def prune(self, keep: int, *, dry_run: bool = False) -> list[str]:
        """Remove what `doomed` names; returns it."""
        with self._lock():
            created = {version: self.describe(version).created for version in self.list()}
            found = doomed(created, self.live(), self.history(), keep)
            for version in [] if dry_run else found:
                aside = self._staging / f"pruned-{uuid.uuid4().hex}"  # gone at once for whoever lists or opens
                with disk_told(self.root):
                    self._staging.mkdir(exist_ok=True)
                    os.rename(self._bundles / version, aside)
                    shutil.rmtree(aside)
        return found

    def read_text(self, version: str, name: str) -> str:
        """A file of a version; its bytes are as the manifest has them."""
        bundle = self.describe(version)
        raw = bundle.path(name).read_bytes()
        check_bytes(raw, version, name, bundle.files[name])
        return raw.decode()

    def open(self, version: str | None = None) -> Bundle:
        """The named (or live) version, verified: sizes, hashes, nothing missing, nothing extra, no link."""
        version = version or self.live()
        if version is None:
            raise ArtifactError(f"{self.root} has no live bundle: run set_live (published: {self.list()})")
        bundle = self.describe(version)
        verify_files(bundle.folder, version, bundle.files)
        return bundle

    def _folder(self, version: str) -> Path:
        if not VERSION.fullmatch(version):
            raise ArtifactError(f"{version!r} is not a version name: use letters, digits, dot, dash and underscore")
        return self._bundles / version

    def _promote(self, version: str, action: str) -> None:
        """History first, LIVE second: killed in between, the log has one promotion too many; `fallbacks` sees."""
        self.open(version)
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = json.dumps({"at": at, "action": action, "version": version})
        cut = self._history.exists() and not self._history.read_bytes().endswith(b"\n")
        fresh = self.root / f".LIVE-{uuid.uuid4().hex}"
        try:
            with disk_told(self.root):
                with self._history.open("a") as log:
                    log.write(("\n" if cut else "") + entry + "\n")
                    log.flush()
                    os.fsync(log.fileno())
                write_durably(fresh, f"{version}\n".encode())
                os.replace(fresh, self._live)
                fsync_folder(self.root)
        except DiskError:
            fresh.unlink(missing_ok=True)
            raise

    def _mine(self, staged: Path) -> Path:
        staged = staged.absolute()
        if staged.parent != self._staging or not staged.is_dir():
            raise ArtifactError(f"{staged} is not a staging folder of {self.root}: get one from stage()")
        return staged

    def _move_in(self, staged: Path, version: str) -> None:
        """One rename makes a sealed folder a version, once all of it is on disk."""
        try:
            with disk_told(self.root):
                self._bundles.mkdir(parents=True, exist_ok=True)
                for folder, _, _ in os.walk(staged):
                    fsync_folder(Path(folder))
                os.rename(staged, self._folder(version))
                fsync_folder(self._bundles)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ArtifactError(
                f"bundle {version} is already published; bundles never change: choose another version"
            ) from error

    def _collect_leftovers(self, keep: Path) -> None:
        oldest = time.time() - STAGING_MAX_AGE_S
        for folder in self._staging.iterdir():
            if folder != keep and newest_mtime(folder) < oldest:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One promotion at a time, across processes; the kernel lets go of it when the holder dies."""
        with disk_told(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            handle = (self.root / ".lock").open("a")
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
