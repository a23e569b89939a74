"""The contract of a replay log, row by row. The first row that breaks it is named, with the reason and the count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from features.schema import SIGNALS

LABELS = (*SIGNALS, "watch_ms")


class ReplayInputError(ValueError):
    """The log cannot be replayed; says which row and why. The CLI ends with exit code 2."""


def refuse_labels(path: Path, columns: Sequence[str]) -> None:
    """What policies choose from must not hold what came of the choice."""
    found = [name for name in columns if name in LABELS]
    if found:
        raise ReplayInputError(
            f"{path}: column {', '.join(found)} is an outcome; a policy that reads it has seen the answers. Keep "
            "outcomes in events only"
        )


def check_candidates(table: pl.DataFrame, path: Path) -> None:
    """One row a request, with a candidate set of distinct videos."""
    needed = pl.col("request_id", "user_id", "ts_ms", "video_ids")
    _refuse(table, pl.any_horizontal(needed.is_null()), path, "is null in request_id, user_id, ts_ms or video_ids")
    _refuse(table, pl.col("request_id").is_duplicated(), path, "names a request that another row names too")
    lists = pl.col("video_ids").list
    _refuse(table, lists.len() == 0, path, "has an empty candidate set")
    twice = lists.len() != lists.n_unique()
    _refuse(table, twice, path, "lists a candidate twice, so its probability is not defined")


def check_shown(rows: pl.DataFrame, files: Sequence[str], needed: Sequence[str]) -> None:
    """Rows as read, with `request` (its row among the candidates) and `candidate_user`; `needed` must not be null."""
    p = pl.col("propensity")
    _refuse_event(rows, files, pl.col("request").is_null(), "its request has no row in candidates.parquet")
    _refuse_event(rows, files, pl.col("user_id") != pl.col("candidate_user"), "its user is not the request's")
    _refuse_event(rows, files, p.is_null() | p.is_nan(), "propensity is missing: the logger must record it")
    _refuse_event(rows, files, (p <= 0) | (p > 1), "propensity {propensity} lies outside (0, 1]")
    _refuse_event(rows, files, pl.col("slot").is_null() | (pl.col("slot") < 0), "slot is missing or negative")
    again = pl.struct("request_id", "slot").is_duplicated()
    _refuse_event(rows, files, again, "another row has the same request and slot")
    for column in dict.fromkeys(needed):
        value = pl.col(column)
        bad = value.is_null() | value.is_nan() if rows[column].dtype.is_float() else value.is_null()
        _refuse_event(rows, files, bad, f"{column} is null: it was not logged")


def check_slots(rows: pl.DataFrame, files: Sequence[str]) -> None:
    """Rows ordered by request and slot: no gaps, and no video twice in a slate."""
    place = pl.int_range(pl.len()).over("request")
    gap = pl.col("slot") != place
    _refuse_event(rows, files, gap, "a slot above it is not in the log: slots must run 0, 1, 2 ...")
    _refuse_event(rows, files, pl.struct("request", "video_id").is_duplicated(), "video {video_id} is shown twice")


def _refuse(table: pl.DataFrame, bad: pl.Expr, path: Path, reason: str) -> None:
    found = table.filter(bad)
    if len(found):
        row = found.row(0, named=True)
        raise ReplayInputError(
            f"{path}: row {row['row']} (request {row['request_id']}) {reason}; {len(found)} such rows"
        )


def _refuse_event(rows: pl.DataFrame, files: Sequence[str], bad: pl.Expr, reason: str) -> None:
    found = rows.filter(bad)
    if len(found):
        row = found.row(0, named=True)
        where = f"{files[row['file']]}: row {row['row']} (request {row['request_id']}, slot {row['slot']})"
        raise ReplayInputError(f"{where}: {reason.format(**row)}; {len(found)} such rows of {len(rows)}")
