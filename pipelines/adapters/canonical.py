"""A folder in the canonical layout: events/date=YYYY-MM-DD/*.parquet, and NAME.parquet for each other table.

The simulated world writes one. Columns that a canonical table does not have are left where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from features.schema import TABLES
from features.validate import SchemaError
from pipelines.adapters import Chunk
from pipelines.adapters.reading import parquet_columns, read_parquet
from pipelines.ingest.tables import EVENTS_FILE, REPORT_FILE, stored, written
from pipelines.storage import Location, RemotePath, location


@dataclass(frozen=True, slots=True)
class CanonicalAdapter:
    """A canonical folder; whichever tables are there are read."""

    root: Location
    name: str = "canonical"

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", location(self.root))
        if not self.files("events"):
            raise SchemaError(
                f"{self.root}: no events/date=YYYY-MM-DD/*.parquet there; point at a folder in the canonical layout, "
                "or describe your files with a mapping (docs/bring-your-own-logs.md)"
            )

    def tables(self) -> list[str]:
        return [table for table in TABLES if self.files(table)]

    def files(self, table: str) -> list[Location]:
        if isinstance(self.root, RemotePath) and (self.root / REPORT_FILE).exists():
            # Names carry hashes there, and what was replaced may still lie beside: only what is listed counts.
            names = sorted(written(self.root).items())
            wanted = EVENTS_FILE if table == "events" else re.compile(rf"{table}\.parquet")
            return [stored(self.root, name, sha256) for name, sha256 in names if wanted.fullmatch(name)]
        if table == "events":
            return sorted((self.root / "events").glob("date=*/*.parquet"), key=str)
        file = self.root / f"{table}.parquet"
        return [file] if file.exists() else []

    def context(self, table: str) -> list[Location]:
        return []

    def read(self, table: str, file: Location) -> Iterator[Chunk]:
        found = parquet_columns(file)
        columns = [name for name in found if table == "users" or name in TABLES[table].names]
        for raw in read_parquet(file, columns):
            rows = {name: raw.frame[name] for name in columns}
            if table == "events":
                rows["date"] = pl.Series([file.parent.name.removeprefix("date=")]).new_from_index(0, len(raw.frame))
            yield raw.chunk(rows)
