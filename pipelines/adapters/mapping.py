"""Any CSV or Parquet logs as canonical tables, by a small TOML file that says which column is what.

N rows of one chunk. docs/bring-your-own-logs.md has the whole language on one page, and a worked example.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import polars as pl
import pyarrow as pa

from features.hashing import hash_strings
from features.schema import SIGNALS, TABLES
from features.validate import SchemaError
from pipelines.adapters import Chunk
from pipelines.adapters.reading import RawChunk, check_columns, csv_header, parquet_columns, read_csv, read_parquet
from pipelines.storage import Location, location

ID_HASH_SEED = 0
"""Text ids become XXH64 of their UTF-8 bytes under this seed, read as a signed 64-bit integer."""
UNIT_IN_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
TRUE, FALSE = ("1", "1.0", "true", "yes", "t", "y"), ("0", "0.0", "false", "no", "f", "n")
HOUR_MS = 3600 * 1000
MAX_NUMBER = 2.0**62
"""Nanoseconds since 1970 stay below it; a larger time or span is damage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where one canonical column comes from."""

    column: str | None = None
    """Name in the files."""
    value: Any = None
    """The same value for every row, instead of a column."""
    unit: str | None = None
    """Of a time or a span: s, ms, us, ns, or iso for text like 2026-01-31T08:00:00Z."""
    at_least: float | None = None
    """A signal that is 1 where the column, in milliseconds if `unit` is given, reaches this."""
    one_of: tuple[Any, ...] | None = None
    """A signal that is 1 where the column holds one of these."""
    split: str | None = None
    """Separator of a list in text."""
    hash: bool = False
    """Ids that are text or do not fit 64 bits."""
    type: str | None = None
    """Of a user column read from CSV: int or float; text unless given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableMap:
    """One table of a mapping file."""

    files: tuple[Location, ...]
    columns: dict[str, Source]
    utc_offset_h: float = 0.0
    """Hours by which the days of the partitions are ahead of UTC."""

    def needed(self) -> list[str]:
        """Columns to read from the files."""
        return list(dict.fromkeys(source.column for source in self.columns.values() if source.column is not None))


class MappingAdapter:
    """A source described by a mapping file. The file and every header are checked before any work starts."""

    def __init__(self, mapping_file: str | Location) -> None:
        self.name = "mapping"
        self.mapping_file = location(mapping_file)
        try:
            spec = tomllib.loads(self.mapping_file.read_text())
        except (tomllib.TOMLDecodeError, OSError) as error:
            raise SchemaError(f"{self.mapping_file}: not a readable TOML file ({error})") from error
        self._maps = {table: self._table_map(table, spec[table]) for table in spec}
        for table_map in self._maps.values():
            for file in table_map.files:
                found = csv_header(file) if file.suffix == ".csv" else parquet_columns(file)
                check_columns(file, found, table_map.needed())

    def tables(self) -> list[str]:
        return list(self._maps)

    def files(self, table: str) -> list[Location]:
        return list(self._maps[table].files)

    def context(self, table: str) -> list[Location]:
        return [self.mapping_file]

    def read(self, table: str, file: Location) -> Iterator[Chunk]:
        table_map = self._maps[table]
        chunks = (read_csv if file.suffix == ".csv" else read_parquet)(file, table_map.needed())
        for raw in chunks:
            columns = {name: _column(raw, table, name, source) for name, source in table_map.columns.items()}
            if table == "events":
                if "request_id" not in columns:
                    columns["request_id"] = f"{file.stem}:" + pl.Series(raw.lines).cast(pl.String)
                columns["date"] = _day(raw, columns["ts_ms"], table_map.utc_offset_h)
            yield raw.chunk(columns)

    def _table_map(self, table: str, spec: Any) -> TableMap:
        where = f"{self.mapping_file}: [{table}]"
        if table not in TABLES:
            raise SchemaError(f"{where} is not a table; choose from {', '.join(TABLES)}")
        if unknown := set(spec) - {"files", "columns", "utc_offset_h"}:
            raise SchemaError(f"{where} has unknown {sorted(unknown)}; known are files, columns, utc_offset_h")
        files = tuple(sorted(_matching(self.mapping_file.parent, spec.get("files", "")), key=str))
        if not files or any(file.suffix not in (".csv", ".parquet") for file in files):
            raise SchemaError(
                f"{where} files = {spec.get('files')!r} matches {len(files)} files, wanted .csv or .parquet"
            )
        columns = {name: _source(f"{where} {name}", entry) for name, entry in spec.get("columns", {}).items()}
        known = TABLES[table].names
        if table != "users" and (unknown := [name for name in columns if name not in known]):
            raise SchemaError(f"{where} maps {', '.join(unknown)}, unknown to the table; it has {', '.join(known)}")
        optional = ("request_id",) if table == "events" else ()
        for field in TABLES[table]:
            if not field.nullable and field.name not in (*columns, *optional):
                raise SchemaError(f"{where} must map {field.name}: name its column, or give it a value")
        return TableMap(files=files, columns=columns, utc_offset_h=float(spec.get("utc_offset_h", 0)))


