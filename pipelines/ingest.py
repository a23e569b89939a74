"""Logs in: any adapter's files become a validated, partitioned, checksummed dataset, and every row is accounted for.

Ray Data spreads the files over workers; each worker reads, validates and writes its own rows, so that rows never
travel through the object store and the same input always gives the same bytes. The result replaces OUT by a rename.
On a cluster of several machines the logs and OUT must lie on storage that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import QUARANTINE_REASON
from features.validate import PRIMARY_KEYS, SchemaError, Validated, count_exact_duplicates, target_schema, validate
from pipelines.adapters import Adapter, Chunk
from pipelines.cluster import ClusterConfig, cluster

REPORT_FILE = "ingest.json"
REPORT_FORMAT = 1
_EVENTS_FILE = re.compile(r"events/date=([^/]+)/[^/]+\.parquet")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


class IngestError(Exception):
    """An ingest that was refused or a dataset that cannot be read; nothing was replaced. The message says the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One finished piece of work."""

    label: str
    rows: int
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.label}: {self.rows:,} rows ({self.done} of {self.total})"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableCount:
    """Where the rows of one table (or one file of it) went: `rows_in` is always `kept` plus `quarantined`."""

    rows_in: int
    kept: int
    quarantined: int
    reasons: dict[str, int]
    """Quarantined rows by reason; they add up to `quarantined`."""
    exact_duplicates: int | None
    """Events equal to an earlier one in everything but request_id: kept, and counted here. Null where not counted."""
    files: dict[str, TableCount]


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReport:
    """What came in and where it went."""

    adapter: str
    out_dir: Path
    tables: dict[str, TableCount]
    dates: dict[str, int]
    """Rows of `events` by partition."""
    wall_s: float


def ingest(
    adapter: Adapter,
    out_dir: str | Path,
    *,
    max_bad_share: float = 0.05,
    on_progress: Callable[[Progress], None] | None = None,
    where: ClusterConfig | None = None,
) -> IngestReport:
    """Read, validate and write every table of an adapter to `out_dir`, replacing what an earlier ingest left there.

    Works on the Ray this process already uses; without one it starts its own (see `where`) and stops it again.
    """
    started = time.monotonic()
    out = Path(out_dir).absolute()
    _check_replaceable(out)
    work = out.parent / f".{out.name}.ingest-{uuid.uuid4().hex}"
    try:
        with cluster(where or ClusterConfig()):
            counts, dates = _ingest_into(work, adapter, max_bad_share, on_progress)
        _write_report(work / "data" / REPORT_FILE, adapter.name, counts, dates)
        _replace(out, work / "data", work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    wall_s = time.monotonic() - started
    return IngestReport(adapter=adapter.name, out_dir=out, tables=counts, dates=dates, wall_s=wall_s)


def load_table(dataset: str | Path, name: str) -> pa.Table | None:
    """One table of an ingested (or canonical) folder, verified; None when the folder does not have it."""
    if name == "events":
        return load_events(dataset)
    file, root = f"{name}.parquet", Path(dataset)
    hashes = _written(root)
    return _read_verified(root, file, hashes[file]) if file in hashes else None


def load_events(dataset: str | Path, dates: Sequence[str] | None = None) -> pa.Table:
    """Events of some or all days with a `date` column, in partition order; a missing or damaged day is an error."""
    root = Path(dataset)
    days: dict[str, list[tuple[str, str | None]]] = {}
    for file, sha256 in sorted(_written(root).items()):
        if (day := _EVENTS_FILE.fullmatch(file)) is not None:
            days.setdefault(day[1], []).append((file, sha256))
    wanted = sorted(days) if dates is None else list(dates)
    if missing := [date for date in wanted if date not in days]:
        raise IngestError(
            f"{root}: no events of {', '.join(missing)} (it has {', '.join(days)}); ingest them, or ask less"
        )
    if not wanted:
        raise IngestError(f"{root}: no events/date=YYYY-MM-DD folders; run ingest first, or point at its output")
    parts = []
    for date in wanted:
        for file, sha256 in days[date]:
            rows = _read_verified(root, file, sha256)
            parts.append(rows.append_column("date", pa.repeat(pa.scalar(date, pa.string()), len(rows))))
    return pa.concat_tables(parts, promote_options="default")


def _ingest_into(
    work: Path, adapter: Adapter, max_bad_share: float, on_progress: Callable[[Progress], None] | None
) -> tuple[dict[str, TableCount], dict[str, int]]:
    """Two passes of Ray Data: files to validated pieces, then pieces of a day to its partition."""
    (work / "data").mkdir(parents=True)
    jobs = _plan(adapter)
    results = _run(partial(_ingest_job, adapter=adapter, work=work), jobs, on_progress)
    counts = {}
    for table in adapter.tables():
        files: dict[str, TableCount] = {}
        for job, result in zip(jobs, results, strict=True):
            if job["table"] == table:
                files |= {file: _count(**count) for file, count in result["files"].items()}
        counts[table] = _sum(files)
        _refuse_if_bad(table, counts[table], max_bad_share, work)
    days = sorted(folder.name for folder in (work / "pieces").glob("date=*"))
    finished = _run(partial(_finish_day, work=work), [{"day": day, "bytes": 0} for day in days], on_progress)
    dates = {day.removeprefix("date="): result["rows"] for day, result in zip(days, finished, strict=True)}
    if "events" in counts:
        repeated = sum(result["exact_duplicates"] for result in finished)
        events = counts["events"]
        counts["events"] = replace(events, exact_duplicates=repeated)
    _collect_quarantine(work, adapter.tables())
    _check_sums(counts, dates)
    return counts, dates


def _plan(adapter: Adapter) -> list[dict[str, Any]]:
    """One job a file of events; one job a table for the rest: their rows go to one file, their keys are unique."""
    jobs = []
    for table in adapter.tables():
        files = [str(file) for file in adapter.files(table)]
        groups = [[file] for file in files] if table == "events" else [files]
        for index, group in enumerate(groups):
            size = sum(Path(file).stat().st_size for file in group)
            jobs.append({"table": table, "files": group, "index": index, "bytes": size})
    return jobs


def _run(
    work: Callable[[dict[str, Any]], dict[str, Any]],
    jobs: list[dict[str, Any]],
    on_progress: Callable[[Progress], None] | None,
) -> list[dict[str, Any]]:
    """Do the jobs on Ray Data, the largest first; results in the order of the jobs."""
    if not jobs:
        return []
    import ray.data  # not before the cluster has set Ray's environment

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    largest_first = sorted(range(len(jobs)), key=lambda index: -jobs[index]["bytes"])
    items = [{"index": index, "job": json.dumps(jobs[index])} for index in largest_first]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(partial(_do, work=work))
    results: dict[int, dict[str, Any]] = {}
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise (SchemaError if result["kind"] == "SchemaError" else IngestError)(result["error"])
        results[row["index"]] = result
        if on_progress is not None:
            on_progress(Progress(label=result["label"], rows=result["rows"], done=len(results), total=len(jobs)))
    return [results[index] for index in range(len(jobs))]


def _do(row: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A named error travels back as text: wrapped by Ray, its message would drown in remote tracebacks."""
    try:
        result = work(json.loads(row["job"]))
    except (SchemaError, IngestError) as error:
        result = {"error": str(error), "kind": type(error).__name__}
    return {"index": row["index"], "result": json.dumps(result)}


