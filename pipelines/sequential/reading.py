"""Interaction files of the public benchmarks as one table of user, item and order.

Parquet; CSV or TSV, with a header or without (columns are then called 0, 1, 2 ...); MovieLens' `ratings.dat`
(user::item::rating::timestamp); S3-Rec's text lines (user item item item ..., oldest first).
"""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl

MOVIELENS = ["user_id", "item_id", "rating", "timestamp"]


def read_columns(file: Path, user: str, item: str, order: str, where: str) -> pl.DataFrame:
    """Columns `user`, `item` and, unless the file's own order is all there is, `order` as a number."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: --data takes one interaction file")
    first = b"" if file.suffix == ".parquet" else _first_line(file)
    separator = next((s for s in (b"::", b"\t", b",") if s in first), b"")
    if file.suffix != ".parquet" and not separator:
        return _read_lines(file)
    frame = pl.read_parquet(file) if file.suffix == ".parquet" else _read_separated(file, first, separator)
    frame = _filtered(file, frame, where)
    for name in filter(None, (user, item, order)):
        _check(file, frame, name)
    columns = {"user": _whole_numbers(frame[user]), "item": _whole_numbers(frame[item])}
    for name, values in columns.items():
        if values.null_count():
            raise ValueError(f"{file}: {values.null_count()} rows without a {name}; remove them")
    if order:
        columns["order"] = _number(file, frame[order], order)
    return pl.DataFrame(columns)


def _first_line(file: Path) -> bytes:
    with file.open("rb") as handle:
        line = handle.readline().strip()
    if not line:
        raise ValueError(f"{file}: the first line is empty; expected interactions")
    return line


def _read_separated(file: Path, first: bytes, separator: bytes) -> pl.DataFrame:
    """All columns as text."""
    data, mark = file.read_bytes(), separator
    if separator == b"::":
        data, mark = data.replace(b"::", b"\t"), b"\t"
    fields = first.split(separator)
    headed = not all(_is_number(field) for field in fields)
    frame = pl.read_csv(
        io.BytesIO(data), separator=mark.decode(), has_header=headed and separator != b"::", infer_schema=False
    )
    if separator == b"::":
        return frame.rename(dict(zip(frame.columns, MOVIELENS, strict=False)))
    return frame if headed else frame.rename({name: str(at) for at, name in enumerate(frame.columns)})


def _read_lines(file: Path) -> pl.DataFrame:
    """S3-Rec: a user and its items, a line each, in order."""
    users, items = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        user, *sequence = line.split() or [""]
        if not sequence:
            raise ValueError(f"{file}, line {number}: {line[:60]!r} has no items; expected: user item item ...")
        users.extend([user] * len(sequence))
        items.extend(sequence)
    return pl.DataFrame({"user": _whole_numbers(pl.Series(users)), "item": _whole_numbers(pl.Series(items))})


def _filtered(file: Path, frame: pl.DataFrame, where: str) -> pl.DataFrame:
    if not where:
        return frame
    column, separator, value = where.partition("=")
    if not separator:
        raise ValueError(f"source.where {where!r}: write it as COLUMN=VALUE")
    _check(file, frame, column)
    return frame.filter(frame[column].cast(pl.String) == value)


def _check(file: Path, frame: pl.DataFrame, name: str) -> None:
    if name not in frame.columns:
        raise ValueError(f"{file} has no column {name!r}; it has {', '.join(frame.columns)} (--user, --item, --order)")


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole_numbers(values: pl.Series) -> pl.Series:
    """Ids as int64 where all of them are, so that they sort as numbers; otherwise as they are."""
    typed = values.cast(pl.Int64, strict=False)
    return typed if typed.null_count() == values.null_count() else values.cast(pl.String)


def _number(file: Path, values: pl.Series, name: str) -> pl.Series:
    """Whole numbers stay exact; anything that is none raises, with its row."""
    whole = values.cast(pl.Int64, strict=False)
    if not values.dtype.is_float() and not whole.null_count():
        return whole
    real = values.cast(pl.Float64, strict=False).fill_nan(None)
    if real.null_count():
        row = int(real.is_null().arg_max() or 0)
        raise ValueError(f"{file}, row {row + 1}: {name} is {values[row]!r}; expected a number to sort by")
    return real