def _matching(folder: Location, pattern: str) -> Iterable[Location]:
    """Files that match, relative to the folder; or below a URL, whose pattern begins at its first `*`."""
    if "://" in pattern:
        fixed, star, rest = pattern.partition("*")
        url, _, name = fixed.rpartition("/")
        folder, pattern = location(url), name + star + rest
    return folder.glob(pattern) if pattern else ()


def _source(where: str, entry: Any) -> Source:
    """'name' is short for { column = 'name' }."""
    if isinstance(entry, str):
        return Source(column=entry)
    known = [field.name for field in fields(Source)]
    if not isinstance(entry, dict) or (set(entry) - set(known)) or ("column" in entry) == ("value" in entry):
        raise SchemaError(f"{where} = {entry!r}: give a column's name, or a table with column or value and {known[2:]}")
    if entry.get("unit", "ms") not in (*UNIT_IN_MS, "iso"):
        raise SchemaError(f"{where} has unit {entry['unit']!r}; known are {', '.join(UNIT_IN_MS)} and iso")
    if entry.get("type", "int") not in ("int", "float"):
        raise SchemaError(f"{where} has type {entry['type']!r}; known are int and float")
    one_of = tuple(entry["one_of"]) if "one_of" in entry else None
    return Source(**{**entry, "one_of": one_of})


def _column(raw: RawChunk, table: str, name: str, source: Source) -> pl.Series:
    """One canonical column of a chunk; values that do not fit become faults of their rows."""
    wanted = TABLES[table].field(name).type if name in TABLES[table].names else None
    if source.column is None:
        return pl.Series([source.value]).new_from_index(0, len(raw.frame))
    values = raw.frame[source.column]
    if source.one_of is not None:
        return values.cast(pl.String).is_in([str(value) for value in source.one_of]).fill_null(False).cast(pl.Int8)
    if source.hash:
        hashes = pl.Series(hash_strings(values.cast(pl.String).to_list(), ID_HASH_SEED).view("int64"))
        return hashes.zip_with(values.is_not_null(), pl.Series([None], dtype=pl.Int64).new_from_index(0, len(values)))
    if source.unit is not None:
        number = _milliseconds(raw, source.column, source.unit)
        return number if source.at_least is None else (number >= source.at_least).cast(pl.Int8)
    if source.at_least is not None:
        return (_finite(raw, source.column) >= source.at_least).cast(pl.Int8)
    if wanted is None:
        return {"int": raw.whole, "float": raw.real, None: raw.frame.get_column}[source.type](source.column)
    if pa.types.is_list(wanted):
        return _list(raw, source.column, source.split or ",", wanted.value_type)
    if pa.types.is_boolean(wanted) or name in SIGNALS:
        return _truth(raw, source.column, signal=name in SIGNALS)
    if pa.types.is_integer(wanted):
        return raw.whole(source.column)
    return raw.real(source.column) if pa.types.is_floating(wanted) else values.cast(pl.String)


def _milliseconds(raw: RawChunk, column: str, unit: str) -> pl.Series:
    values = raw.frame[column]
    if values.dtype.is_temporal():
        return values.cast(pl.Datetime("ms")).dt.epoch("ms")
    if unit == "iso":
        parsed = values.str.to_datetime(time_unit="ms", time_zone="UTC", strict=False).dt.epoch("ms")
        raw.fault(f"{column} is not an ISO 8601 time", values.is_not_null() & parsed.is_null())
        return parsed
    return (_finite(raw, column) * UNIT_IN_MS[unit]).round().cast(pl.Int64, strict=False)


def _finite(raw: RawChunk, column: str) -> pl.Series:
    """Column as float64 in which a NaN or an absurd size is a fault of its row, not a very large number."""
    number = raw.real(column)
    raw.fault(f"{column} is not finite", ~(number.is_finite() & (number.abs() < MAX_NUMBER)))
    return number


def _list(raw: RawChunk, column: str, separator: str, kind: pa.DataType) -> pl.Series:
    values = raw.frame[column]
    if isinstance(values.dtype, pl.List | pl.Array):
        return values
    if pa.types.is_integer(kind):
        return raw.whole_list(column, separator)
    parts = values.cast(pl.String).str.split(separator).list.eval(pl.element().str.strip_chars())
    if pa.types.is_string(kind):
        return parts
    typed = parts.list.eval(pl.element().cast(pl.Float32, strict=False))
    raw.fault(f"{column} is not a list of numbers", typed.list.eval(pl.element().is_null()).list.any())
    return typed


def _truth(raw: RawChunk, column: str, *, signal: bool) -> pl.Series:
    """Yes and no in their usual spellings."""
    values = raw.frame[column]
    spellings = dict.fromkeys(TRUE, 1) | dict.fromkeys(FALSE, 0)
    text = values.cast(pl.String).str.to_lowercase()
    truth = text.replace_strict(spellings, default=None, return_dtype=pl.Int8)
    raw.fault(f"{column} is neither yes nor no", values.is_not_null() & truth.is_null())
    return truth if signal else truth.cast(pl.Boolean)


def _day(raw: RawChunk, ts_ms: pl.Series, utc_offset_h: float) -> pl.Series:
    local = ts_ms.clip(0, 2**52).fill_null(0) + int(utc_offset_h * HOUR_MS)
    return local.cast(pl.Datetime("ms")).dt.strftime("%Y-%m-%d")
