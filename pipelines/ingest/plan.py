"""What an ingest has to do beside what the last one into the same folder left: which files to read, which days to open.

A file is as it was when its stamp (size and time of change, or the store's version) or its SHA-256 is; what it gave to
each day stands in `ingest.json`. A day is opened again when a file that gives rows to it is new, changed or gone, and
when its partition is not as it was written. Rows depend on more than their file: on the adapter's other files, on the
code that reads and judges, on the libraries. When any of these is another, everything is read again.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import features
from pipelines.adapters import Adapter
from pipelines.ingest.tables import EVENTS_FILE, REPORT_FILE, read_report, stored
from pipelines.storage import Location, location, sha256_of, stamp

REPORT_FORMAT = 2
UNTIL_TOMORROW = "to tomorrow"
"""End of the reasons that hang on the day of the judgement: such a file is judged again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """The files of one table, in order, and what is known of those that are as they were."""

    table: str
    files: list[str]
    known: dict[str, dict[str, Any]]
    before: list[dict[str, Any]]
    """What the last ingest knew of its files, in their order then."""
    reader: str
    """Digest of what the rows hang on beside their own file."""
    whole: bool
    """Whether everything the last ingest wrote of the table stands, and nothing is to be added or taken away."""

    @property
    def fresh(self) -> list[str]:
        """Files to read."""
        return [file for file in self.files if file not in self.known]

    def opened_before(self) -> set[str]:
        """Days that hold rows of files that are gone or will be read again."""
        return {day for entry in self.before if entry["file"] not in self.known for day in entry["days"]}

    def slices(self, day: str) -> dict[str, tuple[int, int]]:
        """Where each file's rows lie in the partition that the last ingest made: start and number."""
        rows = [entry["days"].get(day, 0) for entry in self.before]
        return _slices(self.before, rows)

    def quarantined_slices(self) -> dict[str, tuple[int, int]]:
        """The same in the table's quarantine."""
        return _slices(self.before, [sum(entry["reasons"].values()) for entry in self.before])


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All tables, and the `ingest.json` they go on from."""

    tables: dict[str, TablePlan]
    base: dict[str, Any] | None
    damaged: set[str]
    """Files of the last ingest that are gone or not as it wrote them."""

    @property
    def nothing_to_do(self) -> bool:
        """The folder is already what this ingest would make."""
        return (
            self.base is not None
            and all(table.whole for table in self.tables.values())
            and (set(self.base["sources"]) == set(self.tables))
        )

    @property
    def hashes(self) -> dict[str, str]:
        """What the last ingest wrote, by name."""
        return {} if self.base is None else self.base["sha256"]


def make_plan(adapter: Adapter, out: Location) -> Plan:
    """Compare the adapter's files with what `out` was made from."""
    base = read_report(out) if (out / REPORT_FILE).exists() else None
    if base is not None and (base["format"] != REPORT_FORMAT or base["adapter"] != adapter.name):
        base = None
    damaged = _damaged(out, base) if base is not None else set()
    tables = {table: _table_plan(adapter, table, base, damaged) for table in adapter.tables()}
    return Plan(tables=tables, base=base, damaged=damaged)


def _table_plan(adapter: Adapter, table: str, base: dict[str, Any] | None, damaged: set[str]) -> TablePlan:
    files, reader = [str(file) for file in adapter.files(table)], _reader(adapter, table)
    source = None if base is None else base["sources"].get(table)
    before = source["files"] if source is not None and source["reader"] == reader else []
    spoiled = {day[1] for name in damaged if (day := EVENTS_FILE.fullmatch(name)) is not None}
    lost_bad = f"quarantine/{table}.parquet" in damaged
    known = {}
    for entry in before:
        lost = not spoiled.isdisjoint(entry["days"]) or (lost_bad and entry["reasons"])
        if not lost and entry["file"] in files and _as_it_was(entry):
            known[entry["file"]] = entry
    in_order = [file for file in files if file in known] == [e["file"] for e in before if e["file"] in known]
    same = files == [entry["file"] for entry in before] == list(known)
    intact = table == "events" or (f"{table}.parquet" not in damaged and not lost_bad)
    if not in_order or (table != "events" and not (same and intact)):
        known = {}  # rows of one file, or keys that must be unique in it: all or nothing
    return TablePlan(
        table=table, files=files, known=known, before=before, reader=reader, whole=same and intact and bool(known)
    )


def _as_it_was(entry: dict[str, Any]) -> bool:
    if any(reason.endswith(UNTIL_TOMORROW) for reason in entry["reasons"]):
        return False
    file = location(entry["file"])
    found = stamp(file)
    if entry["settled"] and found == entry["stamp"]:
        return True
    return (
        entry["sha256"] is not None and found["size"] == entry["stamp"]["size"] and sha256_of(file) == entry["sha256"]
    )


def _damaged(out: Location, base: dict[str, Any]) -> set[str]:
    """Files of the dataset that are gone or not as they were written."""
    found = set()
    for name, sha256 in base["sha256"].items():
        file = stored(out, name, sha256)
        try:
            as_written = stamp(file) == base["stamps"].get(name) or sha256_of(file) == sha256
        except FileNotFoundError:
            as_written = False
        if not as_written:
            found.add(name)
    return found


def _reader(adapter: Adapter, table: str) -> str:
    """Digest of all that makes rows of a file's bytes."""
    digest = hashlib.sha256()
    for name in ("pyarrow", "polars"):
        digest.update(f"{name} {version(name)}\n".encode())
    for file in [*_code(adapter), *adapter.context(table)]:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _code(adapter: Adapter) -> list[Path]:
    here, vocabulary = Path(__file__).parent, Path(features.__path__[0])
    own = inspect.getsourcefile(type(adapter))
    return [
        here / "jobs.py",
        *sorted((here.parent / "adapters").glob("*.py")),
        *(vocabulary / name for name in ("schema.py", "validate.py", "hashing.py")),
        *([Path(own)] if own is not None else []),
    ]


def _slices(entries: list[dict[str, Any]], rows: list[int]) -> dict[str, tuple[int, int]]:
    starts = accumulate(rows, initial=0)
    return {entry["file"]: (start, size) for entry, start, size in zip(entries, starts, rows, strict=False)}