def _ingest_job(job: dict[str, Any], adapter: Adapter, work: Path) -> dict[str, Any]:
    """On a worker: read the job's files, validate, write good rows and quarantine; returns the counts by file."""
    table = job["table"]
    files = {file: {"rows_in": 0, "kept": 0, "reasons": {}} for file in job["files"]}
    chunks = ((file, chunk) for file in job["files"] for chunk in adapter.read(table, Path(file)))
    seen_N = np.zeros(0, dtype=np.int64)
    writer: pq.ParquetWriter | None = None
    for piece, (file, chunk) in enumerate(chunks):
        rows = (
            chunk.rows.drop_columns(["date"]) if table == "events" and "date" in chunk.rows.column_names else chunk.rows
        )
        split = validate(table, rows, file=file, seen=seen_N)
        name = f"{job['index']:05d}-{piece:05d}.parquet"
        faults = _write_quarantine(work / "quarantine" / table / name, file, chunk, split)
        count = files[file]
        count["rows_in"] += len(chunk.rows) + len(chunk.malformed)
        count["kept"] += len(split.good)
        count["reasons"] = dict(Counter(count["reasons"]) + faults)
        if table == "events":
            _write_pieces(work / "pieces", name, split.good, _dates(chunk, split))
            continue
        if table in PRIMARY_KEYS:
            seen_N = np.concatenate([seen_N, split.good[PRIMARY_KEYS[table]].to_numpy()])
        writer = writer or _writer(work / "data" / f"{table}.parquet", split.good.schema)
        if split.good.schema != writer.schema:
            raise SchemaError(f"{file}: columns differ from the other files of {table}: write them with the same types")
        writer.write_table(split.good)
    if table != "events":
        (writer or _writer(work / "data" / f"{table}.parquet", target_schema(table, pa.schema([])))).close()
    label = table if len(files) > 1 else f"{table} from {Path(job['files'][0]).name}"
    return {"files": files, "label": label, "rows": sum(count["rows_in"] for count in files.values())}


