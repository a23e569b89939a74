"""What Ray's workers do: read, validate and write the files of a job, and put the pieces of a day together.

Jobs and their results are plain JSON. Rows never travel: a job leaves them in the work folder, in pieces of a day,
named by the place of their file in the table and of the chunk in the file: their order is that of the input.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import QUARANTINE_REASON
from features.validate import PRIMARY_KEYS, SchemaError, Validated, count_exact_duplicates, target_schema, validate
from pipelines.adapters import Adapter, Chunk
from pipelines.ingest.tables import IngestError, read_parquet_file, read_verified, stored
from pipelines.storage import Location, RemotePath, location, sha256_of, stamp, upload, writing

EVENT_SCHEMA = target_schema("events", pa.schema([]))
SETTLED_S = 2.0
"""A file younger than this when it is read may change again without a new time of change."""
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
Validation = tuple[str, str, Chunk, Validated]
"""Name of the piece, file, chunk as read and as judged."""


def read_files(job: dict[str, Any], adapter: Adapter, work: Location, out: Location) -> dict[str, Any]:
    """Read the job's files of one table, validate, write good rows and quarantine; what became of each file.

    Events lie in pieces afterwards, any other table whole, under its final name.
    """
    table = job["table"]
    files = {file: _before(location(file)) for file in job["files"]}
    chunks = _validated(job, adapter, files, work)
    written = {}
    if table == "events":
        for name, file, chunk, split in chunks:
            days = _write_pieces(work, name, split.good, _dates(chunk, split))
            files[file]["days"] = dict(Counter(files[file]["days"]) + days)
    else:
        written = _write_table(table, chunks, work, out)
    for file, entry in files.items():
        if stamp(location(file)) != entry["stamp"]:
            raise IngestError(f"{file} changed while it was read: ingest again when it is complete")
    label = table if len(files) > 1 else f"{table} from {location(job['files'][0]).name}"
    rows = sum(entry["rows_in"] for entry in files.values())
    return {"files": files, "written": written, "label": label, "rows": rows}


def finish_day(job: dict[str, Any], work: Location, out: Location) -> dict[str, Any]:
    """One day's partition, in the order of files and lines: pieces that were just read, and slices of the partition
    that the last ingest made, for the files that are as they were."""
    day, sha256, parts = job["day"], job["sha256"], []
    name = f"events/date={day}/part-00000.parquet"
    earlier = read_verified(out, name, sha256) if sha256 is not None else EVENT_SCHEMA.empty_table()
    for part in job["parts"]:
        if "start" in part:
            parts.append(earlier.slice(part["start"], part["rows"]))
        else:
            pieces = sorted((work / "pieces" / f"date={day}").glob(f"{part['file']:05d}-*.parquet"), key=str)
            parts.extend(read_parquet_file(piece) for piece in pieces)
    # Pages end where a chunk does: in one chunk, equal rows are equal bytes however they came together.
    events = pa.concat_tables([part.cast(EVENT_SCHEMA) for part in parts]).combine_chunks()
    written = {name: place_table(work, out, name, events)}
    duplicates = count_exact_duplicates(events)
    return {"label": f"events/date={day}", "rows": len(events), "exact_duplicates": duplicates, "written": written}


def place_table(work: Location, out: Location, name: str, table: pa.Table) -> str:
    """One file of the dataset from a table in memory; its SHA-256."""

    def write(path: Path) -> None:
        with _writer(path, table.schema) as writer:
            writer.write_table(table)

    return _place(work, out, name, write)


def _place(work: Location, out: Location, name: str, write: Callable[[Path], None]) -> str:
    """Have `write` make a file of the dataset, and put it where it becomes part of it: on this machine into the folder
    that will replace the old one, elsewhere under its final name, which no `ingest.json` lists yet."""
    if isinstance(work, Path):
        file = work / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
        return sha256_of(file)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "table.parquet"
        write(here)
        sha256 = sha256_of(here)
        there = stored(out, name, sha256)
        assert isinstance(there, RemotePath)  # noqa: S101 - as `work` is beside it
        upload(here, there)
        return sha256


def _before(file: Location) -> dict[str, Any]:
    """What is known of a file when its reading begins. Elsewhere the store's own version stands for a hash."""
    found = stamp(file)
    young = isinstance(file, Path) and time.time_ns() - found["version"] < SETTLED_S * 1e9
    hashed = isinstance(file, Path) or found["version"] is None
    return {
        "stamp": found,
        "settled": found["version"] is not None and not young,
        "sha256": sha256_of(file) if hashed else None,
        "rows_in": 0,
        "kept": 0,
        "reasons": {},
        "days": {},
    }


