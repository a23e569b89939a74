"""The step that makes an ingest count, and what stands on both sides of it.

On this machine all files of the new dataset are gathered in a folder beside OUT (untouched partitions as hard links),
which then takes OUT's place in one step of the file system. Elsewhere new files lie in OUT under names of their own,
and writing `ingest.json` is the step. A crash before it leaves the old dataset, a crash after it the new one.
"""

from __future__ import annotations

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.plan import Plan
from pipelines.ingest.tables import EVENTS_FILE, REPORT_FILE, IngestError, stored
from pipelines.storage import Location, copy_or_link, exchange, remove_tree, stamp, writing


def check_replaceable(out: Location) -> None:
    """Only an empty folder or an earlier ingest may be replaced: a mistyped path must not cost somebody their files."""
    if isinstance(out, Path):
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f".{out.name}.ingest-*/data.old"):  # killed between the two renames of `exchange`
            if not out.exists():
                old.rename(out)
    if (out / REPORT_FILE).exists():
        return
    left = [f for f in out.glob("*") if not f.name.startswith(".ingest-")] if out.is_dir() else []
    if left or out.is_file():
        raise IngestError(f"{out} holds something that no ingest wrote; choose an empty or a new folder")


@contextmanager
def work_folder(out: Location) -> Iterator[Location]:
    """A folder for the pieces, gone afterwards; on this machine also what killed ingests left of theirs."""
    if not isinstance(out, Path):
        work = out / f".ingest-{uuid.uuid4().hex}"
        try:
            yield work
        finally:
            remove_tree(work)
        return
    for left in out.parent.glob(f".{out.name}.ingest-*"):
        _remove_if_abandoned(left)
    folder = out.parent / f".{out.name}.ingest-{uuid.uuid4().hex}"
    (folder / "data").mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of a dead owner's
        try:
            yield folder
        finally:
            remove_tree(folder)


def keep_untouched(
    plan: Plan, written: dict[str, str], days: dict[str, dict[str, int]], work: Location, out: Location
) -> dict[str, str]:
    """Hashes of the files that stay: of tables that are whole, and of days that were not opened. A file that was made
    again and came out the same stays too, with its time of change."""
    kept = {}
    for name, sha256 in plan.hashes.items():
        day = EVENTS_FILE.fullmatch(name)
        table = "events" if day else name.removeprefix("quarantine/").removesuffix(".parquet")
        found = plan.tables.get(table)
        if name in written:
            stays = written[name] == sha256 and name not in plan.damaged
        elif found is None:
            stays = False
        else:
            stays = day[1] in days if day else found.whole
        if stays:
            kept[name] = sha256
            if isinstance(work, Path) and isinstance(out, Path):
                (work / "data" / name).unlink(missing_ok=True)
                copy_or_link(out / name, work / "data" / name)
    return kept


def stamps(work: Location, out: Location, sha256: dict[str, str]) -> dict[str, Any]:
    """Stamps of the files of the dataset, for the next plan to trust."""
    root = work / "data" if isinstance(work, Path) else out
    return {name: stamp(stored(root, name, digest)) for name, digest in sha256.items()}


def commit(report: str, plan: Plan, sha256: dict[str, str], work: Location, out: Location) -> None:
    """Make the new dataset the one at `out`."""
    if isinstance(work, Path) and isinstance(out, Path):
        fresh = work / "data"
        (fresh / REPORT_FILE).write_text(report)
        exchange(fresh, out)
    else:
        (out / REPORT_FILE).write_text(report)
        listed = {str(stored(out, name, digest)) for hashes in (sha256, plan.hashes) for name, digest in hashes.items()}
        for pattern in ("*.parquet", "events/*/*.parquet", "quarantine/*.parquet"):
            for file in out.glob(pattern):
                if str(file) not in listed:  # readers of the last `ingest.json` may still be at its files
                    file.unlink()
    remove_tree(_refused(out))


def keep_refused(out: Location, table: str, rows: pa.Table) -> Location:
    """Where the bad rows of a refused ingest lie, until one succeeds."""
    remove_tree(_refused(out))
    file = _refused(out) / f"{table}.parquet"
    with writing(file) as handle:
        pq.write_table(rows, handle)
    return file


def _refused(out: Location) -> Location:
    return out.with_name(f"{out.name}.refused")


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(folder)
    except OSError:
        return  # its ingest is at work, or has not got that far
