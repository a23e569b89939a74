"""What came in and where it went, by table, file and reason; and `ingest.json`, which the next ingest goes on from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.ingest.plan import REPORT_FORMAT, Plan
from pipelines.ingest.tables import IngestError
from pipelines.storage import Location


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
    """What the folder holds now, and what this ingest did for it."""

    adapter: str
    out_dir: Location
    tables: dict[str, TableCount]
    dates: dict[str, int]
    """Rows of `events` by partition."""
    files_read: int
    """Source files that were new or changed; the rest were as the last ingest left them."""
    days_written: tuple[str, ...]
    """Partitions that are others than before, or new."""
    wall_s: float

    @property
    def note(self) -> str:
        """What was done, in words; empty for a first ingest."""
        files = sum(len(count.files) for count in self.tables.values())
        if self.files_read == files:
            return ""
        if self.files_read == 0 and not self.days_written:
            return f"nothing written: all {files} files are as they were"
        days = ", ".join(self.days_written) or "none"
        return f"{self.files_read} of {files} files read; days written: {days}"


def table_counts(entries: dict[str, dict[str, dict[str, Any]]], duplicates: dict[str, int]) -> dict[str, TableCount]:
    """By table, from what is known of each file; `duplicates` by day of the events."""
    counts = {}
    for table, files in entries.items():
        parts = {file: _count(entry["rows_in"], entry["kept"], entry["reasons"]) for file, entry in files.items()}
        counts[table] = total(parts)
    if "events" in counts:
        counts["events"] = replace(counts["events"], exact_duplicates=sum(duplicates.values()))
    return counts


def total(files: dict[str, TableCount]) -> TableCount:
    """The counts of some files together."""
    reasons: Counter[str] = Counter()
    for count in files.values():
        reasons.update(count.reasons)
    rows_in, kept = (sum(getattr(count, name) for count in files.values()) for name in ("rows_in", "kept"))
    return replace(_count(rows_in, kept, dict(reasons)), files=files)


def check_sums(counts: dict[str, TableCount], dates: dict[str, int]) -> None:
    """in = kept + quarantined, for every table and file, and the partitions hold what was kept."""
    for table, count in counts.items():
        for name, part in {table: count, **count.files}.items():
            if part.rows_in != part.kept + part.quarantined:
                raise IngestError(f"{name}: {part.rows_in} rows in, {part.kept} kept, {part.quarantined} set aside")
    if "events" in counts and sum(dates.values()) != counts["events"].kept:
        raise IngestError(f"events: kept {counts['events'].kept} rows, but the partitions hold {sum(dates.values())}")


def report_json(
    adapter: str,
    plan: Plan,
    entries: dict[str, dict[str, dict[str, Any]]],
    counts: dict[str, TableCount],
    days: dict[str, dict[str, int]],
    sha256: dict[str, str],
    stamps: dict[str, Any],
) -> str:
    """The content of `ingest.json`. `sources` keeps its files in their order, which is that of the rows."""
    sources = {
        table: {"reader": plan.tables[table].reader, "files": [{"file": file, **files[file]} for file in files]}
        for table, files in entries.items()
    }
    found = {
        "format": REPORT_FORMAT,
        "adapter": adapter,
        "dates": {day: known["rows"] for day, known in days.items()},
        "days": days,
        "tables": {table: asdict(count) for table, count in counts.items()},
        "sha256": sha256,
        "sources": sources,
        "stamps": stamps,
    }
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def _count(rows_in: int, kept: int, reasons: dict[str, int]) -> TableCount:
    bad = sum(reasons.values())
    return TableCount(rows_in=rows_in, kept=kept, quarantined=bad, reasons=reasons, exact_duplicates=None, files={})
