"""Files wherever they lie: those of this machine by pathlib, everything else through fsspec in the same manners.

`location` is the one way in: s3://, gs://, hdfs://, memory://, http:// and whatever else fsspec knows become a
RemotePath, file:// and plain paths a Path, which nothing stands in front of.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs",
            "http": "aiohttp requests", "https": "aiohttp requests", "sftp": "paramiko"}  # fmt: skip
"""What pip must install for a protocol; none of them is needed for local files. hdfs:// needs Hadoop's libhdfs."""
IN_ONE_PROCESS = ("memory",)
"""File systems that live in one process: work on them cannot be spread over others."""
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "mtime", "last_modified", "LastModified", "updated")

_COLLAPSED = re.compile(r"^([a-z][a-z0-9+]+):/([^/])")
"""What is left of a URL that has been a Path on its way."""


class StorageError(OSError):
    """A place that cannot be reached; the message names it and says what is missing."""


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """A file or folder behind fsspec, with the part of pathlib's manners that reading and writing logs needs."""

    url: str
    """PROTOCOL://..., without a slash at its end."""

    @property
    def protocol(self) -> str:
        return self.url.split("://", 1)[0]

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(f"{self.protocol}://{self._pure.parent}")

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def open(self, mode: str = "rb") -> IO[Any]:
        return cast(IO[Any], self._fs.open(self._path, mode))

    def read_text(self) -> str:
        with self.open() as handle:
            return handle.read().decode()

    def write_text(self, text: str) -> None:
        self._fs.pipe_file(self._path, text.encode())

    def mkdir(self) -> None:
        """With its parents, where the file system has folders at all."""
        self._fs.makedirs(self._path, exist_ok=True)

    def unlink(self) -> None:
        self._fs.rm_file(self._path)

    def exists(self) -> bool:
        return self._fs.exists(self._path)

    def is_file(self) -> bool:
        return self._fs.isfile(self._path)

    def is_dir(self) -> bool:
        return self._fs.isdir(self._path)

    def glob(self, pattern: str) -> list[RemotePath]:
        """Files and folders below, `*` within one name; no `**`."""
        found: list[RemotePath] = [self]
        for part in pattern.split("/"):
            found = [below for folder in found for below in folder._below() if fnmatch(below.name, part)]
        return found

    def info(self) -> dict[str, Any]:
        """What the file system says of a file: size, and most of the time what changes with its content."""
        return self._fs.info(self._path)

    def _below(self) -> list[RemotePath]:
        # Named from here: a listing leaves out the host.
        try:
            return [self / path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.url.split("://", 1)[1])

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return _file_system(self.protocol, self.url)

    @property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.url))


Location = Path | RemotePath


def location(at: str | Path | RemotePath) -> Location:
    """A path or URL as something to read from and write to; raises StorageError when its package is missing."""
    if isinstance(at, RemotePath):
        return at
    text = _COLLAPSED.sub(r"\1://\2", str(at))
    if text.startswith("file://"):
        return Path("/" + text.removeprefix("file://").lstrip("/"))
    if "://" not in text:
        return Path(at).absolute()
    remote = RemotePath(text.rstrip("/"))
    _file_system(remote.protocol, text)
    return remote


def shared_between_processes(at: Location) -> bool:
    """Whether another process of this machine sees the same files there."""
    return not (isinstance(at, RemotePath) and at.protocol in IN_ONE_PROCESS)


def stamp(file: Location) -> dict[str, Any]:
    """Size, and what changes when the content does: equal stamps mean that a file need not be read again.

    `version` is null where nothing tells a changed file from an unchanged one of the same size.
    """
    if isinstance(file, Path):
        found = file.stat()
        return {"size": found.st_size, "version": found.st_mtime_ns}
    info = file.info()
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), None)
    return {"size": info["size"], "version": version}


def sha256_of(file: Location) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def writing(file: Location) -> IO[bytes]:
    """A new file, open for writing; its folders are made."""
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    else:
        file.parent.mkdir()
    return file.open("wb")


def upload(here: Path, there: RemotePath) -> None:
    """A local file to another file system; folders are made."""
    there.parent.mkdir()
    there._fs.put_file(str(here), there._path)


def copy_or_link(source: Path, target: Path) -> None:
    """The same file under another name: a hard link where the file system has them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove_tree(folder: Location) -> None:
    """Whatever is there, or nothing."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder._fs.rm(folder._path, recursive=True)


def exchange(fresh: Path, target: Path) -> None:
    """Put a folder in the place of another in one step, so that no crash finds neither; the old one is then at `fresh`.

    Linux 3.15 and macOS 10.12 have such a step. Elsewhere (some network file systems) it is two renames, between which
    a crash leaves the old folder under `fresh`'s name with `.old` at its end.
    """
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchanged(fresh, target):
        old = fresh.with_name(f"{fresh.name}.old")
        os.rename(target, old)
        os.rename(fresh, target)
        os.rename(old, fresh)


def _exchanged(first: Path, second: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    else:
        return False
    if failed and (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(second))
    return not failed


def _file_system(protocol: str, url: str) -> fsspec.AbstractFileSystem:
    try:
        found, _ = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        cure = f"pip install {package}" if package else "see fsspec's documentation for what it needs"
        raise StorageError(f"{url}: {protocol}:// needs a package that is not installed ({error}): {cure}") from error
    except ValueError as error:
        raise StorageError(f"{url}: no file system is called {protocol}:// ({error})") from error
    found.invalidate_cache()  # other processes write too
    return found
