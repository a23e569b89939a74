"""Raw files to typed columns without losing sight of a row: every value that does not fit is kept with its line.

N rows of one chunk. CSV is read as text first and typed afterwards, because a parser that types while reading
fails the whole file on one bad value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from features.validate import SchemaError
from pipelines.adapters import MALFORMED, Chunk
from pipelines.storage import Location

CSV_BLOCK_BYTES = 8 << 20
PARQUET_BATCH_ROWS = 131_072
_EXACT_FLOAT = 2.0**53
"""Above this not every whole number is a float, so an id written as a float above it is not trusted."""


@dataclass(kw_only=True, slots=True)
class RawChunk:
    """Untyped rows of one file, and the typed columns and faults that are found in them."""

    frame: pl.DataFrame
    lines: np.ndarray
    unreadable: list[tuple[int, str, str]] = field(default_factory=list)
    """(line, raw text, reason) of records that never became a row."""
    _faults: list[tuple[str, pl.Series]] = field(default_factory=list)

    def whole(self, name: str) -> pl.Series:
        """Column as int64; '12.0' is 12, 'NaN' and '12.5' are faults of their rows, empty is null."""
        values = self.frame[name]
        typed = values.cast(pl.Int64, strict=False) if not values.dtype.is_float() else _null_like(values)
        if not values.dtype.is_integer():
            number = values.cast(pl.Float64, strict=False)
            sound = number.is_finite() & (number == number.round()) & (number.abs() < _EXACT_FLOAT)
            typed = typed.zip_with(typed.is_not_null(), number.zip_with(sound.fill_null(False), _null_like(number))
                                   .cast(pl.Int64, strict=False))  # fmt: skip
        self.fault(f"{name} is not a whole number", values.is_not_null() & typed.is_null())
        return typed

    def real(self, name: str) -> pl.Series:
        """Column as float64; 'NaN' stays NaN for the validator to judge, 'abc' is a fault of its row."""
        values = self.frame[name]
        typed = values.cast(pl.Float64, strict=False)
        self.fault(f"{name} is not a number", values.is_not_null() & typed.is_null())
        return typed

    def whole_list(self, name: str, separator: str) -> pl.Series:
        """Text like '39,2' as a list of int64; empty is null."""
        values = self.frame[name].cast(pl.String)
        parts = values.str.split(separator)
        typed = parts.list.eval(pl.element().str.strip_chars().cast(pl.Int64, strict=False))
        self.fault(f"{name} is not a list of whole numbers", typed.list.eval(pl.element().is_null()).list.any())
        return typed

    def fault(self, reason: str, mask: pl.Series) -> None:
        """Rows that cannot be translated, and why."""
        if mask.any():
            self._faults.append((reason, mask.fill_null(False)))

    def chunk(self, columns: dict[str, pl.Series]) -> Chunk:
        """The typed columns of the sound rows, and the faulty rows as they were."""
        malformed = list(self.unreadable)
        bad_N = np.zeros(len(self.lines), dtype=bool)
        for reason, mask in self._faults:
            fresh_N = mask.to_numpy() & ~bad_N
            bad_N |= fresh_N
            for index in np.flatnonzero(fresh_N):
                raw = ",".join("" if value is None else str(value) for value in self.frame.row(int(index)))
                malformed.append((int(self.lines[index]), raw, reason))
        malformed.sort()
        rows = pl.DataFrame(columns).filter(pl.Series(~bad_N)).to_arrow(compat_level=pl.CompatLevel.oldest())
        table = pa.table(dict(zip(MALFORMED.names, zip(*malformed, strict=True), strict=True)) if malformed else
                         {name: [] for name in MALFORMED.names}, schema=MALFORMED)  # fmt: skip
        return Chunk(rows=rows, lines=self.lines[~bad_N], malformed=table)


def read_csv(file: Location, columns: Sequence[str]) -> Iterator[RawChunk]:
    """The named columns of a CSV file as text, empty as null; records with the wrong number of fields are set aside."""
    check_columns(file, csv_header(file), columns)
    unreadable: list[tuple[int, str, str]] = []

    def set_aside(row: pyarrow.csv.InvalidRow) -> str:
        reason = f"the line has {row.actual_columns} fields, its header {row.expected_columns}"
        unreadable.append((row.number or 0, row.text, reason))
        return "skip"

    line = 2
    try:
        with _open_csv(file, columns, set_aside) as reader:
            for batch in reader:
                wrong = np.array([number for number, _, _ in unreadable], dtype=np.int64)
                lines = np.setdiff1d(np.arange(line, line + batch.num_rows + len(wrong)), wrong)[: batch.num_rows]
                if not batch.num_rows:
                    continue
                line = int(lines[-1]) + 1
                due = [entry for entry in unreadable if entry[0] < line]
                unreadable[:] = [entry for entry in unreadable if entry[0] >= line]
                yield _text_chunk(batch, lines, due)
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"{file}: not readable as CSV after line {line - 1} ({error}); mend or remove the file"
        ) from error
    if unreadable:
        empty = pl.DataFrame({name: pl.Series([], dtype=pl.String) for name in columns})
        yield RawChunk(frame=empty, lines=np.zeros(0, dtype=np.int64), unreadable=unreadable)


def csv_header(file: Location) -> list[str]:
    """Column names of a CSV file."""
    with file.open("rb") as handle:
        first = handle.readline().decode("utf-8-sig", "replace").strip()
    if not first:
        raise SchemaError(f"{file}: the file is empty, a header line was expected: fetch it again")
    return [name.strip().strip('"') for name in first.split(",")]


def check_columns(file: Location, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file that lacks a column, by name."""
    if missing := [name for name in wanted if name not in found]:
        raise SchemaError(
            f"{file}: missing column {', '.join(missing)} (found: {', '.join(found)}); "
            "check that the file is the one its name says, complete and with its header"
        )


