"""Reads the log that replay judges by: shown rows, their candidate sets, their rewards, checked row by row.

A log that breaks its contract is refused with the row and the reason; nothing is dropped or mended in silence.
Shapes: R requests, N shown rows ordered by (request, slot).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from features.schema import CANDIDATES, SIGNALS, VIDEOS
from pipelines.estimators import Floats, Slates
from pipelines.policies import History, LoggedRequests, Shown

WATCH_METRIC = "watch_s"
"""Seconds watched; every other metric is the name of a feedback signal."""

DAY_MS = 86_400_000
NEEDED = ("request_id", "user_id", "video_id", "ts_ms", "slot", "propensity")


class ReplayInputError(ValueError):
    """The log cannot be replayed; says which row and why. The CLI ends with exit code 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayLog:
    """One evaluated window of a dataset."""

    requests: LoggedRequests
    shown: Shown
    slates: Slates
    rewards: dict[str, Floats]
    """One reward a shown row, by metric."""
    history: History
    users: int
    first_ts_ms: int
    last_ts_ms: int
    fingerprint: str
    """sha256 over requests, candidates, slots, propensities and rewards: two reports with the same one saw one log."""


def read_log(
    dataset_dir: str | Path, metrics: tuple[str, ...], *, days: float | None = None, slots: int | None = None
) -> ReplayLog:
    """The requests of `dataset_dir` whose candidate sets were recorded; of those, the last `days` if given.

    Everything before the first of them is the policies' history. All rows are checked, then the first `slots` of each
    slate are kept.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots {slots}: judge at least the first slot")
    folder = Path(dataset_dir)
    unknown = [metric for metric in metrics if metric not in (*SIGNALS, WATCH_METRIC)]
    if unknown or not metrics:
        raise ReplayInputError(f"metric '{''.join(unknown[:1])}': known are {', '.join((*SIGNALS, WATCH_METRIC))}")
    candidates = _read_candidates(folder, days)
    start_ms = int(candidates["ts_ms"].to_numpy().min())
    events = _scan_events(folder, metrics)
    history = events.filter(pl.col("ts_ms") < start_ms).select("video_id", "ts_ms", *SIGNALS).collect()
    # A request belongs to the window when its first row does: one that began before it may have later rows inside.
    began_ms = pl.col("ts_ms").min().over("request_id")
    rows = _shown_rows(events.filter(began_ms >= start_ms), candidates, metrics)
    if slots is not None:
        rows = rows.filter(pl.col("slot") < slots)
    return _assemble(rows, candidates, metrics, History(events=history, videos=_read_videos(folder)))


def _read_candidates(folder: Path, days: float | None) -> pl.DataFrame:
    path = folder / "candidates.parquet"
    if not path.exists():
        raise ReplayInputError(f"{path}: not there; replay re-ranks what the logger chose from, so log candidate sets")
    missing = [name for name in CANDIDATES.names if name not in pl.read_parquet_schema(path)]
    if missing:
        raise ReplayInputError(f"{path}: no column {', '.join(missing)}")
    table = pl.read_parquet(path, columns=CANDIDATES.names).with_row_index("row")
    _refuse(table, pl.any_horizontal(pl.col("request_id", "user_id", "ts_ms", "video_ids").is_null()), path, "is null")
    _refuse(table, pl.col("request_id").is_duplicated(), path, "names a request that another row names too")
    _refuse(table, pl.col("video_ids").list.len() == 0, path, "has an empty candidate set")
    _refuse(
        table,
        pl.col("video_ids").list.len() != pl.col("video_ids").list.n_unique(),
        path,
        "lists a candidate twice, so its probability is not defined",
    )
    if not len(table):
        raise ReplayInputError(f"{path}: no rows; there is nothing to replay")
    if days is not None:
        table = table.filter(pl.col("ts_ms") > int(table["ts_ms"].to_numpy().max()) - round(days * DAY_MS))
    return table.drop("row").sort("request_id")


def _scan_events(folder: Path, metrics: tuple[str, ...]) -> pl.LazyFrame:
    files = sorted((folder / "events").glob("**/*.parquet"))
    if not files:
        raise ReplayInputError(f"{folder / 'events'}: no Parquet files; give the folder that holds events/date=*/")
    rewards = [_column_of(metric) for metric in metrics]
    columns = list(dict.fromkeys([*NEEDED, *SIGNALS, *rewards]))
    for file in files:
        missing = [name for name in columns if name not in pl.read_parquet_schema(file)]
        if missing:
            raise ReplayInputError(
                f"{file}: no column {', '.join(missing)}; see the events table in features/schema.py"
            )
    scan = pl.scan_parquet(files, include_file_paths="file", hive_partitioning=False)
    return scan.select("file", *columns).with_columns(row=pl.int_range(pl.len()).over("file"))


def _shown_rows(events: pl.LazyFrame, candidates: pl.DataFrame, metrics: tuple[str, ...]) -> pl.DataFrame:
    requests = candidates.lazy().select("request_id", candidate_user="user_id").with_row_index("request")
    rows = events.join(requests, on="request_id", how="left").collect()
    if not len(rows):
        raise ReplayInputError("no event belongs to the requests in candidates.parquet: are they of the same log?")
    p = pl.col("propensity")
    _refuse_event(rows, pl.col("request").is_null(), "its request has no row in candidates.parquet")
    _refuse_event(rows, pl.col("user_id") != pl.col("candidate_user"), "its user is not the request's")
    _refuse_event(rows, p.is_null() | p.is_nan(), "propensity is missing: the logger must record it")
    _refuse_event(rows, (p <= 0) | (p > 1), "propensity {propensity} lies outside (0, 1]")
    _refuse_event(rows, pl.col("slot").is_null() | (pl.col("slot") < 0), "slot is missing or negative")
    _refuse_event(rows, pl.struct("request_id", "slot").is_duplicated(), "another row has the same request and slot")
    for metric in metrics:
        _refuse_event(rows, pl.col(_column_of(metric)).is_null(), f"{_column_of(metric)} is null: it was not logged")
    rows = rows.sort("request", "slot")
    place = pl.int_range(pl.len()).over("request")
    _refuse_event(rows, pl.col("slot") != place, "a slot above it is not in the log: slots must run 0, 1, 2 ...")
    flat = candidates.select("request_id", video_id="video_ids").explode("video_id").with_row_index("candidate")
    rows = rows.join(flat, on=["request_id", "video_id"], how="left", maintain_order="left")
    _refuse_event(rows, pl.col("candidate").is_null(), "video {video_id} is not in its request's candidate set")
    _refuse_event(rows, pl.struct("request_id", "video_id").is_duplicated(), "video {video_id} is shown twice")
    return rows


def _assemble(rows: pl.DataFrame, candidates: pl.DataFrame, metrics: tuple[str, ...], history: History) -> ReplayLog:
    offsets = np.concatenate([[0], np.cumsum(candidates["video_ids"].list.len().to_numpy())]).astype(np.int64)
    users, user = np.unique(rows["user_id"].to_numpy(), return_inverse=True)
    request, slot = rows["request"].to_numpy().astype(np.int64), rows["slot"].to_numpy().astype(np.int64)
    candidate = rows["candidate"].to_numpy().astype(np.int64)
    video_ids = candidates["video_ids"].explode().to_numpy()
    logged = rows["propensity"].to_numpy()
    rewards = {metric: _reward(rows, metric) for metric in metrics}
    ids = "\n".join(candidates["request_id"]).encode()
    return ReplayLog(
        requests=LoggedRequests(
            request_id=candidates["request_id"].to_list(),
            user_id=candidates["user_id"].to_numpy(),
            ts_ms=candidates["ts_ms"].to_numpy(),
            surface=candidates["surface"].to_list(),
            offsets=offsets,
            video_ids=video_ids,
        ),
        shown=Shown(request=request, slot=slot, candidate=candidate),
        slates=Slates(request=request, slot=slot, user=user, logged=logged),
        rewards=rewards,
        history=history,
        users=len(users),
        first_ts_ms=int(rows["ts_ms"].to_numpy().min()),
        last_ts_ms=int(rows["ts_ms"].to_numpy().max()),
        fingerprint=_sha256(ids, offsets, video_ids, candidate, slot, logged, *(rewards[m] for m in sorted(rewards))),
    )


def _sha256(ids: bytes, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(ids)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _reward(rows: pl.DataFrame, metric: str) -> Floats:
    value = rows[_column_of(metric)].cast(pl.Float64).to_numpy()
    return value / 1000 if metric == WATCH_METRIC else value


def _column_of(metric: str) -> str:
    return "watch_ms" if metric == WATCH_METRIC else metric


def _read_videos(folder: Path) -> pl.DataFrame:
    path = folder / "videos.parquet"
    if not path.exists():
        return pl.DataFrame(schema={"video_id": pl.Int64, "upload_ts_ms": pl.Int64})
    kept = [name for name in VIDEOS.names if name not in ("content", "tags") and name in pl.read_parquet_schema(path)]
    return pl.read_parquet(path, columns=kept)


def _refuse(table: pl.DataFrame, bad: pl.Expr, path: Path, reason: str) -> None:
    found = table.filter(bad)
    if len(found):
        row = found.row(0, named=True)
        raise ReplayInputError(
            f"{path}: row {row['row']} (request {row['request_id']}) {reason}; {len(found)} such rows"
        )


def _refuse_event(rows: pl.DataFrame, bad: pl.Expr, reason: str) -> None:
    found = rows.filter(bad)
    if len(found):
        row = found.row(0, named=True)
        where = f"{row['file']}: row {row['row']} (request {row['request_id']}, slot {row['slot']})"
        raise ReplayInputError(f"{where}: {reason.format(**row)}; {len(found)} such rows of {len(rows)}")
