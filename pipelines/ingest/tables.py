"""The canonical folder: what lies in it, verified before it is used.

OUT/events/date=YYYY-MM-DD/part-00000.parquet   OUT/NAME.parquet   OUT/quarantine/NAME.parquet   OUT/ingest.json

`ingest.json` lists the files with their SHA-256. On this machine they are called what is listed; elsewhere, where no
folder can be renamed, each name carries the content's hash, and writing `ingest.json` is what makes them the dataset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.examples import EVENT_COLUMNS, EventPart
from pipelines.storage import Location, location, sha256_of

REPORT_FILE = "ingest.json"
EVENTS_FILE = re.compile(r"events/date=([^/]+)/[^/]+\.parquet")


class IngestError(Exception):
    """An ingest that was refused or a dataset that cannot be read; nothing was replaced. The message says the cure."""


def load_table(dataset: str | Path, name: str) -> pa.Table | None:
    """One table of an ingested (or canonical) folder, verified; None when the folder does not have it."""
    if name == "events":
        return load_events(dataset)
    root = location(dataset)
    files = written(root)
    file = f"{name}.parquet"
    return read_verified(root, file, files[file]) if file in files else None


def load_events(
    dataset: str | Path, dates: Sequence[str] | None = None, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Events of some or all days with a `date` column, in partition order; a missing or damaged day is an error."""
    root = location(dataset)
    days = _days(root)
    wanted = sorted(days) if dates is None else list(dates)
    if missing := [date for date in wanted if date not in days]:
        raise IngestError(
            f"{root}: no events of {', '.join(missing)} (it has {', '.join(days)}); ingest them, or ask less"
        )
    parts = []
    for date in wanted:
        for file, sha256 in days[date]:
            rows = read_verified(root, file, sha256, columns)
            parts.append(rows.append_column("date", pa.repeat(pa.scalar(date, pa.string()), len(rows))))
    return pa.concat_tables(parts, promote_options="default")


def event_dates(dataset: str | Path) -> tuple[str, ...]:
    """The days that have events, ascending; no event is read."""
    return tuple(sorted(_days(location(dataset))))


def event_parts(dataset: str | Path) -> list[EventPart]:
    """The events of each day for `Dataset.build`, read and verified when they are asked for, and not before."""
    root = location(dataset)
    parts = []
    for date, files in sorted(_days(root).items()):
        for file, sha256 in files:

            def read(file: str = file, sha256: str | None = sha256) -> pa.Table:
                return read_verified(root, file, sha256, EVENT_COLUMNS)

            parts.append(EventPart(_rows(root, file, sha256), date, read))
    return parts


def written(root: Location) -> dict[str, str | None]:
    """Files of a dataset with the hashes ingest gave them; no hashes for a canonical folder that no ingest wrote."""
    if (root / REPORT_FILE).exists():
        return read_report(root)["sha256"]
    found = [*root.glob("*.parquet"), *root.glob("events/date=*/*.parquet")]
    return {str(file).removeprefix(f"{root}/"): None for file in found}


def read_report(root: Location) -> dict[str, Any]:
    """`ingest.json`."""
    return json.loads((root / REPORT_FILE).read_text())


def stored(root: Location, name: str, sha256: str | None) -> Location:
    """Where a listed file lies."""
    if isinstance(root, Path) or sha256 is None:
        return root / name
    return root / f"{name.removesuffix('.parquet')}-{sha256[:16]}.parquet"


def read_verified(root: Location, name: str, sha256: str | None, columns: Sequence[str] | None = None) -> pa.Table:
    """Page checksums leave out the footer, where a flipped bit renames a column; so the file is hashed too."""
    file = stored(root, name, sha256)
    try:
        if sha256 is not None and (found := sha256_of(file)) != sha256:
            raise IngestError(
                f"{file} is damaged (sha256 {found}, written as {sha256}); remove it and ingest again from the source"
            )
        return read_parquet_file(file, columns)
    except (pa.ArrowException, OSError) as error:
        raise IngestError(f"{file} is damaged or gone ({error}); ingest again from the source") from error


def read_parquet_file(file: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some columns of it, page checksums verified."""
    with file.open("rb") if not isinstance(file, Path) else pa.OSFile(str(file)) as handle:
        found = pq.ParquetFile(handle, page_checksum_verification=True)
        return found.read(list(columns) if columns is not None else None)


def _rows(root: Location, file: str, sha256: str | None) -> int:
    where = stored(root, file, sha256)
    try:
        with where.open("rb") as handle:
            return pq.read_metadata(handle).num_rows
    except (pa.ArrowException, OSError) as error:
        raise IngestError(f"{where} is damaged or gone ({error}); ingest again from the source") from error


def _days(root: Location) -> dict[str, list[tuple[str, str | None]]]:
    days: dict[str, list[tuple[str, str | None]]] = {}
    for file, sha256 in sorted(written(root).items()):
        if (day := EVENTS_FILE.fullmatch(file)) is not None:
            days.setdefault(day[1], []).append((file, sha256))
    if not days:
        raise IngestError(f"{root}: no events/date=YYYY-MM-DD folders; run ingest first, or point at its output")
    return days