def _dates(chunk: Chunk, split: Validated) -> pl.Series:
    """Partition of each good event: the log's own day where it has one, else the UTC day of its time."""
    if "date" in chunk.rows.column_names:
        return pl.Series(chunk.rows["date"].filter(pa.array(split.kept)))
    return pl.Series(split.good["ts_ms"]).cast(pl.Datetime("ms")).dt.strftime("%Y-%m-%d")


def _write_quarantine(path: Path, file: str, chunk: Chunk, split: Validated) -> Counter[str]:
    """Set aside a chunk's bad rows: where they stood, why, and what they held."""
    bad, malformed = split.quarantined, chunk.malformed
    if len(bad) + len(malformed) == 0:
        return Counter()
    where = {"file": [file] * len(bad), "line": pa.array(chunk.lines[~split.kept], pa.int64())}
    broken = pa.table({**where, **{name: bad[name] for name in (QUARANTINE_REASON, *bad.column_names[:-1])}})
    unread = malformed.add_column(0, "file", pa.array([file] * len(malformed), pa.string()))
    both = pa.concat_tables([unread, broken], promote_options="permissive").sort_by("line")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(both, path)
    return Counter(split.counts) + Counter(malformed[QUARANTINE_REASON].to_pylist())


def _write_pieces(folder: Path, name: str, events: pa.Table, dates: pl.Series) -> None:
    """The rows of each day, in input order, to a file of their own until the day is put together."""
    for date in dates.unique().sort():
        if date is None or not _DATE.fullmatch(date):
            raise SchemaError(
                f"events have the date {date!r}, expected YYYY-MM-DD: mend the adapter or the folder's name"
            )
        path = folder / f"date={date}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(events.filter((dates == date).to_arrow()), path, compression="lz4")


