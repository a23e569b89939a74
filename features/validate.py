"""Rows that may be trusted: every canonical table is checked here, once, on its way in.

A table of the wrong shape (a column missing, a type that does not fit) is a SchemaError: nothing of it can be used.
A row that breaks a rule is set aside with its reason, never dropped and never trained on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from features.schema import MAX_AGE_YEARS, MAX_SAFETY_LEVEL, QUARANTINE_REASON, SIGNALS, TABLES

DAY_MS = 24 * 3600 * 1000
EARLIEST_TS_MS = 1_104_537_600_000
"""2005-01-01 UTC. Before it there was no online video to log; a time in seconds read as milliseconds falls in 1970."""
LATEST_TS_MS = 253_402_300_799_000
"""The end of the year 9999: a video may be available until then, but not later."""
PRIMARY_KEYS = {"videos": "video_id", "users": "user_id"}
"""Tables with one row a key; the first row of a key is kept."""


class SchemaError(ValueError):
    """A table that does not have the canonical shape; the message names file, column, what was found and the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validated:
    """A table split in two; together the halves hold every row that came in, each in input order."""

    good: pa.Table
    """Canonical types and column order."""
    quarantined: pa.Table
    """The same columns, integers as they came, and `reason`."""
    counts: dict[str, int]
    """Quarantined rows by reason; a row with several faults counts under the first."""
    kept: np.ndarray
    """Mask over the input rows: True where the row is in `good`."""


def validate(
    table_name: str,
    table: pa.Table,
    *,
    file: str = "table",
    seen: np.ndarray | None = None,
    now_ms: int | None = None,
) -> Validated:
    """Split one canonical table, or a part of it, into rows that keep its rules and rows that do not.

    `file` is what errors name; `seen` holds the primary keys that earlier parts of a keyed table have kept.
    """
    table = _conform(table_name, table, file)
    frame = pl.DataFrame(table)
    latest_ts_ms = (int(time.time() * 1000) if now_ms is None else now_ms) + DAY_MS
    rules = dict(_rules(table_name, frame, latest_ts_ms))
    if table_name in PRIMARY_KEYS:
        key = PRIMARY_KEYS[table_name]
        broken = pl.any_horizontal(rule.fill_null(False) for rule in rules.values())
        # Only rows that stand are compared: a broken first row must not cost the good second one its place.
        repeated = ~pl.col(key).is_first_distinct().over(broken)
        if seen is not None:
            repeated |= pl.col(key).is_in(pl.Series(seen))
        rules[f"{key} was already seen"] = repeated & ~broken
    reasons = list(rules)
    faults = frame.select(rule.fill_null(False).alias(reason) for reason, rule in rules.items())
    fault = np.full(len(table), -1)
    for index in reversed(range(len(reasons))):
        fault[faults[reasons[index]].to_numpy()] = index
    kept = fault < 0
    found = np.bincount(fault[~kept], minlength=len(reasons))
    bad_rows = table.filter(pa.array(~kept))
    named = pa.array([reasons[index] for index in fault[~kept]], pa.string())
    return Validated(
        good=table.filter(pa.array(kept)).cast(target_schema(table_name, table.schema)),
        quarantined=bad_rows.append_column(QUARANTINE_REASON, named),
        counts={reason: int(count) for reason, count in zip(reasons, found, strict=True) if count},
        kept=kept,
    )


def count_exact_duplicates(events: pa.Table) -> int:
    """Rows equal to an earlier row in everything but request_id. Real logs have them; they are kept, and counted."""
    compared = [name for name in events.column_names if name != "request_id"]
    return len(events) - pl.DataFrame(events.select(compared)).n_unique() if len(events) else 0


def target_schema(table_name: str, found: pa.Schema) -> pa.Schema:
    """The canonical schema of a table; `users` keeps whatever typed columns it came with."""
    canonical = TABLES[table_name]
    fields = [pa.field(field.name, field.type) for field in canonical]
    if table_name == "users":
        fields += [pa.field(field.name, field.type) for field in found if field.name not in canonical.names]
    return pa.schema(fields)


def _conform(table_name: str, table: pa.Table, file: str) -> pa.Table:
    """Canonical column order, optional columns filled with nulls, types widened where nothing can be lost."""
    if table_name not in TABLES:
        raise SchemaError(f"{file}: {table_name!r} is not a canonical table; these are: {', '.join(TABLES)}")
    canonical = TABLES[table_name]
    names = table.column_names
    for field in canonical:
        if field.name not in names and not field.nullable:
            raise SchemaError(
                f"{file}: {table_name} lacks the required column {field.name} (found: {', '.join(names)}); "
                "add it to the source or map another column to it"
            )
    extra = [name for name in names if name not in canonical.names]
    if extra and table_name != "users":
        raise SchemaError(
            f"{file}: {table_name} has columns that the schema does not know: {', '.join(extra)}; "
            "map them to canonical columns, or leave them out of the mapping"
        )
    columns, fields = [], []
    for field in [*canonical, *[table.schema.field(name) for name in extra]]:
        column = table[field.name] if field.name in names else pa.chunked_array([pa.nulls(len(table), field.type)])
        column = _widen(column, field, f"{file}: {table_name}.{field.name}", free=field.name in extra)
        columns.append(column)
        fields.append(pa.field(field.name, column.type))
    return pa.table(columns, schema=pa.schema(fields))


