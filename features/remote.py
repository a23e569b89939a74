"""A registry on an object store, or anywhere fsspec reaches: the same bundles, and a LIVE that no two publishers share.

URL/bundles/VERSION/{files..., manifest.sha256, manifest.json}   the manifest is put last: without it, no version
URL/promotions/00000012.json                                     {at, action, version}; the highest number is live

An object store renames nothing and appends to nothing, but it can put one object if none of that name is there
(`If-None-Match: *` on S3, `ifGenerationMatch=0` on GCS, a hard link on a local disk). So LIVE is a numbered list:
whoever puts number n + 1 has seen n as the live one, and of two publishers who both try, one is told that it was too
late. Servers read no remote file: `pull` copies a version into a local registry, which verifies every byte before
anything parses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from features.artifacts import Bundle, LiveMovedError, Registry, doomed, fallbacks
from features.durable import disk_told
from features.manifest import MANIFEST, MANIFEST_DIGEST, ArtifactError, check_bytes, read_manifest


class RemoteRegistry:
    """Versions below a URL (`s3://bucket/path`, `gs://..`, `file:///..`, `memory://..`)."""

    def __init__(self, url: str) -> None:
        """Raises ValueError when nothing here speaks the URL's protocol."""
        try:
            self._fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"registry {url}: {error}; `pip install s3fs` speaks s3://, gcsfs gs://") from error
        self.url, self._root = url.rstrip("/"), path.rstrip("/")

    def list(self) -> list[str]:
        """Versions that were pushed whole, by name."""
        manifests = self._fs.glob(f"{self._root}/bundles/*/{MANIFEST}")
        return sorted(str(path).rsplit("/", 2)[1] for path in manifests)

    def history(self) -> list[dict[str, str]]:
        """Promotions and rollbacks, oldest first: {at, action, version}."""
        return [json.loads(self._fs.cat_file(path)) for path in self._promotions()]

    def live(self) -> str | None:
        """The version of the last promotion, or None."""
        paths = self._promotions()
        return json.loads(self._fs.cat_file(paths[-1]))["version"] if paths else None

    def describe(self, version: str) -> Bundle:
        """As its manifest tells it; its files stay where they are."""
        with tempfile.TemporaryDirectory() as folder:
            manifest = self._fetch_manifest(version, Path(folder))
        return Bundle(Path(self._folder(version)), version, manifest["created"], manifest["meta"], manifest["files"])

    def read_text(self, version: str, name: str) -> str:
        """A file of a version; its bytes are as the manifest has them."""
        entry = self.describe(version).files.get(name)
        if entry is None:
            raise ArtifactError(f"bundle {version} of {self.url} has no file {name!r}")
        raw = self._fs.cat_file(f"{self._folder(version)}/{name}")
        check_bytes(raw, version, name, entry)
        return raw.decode()

    def push(self, local: Registry, version: str | None = None, *, if_live: str | EllipsisType | None = ...) -> str:
        """Upload a version (default: the live one) and make it live; returns it. What is there already is not sent
        again, so a push that was cut off is repeated.

        `if_live`: only while this version is live there (None: none); raises LiveMovedError otherwise, and when
        another publisher promotes at the same moment. The version then stays, uploaded and not live."""
        bundle = local.open(version)
        raw = (bundle.folder / MANIFEST).read_bytes()
        there = f"{self._folder(bundle.version)}/{MANIFEST}"
        if not self._fs.exists(there):
            for name in [*bundle.files, MANIFEST_DIGEST]:
                self._put(bundle.folder / name, f"{self._folder(bundle.version)}/{name}")
            with contextlib.suppress(FileExistsError):  # another push of this version was faster
                self._create(there, raw)
        if self._fs.cat_file(there) != raw:
            raise ArtifactError(
                f"{self.url} holds another bundle named {bundle.version}: bundles never change, publish under a new "
                "name"
            )
        if self.live() != bundle.version:
            self._promote(bundle.version, "promote", if_live)
        return bundle.version

    def pull(self, local: Registry, version: str | None = None) -> str:
        """Copy a version (default: the live one, which then is live locally, too) into a local registry; returns it.
        Only what differs from nothing moves: a version that is there is not fetched again."""
        wanted = version or self.live()
        if wanted is None:
            raise ArtifactError(f"{self.url} has no live bundle: push one (pushed: {self.list()})")
        if wanted not in local.list():
            staged = local.stage()
            try:
                with disk_told(local.root):
                    self._fetch(wanted, staged)
                local.adopt(staged, wanted)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        if version is None and local.live() != wanted:
            local.set_live(wanted)
        return wanted

    def rollback(self) -> str:
        """Make the version live that was before the present one and is still here; returns it."""
        current, pushed = self.live(), self.list()
        target = next((v for v in reversed(fallbacks(self.history(), current)) if v in pushed), None)
        if target is None:
            raise ArtifactError(
                f"cannot roll back from {current}: no other pushed version was live before it: {pushed}"
            )
        self._promote(target, "rollback", current)
        return target

    def prune(self, keep: int, *, dry_run: bool = False) -> list[str]:
        """Remove what `features.artifacts.doomed` names; returns it. The manifest goes first: what is half removed is
        no version."""
        created = {version: self.describe(version).created for version in self.list()}
        found = doomed(created, self.live(), self.history(), keep)
        for version in [] if dry_run else found:
            self._fs.rm_file(f"{self._folder(version)}/{MANIFEST}")
            self._fs.rm(self._folder(version), recursive=True)
        return found

    def _folder(self, version: str) -> str:
        return f"{self._root}/bundles/{version}"

    def _promotions(self) -> list[str]:
        return sorted(str(path) for path in self._fs.glob(f"{self._root}/promotions/*.json"))

    def _promote(self, version: str, action: str, if_live: str | EllipsisType | None) -> None:
        paths = self._promotions()
        now = json.loads(self._fs.cat_file(paths[-1]))["version"] if paths else None
        if if_live is not ... and now != if_live:
            raise LiveMovedError(
                f"{self.url} has {now} live, {version} was judged against {if_live}: pull, and publish again"
            )
        number = int(Path(paths[-1]).stem) + 1 if paths else 1
        entry = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "action": action, "version": version}
        try:
            self._create(f"{self._root}/promotions/{number:08d}.json", json.dumps(entry).encode())
        except FileExistsError as error:
            raise LiveMovedError(
                f"another publisher made {self.live()} live on {self.url} while {version} was to be: pull, and publish "
                "again"
            ) from error

    def _fetch(self, version: str, staged: Path) -> None:
        manifest = self._fetch_manifest(version, staged)  # its names were checked: none leads out of the folder
        for name in manifest["files"]:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(f"{self._folder(version)}/{name}", str(staged / name))

    def _fetch_manifest(self, version: str, folder: Path) -> dict[str, Any]:
        for name in (MANIFEST, MANIFEST_DIGEST):
            try:
                (folder / name).write_bytes(self._fs.cat_file(f"{self._folder(version)}/{name}"))
            except FileNotFoundError as error:
                raise ArtifactError(f"bundle {version} is not on {self.url}: pushed are {self.list()}") from error
        return read_manifest(folder, version)

    def _put(self, source: Path, target: str) -> None:
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(source), target)

    def _create(self, path: str, raw: bytes) -> None:
        """One whole object, if none is there; else FileExistsError."""
        self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, raw, mode="create")
            return
        fresh = Path(f"{path}.{uuid.uuid4().hex}")  # fsspec's own would look first and write after
        try:
            fresh.write_bytes(raw)
            os.link(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def open_registry(where: str) -> Registry | RemoteRegistry:
    """A URL (`://` in it) or a local folder."""
    return RemoteRegistry(where) if "://" in where else Registry(where)