def read_parquet(file: Location, columns: Sequence[str] | None = None) -> Iterator[RawChunk]:
    """Columns of a Parquet file in batches, page checksums verified where the file has them."""
    try:
        source = pq.ParquetFile(opened(file), page_checksum_verification=True)
        if columns is not None:
            check_columns(file, source.schema_arrow.names, columns)
        line = 1
        for batch in source.iter_batches(PARQUET_BATCH_ROWS, columns=list(columns) if columns is not None else None):
            frame = pl.DataFrame(pa.Table.from_batches([batch]))
            yield RawChunk(frame=frame, lines=np.arange(line, line + len(frame)))
            line += len(frame)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{file}: not readable as Parquet ({error}); write or fetch it again") from error


def parquet_columns(file: Location) -> list[str]:
    """Column names of a Parquet file."""
    try:
        return pq.read_schema(opened(file)).names
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{file}: not readable as Parquet ({error}); write or fetch it again") from error


def opened(file: Location) -> Path | IO[bytes]:
    """What pyarrow reads: it opens the files of this machine itself."""
    return file if isinstance(file, Path) else file.open("rb")


def _open_csv(file: Location, columns: Sequence[str], set_aside) -> pyarrow.csv.CSVStreamingReader:
    # One thread: only then does the parser know the number of a line it refuses.
    return pyarrow.csv.open_csv(
        opened(file),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=set_aside, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.binary() for name in columns},
            include_columns=list(columns),
            strings_can_be_null=False,
        ),
    )


def _text_chunk(batch: pa.RecordBatch, lines: np.ndarray, unreadable: list[tuple[int, str, str]]) -> RawChunk:
    try:
        frame = pl.DataFrame(pa.table(batch.columns, names=batch.schema.names).cast(_text_schema(batch)))
        undecodable = None
    except pa.ArrowInvalid:
        cells = {name: batch[name].to_pylist() for name in batch.schema.names}
        texts = {name: [cell.decode("utf-8", "replace") for cell in column] for name, column in cells.items()}
        frame = pl.DataFrame(texts, schema=dict.fromkeys(texts, pl.String))
        undecodable = pl.Series([any("\ufffd" in text for text in row) for row in frame.iter_rows()])
    frame = frame.with_columns(pl.all().replace("", None))
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    raw = RawChunk(frame=frame.filter(~blank), lines=lines[~blank.to_numpy()], unreadable=unreadable)
    if undecodable is not None:
        raw.fault("the line is not UTF-8 text", undecodable.filter(~blank))
    return raw


def _text_schema(batch: pa.RecordBatch) -> pa.Schema:
    return pa.schema([pa.field(name, pa.string()) for name in batch.schema.names])


def _null_like(values: pl.Series) -> pl.Series:
    return pl.Series(values.name, [None], dtype=pl.Int64 if values.dtype != pl.Float64 else pl.Float64).new_from_index(
        0, len(values)
    )