def _validated(
    job: dict[str, Any], adapter: Adapter, files: dict[str, dict[str, Any]], work: Location
) -> Iterator[Validation]:
    """The chunks of the job's files, judged, counted, their bad rows written to quarantine."""
    table, seen_N = job["table"], np.zeros(0, dtype=np.int64)
    for number, file in enumerate(job["files"], start=job["first"]):
        for piece, chunk in enumerate(adapter.read(table, location(file))):
            extra = ["date"] if table == "events" and "date" in chunk.rows.column_names else []
            split = validate(table, chunk.rows.drop_columns(extra), file=file, seen=seen_N)
            if table in PRIMARY_KEYS:
                seen_N = np.concatenate([seen_N, split.good[PRIMARY_KEYS[table]].to_numpy()])
            name = f"{number:05d}-{piece:05d}.parquet"
            faults = _write_quarantine(work / "quarantine" / table / name, file, chunk, split)
            entry = files[file]
            entry["rows_in"] += len(chunk.rows) + len(chunk.malformed)
            entry["kept"] += len(split.good)
            entry["reasons"] = dict(Counter(entry["reasons"]) + faults)
            yield name, file, chunk, split


def _write_table(table: str, chunks: Iterator[Validation], work: Location, out: Location) -> dict[str, str]:
    """All rows of a table that is one file."""

    def write(path: Path) -> None:
        writer: pq.ParquetWriter | None = None
        for _, file, _, split in chunks:
            writer = writer or _writer(path, split.good.schema)
            if split.good.schema != writer.schema:
                raise SchemaError(
                    f"{file}: columns differ from the other files of {table}: write them with the same types"
                )
            writer.write_table(split.good)
        (writer or _writer(path, target_schema(table, pa.schema([])))).close()

    name = f"{table}.parquet"
    return {name: _place(work, out, name, write)}


def _dates(chunk: Chunk, split: Validated) -> pl.Series:
    """Partition of each good event: the log's own day where it has one, else the UTC day of its time."""
    if "date" in chunk.rows.column_names:
        return pl.Series(chunk.rows["date"].filter(pa.array(split.kept)))
    return pl.Series(split.good["ts_ms"]).cast(pl.Datetime("ms")).dt.strftime("%Y-%m-%d")


def _write_quarantine(path: Location, file: str, chunk: Chunk, split: Validated) -> Counter[str]:
    """Set aside a chunk's bad rows: where they stood, why, and what they held."""
    bad, malformed = split.quarantined, chunk.malformed
    if len(bad) + len(malformed) == 0:
        return Counter()
    where = {"file": [file] * len(bad), "line": pa.array(chunk.lines[~split.kept], pa.int64())}
    broken = pa.table({**where, **{name: bad[name] for name in (QUARANTINE_REASON, *bad.column_names[:-1])}})
    unread = malformed.add_column(0, "file", pa.array([file] * len(malformed), pa.string()))
    both = pa.concat_tables([unread, _wide(broken)], promote_options="permissive").sort_by("line")
    with writing(path) as handle:
        pq.write_table(both, handle)
    return Counter(split.counts) + Counter(malformed[QUARANTINE_REASON].to_pylist())


def _wide(rows: pa.Table) -> pa.Table:
    """Whole numbers as 64 bits, so that the quarantined rows of one file do not change the columns of another's."""
    fields = [field.with_type(pa.int64()) if pa.types.is_integer(field.type) else field for field in rows.schema]
    return rows.cast(pa.schema(fields))


def _write_pieces(work: Location, name: str, events: pa.Table, dates: pl.Series) -> Counter[str]:
    """The rows of each day, in input order, to a file of their own until the day is put together; rows by day."""
    rows: Counter[str] = Counter()
    for date in dates.unique().sort():
        if date is None or not _DATE.fullmatch(date):
            raise SchemaError(
                f"events have the date {date!r}, expected YYYY-MM-DD: mend the adapter or the folder's name"
            )
        piece = events.filter((dates == date).to_arrow())
        with writing(work / "pieces" / f"date={date}" / name) as handle:
            pq.write_table(piece, handle, compression="lz4")
        rows[date] = len(piece)
    return rows


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)
