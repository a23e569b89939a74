"""An ingest from its first look to the rename.

Ray Data spreads the files over workers; each worker reads, validates and writes its own rows, so that rows never
travel through the object store and the same input always gives the same bytes. A folder that an ingest made before is
gone on from: files that are as they were are not read again, and days to which nothing came or went are not touched.
The result is what an ingest of everything into an empty folder would be, and replaces OUT in one step.

On a cluster of several machines the logs and OUT must lie on storage that all of them see.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.schema import QUARANTINE_REASON
from pipelines.adapters import Adapter
from pipelines.cluster import ClusterConfig, cluster
from pipelines.ingest.commit import check_replaceable, commit, keep_refused, keep_untouched, stamps, work_folder
from pipelines.ingest.jobs import finish_day, place_table, read_files
from pipelines.ingest.plan import Plan, TablePlan, make_plan
from pipelines.ingest.report import IngestReport, Progress, TableCount, check_sums, report_json, table_counts, total
from pipelines.ingest.spread import run_here, run_on_ray
from pipelines.ingest.tables import EVENTS_FILE, IngestError, read_parquet_file, read_verified
from pipelines.storage import Location, RemotePath, location, shared_between_processes, stamp

Run = Callable[..., list[dict[str, Any]]]
"""Does jobs and gives their results, in their order."""
Entries = dict[str, dict[str, dict[str, Any]]]
"""Table -> file -> what is known of it."""


def ingest(
    adapter: Adapter,
    out_dir: str | Path | RemotePath,
    *,
    max_bad_share: float = 0.05,
    on_progress: Callable[[Progress], None] | None = None,
    where: ClusterConfig | None = None,
) -> IngestReport:
    """Read, validate and write every table of an adapter to `out_dir`, as far as what an earlier ingest left there is
    not the same already.

    Refuses (IngestError) when more than `max_bad_share` of a table's rows are bad, in all or of those read now; they
    then lie in `out_dir`.refused. Works on the Ray this process already uses; without one it starts its own (see
    `where`) and stops it again.
    """
    started = time.monotonic()
    out = location(out_dir)
    check_replaceable(out)
    plan = make_plan(adapter, out)
    if plan.nothing_to_do:
        entries = {table: dict(found.known) for table, found in plan.tables.items()}
        days = plan.base["days"] if plan.base is not None else {}
        return _report(adapter, out, entries, days, 0, (), started)
    fresh = [file for found in plan.tables.values() for file in found.fresh]
    here = not all(map(shared_between_processes, [out, *map(location, fresh)]))
    with work_folder(out) as work, nullcontext() if here else cluster(where or ClusterConfig()):
        run = partial(run_here if here else run_on_ray, on_progress=on_progress)
        entries, sha256 = _read(adapter, plan, work, out, run)
        _refuse_if_bad(plan, entries, max_bad_share, work, out)
        days, of_days = _finish_days(plan, entries, work, out, run)
        sha256 |= of_days | _collect_quarantine(plan, work, out)
        sha256 |= keep_untouched(plan, sha256, days, work, out)
        report = _report(adapter, out, entries, days, len(fresh), _changed(plan, sha256), started)
        check_sums(report.tables, report.dates)
        text = report_json(adapter.name, plan, entries, report.tables, days, sha256, stamps(work, out, sha256))
        commit(text, plan, sha256, work, out)
    return report


def _changed(plan: Plan, sha256: dict[str, str]) -> tuple[str, ...]:
    """Days whose partition is new, another, or gone."""
    names = [name for name in {*sha256, *plan.hashes} if sha256.get(name) != plan.hashes.get(name)]
    return tuple(sorted(day[1] for name in names if (day := EVENTS_FILE.fullmatch(name)) is not None))


def _read(adapter: Adapter, plan: Plan, work: Location, out: Location, run: Run) -> tuple[Entries, dict[str, str]]:
    """What is known of every file, those that had to be read included; and hashes of the tables that were written."""
    jobs = _reading_jobs(plan)
    results = run(partial(read_files, adapter=adapter, work=work, out=out), jobs)
    read: Entries = {table: {} for table in plan.tables}
    sha256: dict[str, str] = {}
    for job, result in zip(jobs, results, strict=True):
        read[job["table"]] |= result["files"]
        sha256 |= result["written"]
    entries = {
        table: {file: (found.known | read[table])[file] for file in found.files} for table, found in plan.tables.items()
    }
    return entries, sha256


def _reading_jobs(plan: Plan) -> list[dict[str, Any]]:
    """One job a file of events; one job a table for the rest: their rows go to one file, their keys are unique."""
    jobs = []
    for table, found in plan.tables.items():
        if table == "events":
            groups = [(number, [file]) for number, file in enumerate(found.files) if file not in found.known]
        else:
            groups = [(0, found.files)] if found.fresh else []
        for first, files in groups:
            size = sum(stamp(location(file))["size"] or 0 for file in files)
            jobs.append({"table": table, "files": files, "first": first, "bytes": size})
    return jobs


def _finish_days(
    plan: Plan, entries: Entries, work: Location, out: Location, run: Run
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Rows and duplicates of every day, and the hashes of the partitions that were put together anew."""
    if "events" not in plan.tables:
        return {}, {}
    events, files = plan.tables["events"], entries["events"]
    opened = events.opened_before() | {day for file in events.fresh for day in files[file]["days"]}
    days = sorted({day for entry in files.values() for day in entry["days"]})
    jobs = []
    for day in days:
        if day in opened:
            parts = _parts_of_day(day, events, files)
            earlier = plan.hashes.get(f"events/date={day}/part-00000.parquet")
            sha256 = earlier if any("start" in part for part in parts) else None
            jobs.append({"day": day, "sha256": sha256, "parts": parts, "bytes": 0})
    finished = run(partial(finish_day, work=work, out=out), jobs)
    known = {} if plan.base is None else plan.base["days"]
    for job, result in zip(jobs, finished, strict=True):
        known = known | {job["day"]: {"rows": result["rows"], "exact_duplicates": result["exact_duplicates"]}}
    written = {name: sha256 for result in finished for name, sha256 in result["written"].items()}
    return {day: known[day] for day in days}, written


