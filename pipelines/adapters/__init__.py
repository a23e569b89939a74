"""Adapters turn somebody's logs into the canonical tables of features/schema.py.

An adapter names its tables and their files and reads one file at a time, in chunks, so that Ray Data can spread
the files over workers. It only translates: `features.validate` judges the rows, `pipelines.ingest` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipelines.storage import Location

MALFORMED = pa.schema([pa.field("line", pa.int64()), pa.field("raw", pa.string()), pa.field("reason", pa.string())])
"""Raw rows that could not be read as the table's columns: where they stand, their text, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Some rows of one file, in file order."""

    rows: pa.Table
    """Canonical columns, unjudged; `events` also carry `date` (YYYY-MM-DD), their partition."""
    lines: np.ndarray
    """Where each row stands: the record's number in a CSV file counting its header as 1, in Parquet from 1."""
    malformed: pa.Table
    """Rows that could not be translated, with the columns of MALFORMED."""


class Adapter(Protocol):
    """What ingest needs to know about a source. Adapters travel to Ray workers, so they hold paths, not open files."""

    @property
    def name(self) -> str:
        """What reports call this source."""
        ...

    def tables(self) -> list[str]:
        """The canonical tables this source has."""
        ...

    def files(self, table: str) -> list[Location]:
        """The files of one table, in the order their rows are to keep."""
        ...

    def context(self, table: str) -> list[Location]:
        """Other files that the rows of the table hang on: when one changes, all of the table is read again."""
        ...

    def read(self, table: str, file: Location) -> Iterator[Chunk]:
        """The rows of one file. The same file always gives the same chunks."""
        ...