def _widen(
    column: pa.ChunkedArray | pa.Array, field: pa.Field, where: str, *, free: bool
) -> pa.ChunkedArray | pa.Array:
    found, wanted = column.type, field.type
    if pa.types.is_dictionary(found):
        column = column.cast(found.value_type)
        found = column.type
    if free:
        if pa.types.is_large_string(found) or pa.types.is_string_view(found):
            return column.cast(pa.string())
        if pa.types.is_boolean(found):
            return column.cast(pa.int8())
        if pa.types.is_null(found):
            return column.cast(pa.string())
        if pa.types.is_string(found) or pa.types.is_integer(found) or pa.types.is_floating(found):
            return column
        raise SchemaError(f"{where} is {found}; user columns are strings, integers or floats: cast it, or leave it out")
    if pa.types.is_null(found) or found == wanted:
        return column.cast(wanted)
    if pa.types.is_integer(wanted) and (pa.types.is_integer(found) or pa.types.is_boolean(found)):
        # Kept as wide as it came until the rules have seen it: 300 is a fault of its row, not of the table.
        return column.cast(pa.int64()) if not pa.types.is_uint64(found) else _from_uint64(column, where)
    same_family = (
        (pa.types.is_floating(wanted) and (pa.types.is_floating(found) or pa.types.is_integer(found)))
        or (pa.types.is_string(wanted) and (pa.types.is_large_string(found) or pa.types.is_string_view(found)))
        or (pa.types.is_list(wanted) and _is_list(found) and _values_fit(found.value_type, wanted.value_type))
    )
    if not same_family:
        raise SchemaError(f"{where} is {found}, expected {wanted}: cast it in the source, or map another column")
    return column.cast(wanted)


def _from_uint64(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{where} holds unsigned ids above 2**63-1: store them as signed 64-bit integers") from error


def _is_list(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)


def _values_fit(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_null(found):
        return True
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    return pa.types.is_integer(found) or (pa.types.is_floating(wanted) and pa.types.is_floating(found))


def _rules(table_name: str, frame: pl.DataFrame, latest_ts_ms: int) -> Iterator[tuple[str, pl.Expr]]:
    """(reason, which rows break the rule), most telling reason first. A null breaks no rule but the first."""
    for field in TABLES[table_name]:
        if not field.nullable:
            yield f"{field.name} is null", pl.col(field.name).is_null()
    for name, dtype in frame.schema.items():
        if dtype.is_float():
            yield f"{name} is not finite", ~pl.col(name).is_finite()
        if name in ("ts_ms", "upload_ts_ms"):
            yield f"{name} is outside 2005-01-01 to tomorrow", ~pl.col(name).is_between(EARLIEST_TS_MS, latest_ts_ms)
        if name == "watch_ms":
            yield "watch_ms is negative", pl.col(name) < 0
            yield "watch_ms is longer than 24 hours", pl.col(name) > DAY_MS
        if name == "duration_ms":
            yield "duration_ms is zero or negative", pl.col(name) <= 0
        if name == "propensity":
            yield "propensity is outside (0, 1]", (pl.col(name) <= 0) | (pl.col(name) > 1)
        if name in ("slot", "position"):
            yield f"{name} is outside 0 to 2**31-1", ~pl.col(name).is_between(0, 2**31 - 1)
        if name in SIGNALS and table_name != "users":
            yield f"{name} is not 0, 1 or null", ~pl.col(name).is_in([0, 1])
        if isinstance(dtype, pl.List):
            yield f"{name} holds a null", pl.col(name).list.eval(pl.element().is_null()).list.any()
    if table_name == "videos":
        yield from _limit_rules()
        finite = pl.col("content").list.eval(pl.element().is_finite()).list.all()
        yield "content is not finite", ~finite
        width = pl.col("content").list.len()
        yield "content is not as wide as most", width != width.drop_nulls().mode().sort().last()
    if table_name == "candidates":
        yield "video_ids is empty", pl.col("video_ids").list.len() == 0


def _limit_rules() -> Iterator[tuple[str, pl.Expr]]:
    """A limit that cannot be read must set its video aside: to let it pass would be to show it to anybody."""
    for name in ("available_from_ms", "available_until_ms"):
        yield f"{name} is outside the years 2005 to 9999", ~pl.col(name).is_between(EARLIEST_TS_MS, LATEST_TS_MS)
    begin, end = pl.col("available_from_ms"), pl.col("available_until_ms")
    yield "available_until_ms is not after available_from_ms", end <= begin
    yield f"min_age is outside 0 to {MAX_AGE_YEARS}", ~pl.col("min_age").is_between(0, MAX_AGE_YEARS)
    yield f"safety_level is outside 0 to {MAX_SAFETY_LEVEL}", ~pl.col("safety_level").is_between(0, MAX_SAFETY_LEVEL)
    yield "language is empty", pl.col("language").str.strip_chars() == ""
    yield "regions holds an empty name", pl.col("regions").list.eval(pl.element().str.strip_chars() == "").list.any()