def _parts_of_day(day: str, events: TablePlan, files: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    slices, parts = events.slices(day), []
    for number, file in enumerate(events.files):
        if not files[file]["days"].get(day):
            continue
        if file in events.known:
            start, rows = slices[file]
            parts.append({"start": start, "rows": rows})
        else:
            parts.append({"file": number})
    return parts


def _collect_quarantine(plan: Plan, work: Location, out: Location) -> dict[str, str]:
    """The bad rows of each table that was read, in the order of files and lines; those of known files are at hand."""
    sha256 = {}
    for table, found in plan.tables.items():
        rows = pa.table({}) if found.whole else _quarantined(found, plan, work, out)
        if len(rows):
            name = f"quarantine/{table}.parquet"
            sha256[name] = place_table(work, out, name, rows)
    return sha256


def _quarantined(found: TablePlan, plan: Plan, work: Location, out: Location) -> pa.Table:
    """Bad rows of all files of the table, those that earlier ingests read included."""
    slices, parts = found.quarantined_slices(), []
    name = f"quarantine/{found.table}.parquet"
    earlier = read_verified(out, name, plan.hashes[name]) if name in plan.hashes and found.known else None
    for number, file in enumerate(found.files):
        if file not in found.known:
            pieces = sorted((work / "quarantine" / found.table).glob(f"{number:05d}-*.parquet"), key=str)
            parts.extend(read_parquet_file(piece) for piece in pieces)
        elif earlier is not None and slices[file][1]:
            parts.append(earlier.slice(*slices[file]))
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks() if parts else pa.table({})


def _refuse_if_bad(plan: Plan, entries: Entries, max_bad_share: float, work: Location, out: Location) -> None:
    """The limit holds for a table, and for what was read of it now: a bad day must not hide in a long log."""
    counts = table_counts(entries, {})
    for table, found in plan.tables.items():
        read = {file: count for file, count in counts[table].files.items() if file in found.fresh}
        for count in (counts[table], total(read)):
            if count.quarantined and count.quarantined / count.rows_in > max_bad_share:
                raise _refusal(found, plan, count, max_bad_share, work, out)


def _refusal(
    found: TablePlan, plan: Plan, count: TableCount, max_bad_share: float, work: Location, out: Location
) -> IngestError:
    rows = _quarantined(found, plan, work, out)
    kept = keep_refused(out, found.table, rows)
    mine = [row for row in rows.select(["file", "line", QUARANTINE_REASON]).to_pylist() if row["file"] in count.files]
    places = "; ".join(f"{row['file']} line {row['line']} ({row[QUARANTINE_REASON]})" for row in mine[:3])
    by_reason = ", ".join(f"{reason}: {n}" for reason, n in sorted(count.reasons.items(), key=lambda e: -e[1]))
    bad, rows_in = count.quarantined, count.rows_in
    return IngestError(
        f"{found.table}: {bad} of {rows_in} rows ({bad / rows_in:.1%}) break the schema (at most {max_bad_share:.1%} "
        f"may); nothing was replaced. By reason: {by_reason}. First: {places}. All of them: {kept}. "
        "Mend the source or the mapping; raise max_bad_share only when these rows are known to be worthless"
    )


def _report(
    adapter: Adapter,
    out: Location,
    entries: Entries,
    days: dict[str, dict[str, int]],
    files_read: int,
    days_written: tuple[str, ...],
    started: float,
) -> IngestReport:
    counts = table_counts(entries, {day: known["exact_duplicates"] for day, known in days.items()})
    return IngestReport(
        adapter=adapter.name,
        out_dir=out,
        tables=counts,
        dates={day: known["rows"] for day, known in days.items()},
        files_read=files_read,
        days_written=days_written,
        wall_s=time.monotonic() - started,
    )
