"""Files that are on disk when a call returns, and disks that do not take them told in a way a person can mend."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CURES = {
    errno.ENOSPC: "the disk is full: free space there (`reelrank registry prune`), or publish elsewhere (--registry)",
    errno.EDQUOT: "the quota is used up: free space there (`reelrank registry prune`), or publish elsewhere "
    "(--registry)",
    errno.EFBIG: "the file is larger than the system or `ulimit -f` allows: raise the limit",
    errno.EROFS: "the file system is read-only: mount it writable, or publish elsewhere (--registry)",
    errno.EACCES: "this user may not write there: mend its permissions, or publish elsewhere (--registry)",
    errno.EPERM: "this user may not write there: mend its permissions, or publish elsewhere (--registry)",
    errno.EIO: "the disk failed: look at the system's log, and publish elsewhere (--registry)",
}


class DiskError(Exception):
    """A file could not be written; the message names it and the cure."""


@contextmanager
def disk_told(root: Path) -> Iterator[None]:
    """An OSError that a full, read-only, forbidden or broken disk raises below `root` becomes a DiskError; any other
    passes."""
    try:
        yield
    except OSError as error:
        told = _told(error, root)
        if told is None:
            raise
        raise DiskError(told) from error


def write_durably(path: Path, raw: bytes) -> None:
    """The file's bytes are on disk on return; its name is once the folder is, too (`fsync_folder`)."""
    try:
        with path.open("wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        error.filename = str(path)  # a write that fails does not say where
        raise


def fsync_folder(folder: Path) -> None:
    """The names in the folder are on disk on return."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_mtime(folder: Path) -> float:
    """Of the folder and all in it; now where something vanished meanwhile: its publisher has just renamed it."""
    try:
        times = [folder.lstat().st_mtime]
        for parent, folders, files in os.walk(folder):
            times += [Path(parent, name).lstat().st_mtime for name in [*folders, *files]]
    except FileNotFoundError:
        return time.time()
    return max(times)


def _told(error: OSError, root: Path) -> str | None:
    if isinstance(error, shutil.Error):  # copytree's: (source, target, reason) of each file, without an errno
        _, target, reason = error.args[0][0]
        for number, cure in _CURES.items():
            if f"[Errno {number}]" in str(reason):
                return f"{target} could not be written ({os.strerror(number)}): {cure}"
        return None
    number = error.errno
    if number is None and "written" in str(error):  # numpy's tofile tells counts alone
        number = errno.ENOSPC
    if number not in _CURES:
        return None
    return f"{error.filename or root} could not be written ({os.strerror(number)}): {_CURES[number]}"