def _finish_day(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """On a worker: one day's pieces to its partition, in the order of files and lines."""
    pieces = sorted((work / "pieces" / job["day"]).glob("*.parquet"))
    events = pa.concat_tables([_read(piece) for piece in pieces])
    with _writer(work / "data" / "events" / job["day"] / "part-00000.parquet", events.schema) as writer:
        writer.write_table(events)
    return {"label": f"events/{job['day']}", "rows": len(events), "exact_duplicates": count_exact_duplicates(events)}


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _collect_quarantine(work: Path, tables: list[str]) -> None:
    for table in tables:
        rows = _quarantined(work, table)
        if rows is not None:
            with _writer(work / "data" / "quarantine" / f"{table}.parquet", rows.schema) as writer:
                writer.write_table(rows)


def _quarantined(work: Path, table: str) -> pa.Table | None:
    pieces = sorted((work / "quarantine" / table).glob("*.parquet"))
    parts = [_read(piece) for piece in pieces]
    return pa.concat_tables(parts, promote_options="permissive") if parts else None


def _refuse_if_bad(table: str, count: TableCount, max_bad_share: float, work: Path) -> None:
    bad = count.quarantined
    if bad == 0 or bad / count.rows_in <= max_bad_share:
        return
    by_reason = ", ".join(f"{reason}: {rows}" for reason, rows in sorted(count.reasons.items(), key=lambda e: -e[1]))
    rows = _quarantined(work, table)
    examples = rows.select(["file", "line", QUARANTINE_REASON]).slice(0, 3).to_pylist() if rows is not None else []
    places = "; ".join(f"{row['file']} line {row['line']} ({row[QUARANTINE_REASON]})" for row in examples)
    raise IngestError(
        f"{table}: {bad} of {count.rows_in} rows ({bad / count.rows_in:.1%}) break the schema "
        f"(at most {max_bad_share:.1%} may); nothing was replaced. By reason: {by_reason}. First: {places}. "
        "Mend the source or the mapping; raise max_bad_share only when these rows are known to be worthless"
    )


def _count(rows_in: int, kept: int, reasons: dict[str, int]) -> TableCount:
    bad = sum(reasons.values())
    return TableCount(rows_in=rows_in, kept=kept, quarantined=bad, reasons=reasons, exact_duplicates=None, files={})


def _sum(files: dict[str, TableCount]) -> TableCount:
    reasons: Counter[str] = Counter()
    for count in files.values():
        reasons.update(count.reasons)
    rows_in, kept = (sum(getattr(count, name) for count in files.values()) for name in ("rows_in", "kept"))
    return replace(_count(rows_in, kept, dict(reasons)), files=files)


def _check_sums(counts: dict[str, TableCount], dates: dict[str, int]) -> None:
    """in = kept + quarantined, for every table and file, and the partitions hold what was kept."""
    for table, count in counts.items():
        for name, part in {table: count, **count.files}.items():
            if part.rows_in != part.kept + part.quarantined:
                raise IngestError(f"{name}: {part.rows_in} rows in, {part.kept} kept, {part.quarantined} set aside")
    if "events" in counts and sum(dates.values()) != counts["events"].kept:
        raise IngestError(f"events: kept {counts['events'].kept} rows, but the partitions hold {sum(dates.values())}")


def _write_report(path: Path, adapter: str, counts: dict[str, TableCount], dates: dict[str, int]) -> None:
    tables = {table: asdict(count) for table, count in counts.items()}
    written = sorted(file.relative_to(path.parent).as_posix() for file in path.parent.rglob("*.parquet"))
    sha256 = {file: _sha256(path.parent / file) for file in written}
    report = {"format": REPORT_FORMAT, "adapter": adapter, "dates": dates, "tables": tables, "sha256": sha256}
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


def _check_replaceable(out: Path) -> None:
    """Only an empty folder or an earlier ingest may be replaced: a mistyped path must not cost somebody their files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out / REPORT_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise IngestError(f"{out} holds something that no ingest wrote; choose an empty or a new folder")


def _replace(out: Path, fresh: Path, old: Path) -> None:
    if out.exists():
        os.rename(out, old)
    os.rename(fresh, out)


def _written(root: Path) -> dict[str, str | None]:
    """Files of a dataset with the hashes ingest gave them; no hashes for a canonical folder that no ingest wrote."""
    report = root / REPORT_FILE
    if report.exists():
        return json.loads(report.read_text())["sha256"]
    found = [*root.glob("*.parquet"), *root.glob("events/date=*/*.parquet")]
    return {file.relative_to(root).as_posix(): None for file in found}


def _read_verified(root: Path, name: str, sha256: str | None) -> pa.Table:
    """Page checksums leave out the footer, where a flipped bit renames a column; so the file is hashed too."""
    file = root / name
    try:
        if sha256 is not None and (found := _sha256(file)) != sha256:
            raise IngestError(f"{file} is damaged (sha256 {found}, written as {sha256}); ingest again from the source")
        return _read(file)
    except (pa.ArrowException, OSError) as error:
        raise IngestError(f"{file} is damaged or gone ({error}); ingest again from the source") from error


def _read(file: Path) -> pa.Table:
    return pq.ParquetFile(file, page_checksum_verification=True).read()


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
