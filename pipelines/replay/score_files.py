"""Policies that somebody else computed, read from a Parquet file of scores or of probabilities.

Three layouts, told apart by their columns:
- request_id, video_id, score: one row a candidate;
- request_id, scores: one row a request, the list in the order of the request's logged candidates (fast);
- request_id, slot, probability: the policy's probability of each logged video given the slots above it.
C candidates, N shown rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipelines.replay.checks import refuse_labels
from pipelines.replay.slates import Floats, LoggedRequests, Slates
from pipelines.replay.spill import BATCH_ROWS, Divided, Part, frame

_BATCH_REQUESTS = 1 << 13


def open_score_file(path: Path) -> ScoreFile | ActionProbabilities:
    """The policy in `path`; raises ValueError when its columns fit no layout."""
    columns = set(pq.read_schema(path).names)
    refuse_labels(path, sorted(columns))
    if {"request_id", "slot", "probability"} <= columns:
        return ActionProbabilities(path)
    if {"request_id", "scores"} <= columns:
        return ScoreFile(path, ("request_id", "scores"), _BATCH_REQUESTS)
    missing = [column for column in ("request_id", "video_id", "score") if column not in columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; a score file has request_id, video_id, score (one row a "
            "candidate), or request_id, scores (a list a request), or request_id, slot, probability"
        )
    return ScoreFile(path, ("request_id", "video_id", "score"))


class _Parts:
    """A file divided as the log is, once, when its first part is asked for."""

    def __init__(self, path: Path, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> None:
        self._path, self._columns, self._batch_rows = path, columns, batch_rows
        self._divided: dict[int, Divided] = {}
        self._scratch: tempfile.TemporaryDirectory | None = None

    def read(self, part: Part) -> pl.DataFrame:
        if part.of not in self._divided:
            self._scratch = tempfile.TemporaryDirectory(prefix="reelrank-replay-")
            folder = Path(self._scratch.name) / "parts"
            self._divided = {part.of: Divided([self._path], self._columns, part.of, folder, None, self._batch_rows)}
        table = self._divided[part.of].part(part.index)
        if table is None:
            table = pq.read_schema(self._path).empty_table().select(list(self._columns))
        return frame(table).with_columns(pl.col("request_id").cast(pl.String))


class ScoreFile:
    """Scores of candidates: the higher, the more often shown."""

    def __init__(self, path: Path, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> None:
        self.name = path.stem
        self._path = path
        self._lists = "scores" in columns
        self._parts = _Parts(path, columns, batch_rows)

    def values(self, requests: LoggedRequests) -> Floats:
        """The file's scores; a candidate without one, or with two, is an error that names it."""
        table = self._parts.read(requests.part)
        return self._from_lists(table, requests) if self._lists else self._from_rows(table, requests)

    def _from_lists(self, table: pl.DataFrame, requests: LoggedRequests) -> Floats:
        wanted = pl.DataFrame({"request_id": pl.Series(requests.request_id, dtype=pl.String)})
        _refuse_twice(table, ["request_id"], self._path)
        found = wanted.join(table, on="request_id", how="left", maintain_order="left")
        sizes = found["scores"].list.len()
        wrong = np.flatnonzero(sizes.fill_null(0).to_numpy() != np.diff(requests.offsets))
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"{self._path}: request {requests.request_id[i]} has {sizes[i] or 0} scores for "
                f"{requests.offsets[i + 1] - requests.offsets[i]} candidates ({wrong.size} such requests): write one "
                "score for every logged candidate, in the order of video_ids"
            )
        flat = found["scores"].explode(empty_as_null=False).cast(pl.Float64)
        bad = np.flatnonzero(~np.isfinite(flat.fill_null(np.nan).to_numpy()))
        if bad.size:
            request = int(np.searchsorted(requests.offsets, bad[0], side="right")) - 1
            raise ValueError(
                f"{self._path}: no finite score for request {requests.request_id[request]}, video "
                f"{requests.video_ids[bad[0]]} ({bad.size} of {len(flat)} candidates)"
            )
        return flat.to_numpy()

    def _from_rows(self, table: pl.DataFrame, requests: LoggedRequests) -> Floats:
        _refuse_twice(table, ["request_id", "video_id"], self._path)
        ids = pl.Series(requests.request_id, dtype=pl.String).gather(requests.request_of_candidate())
        wanted = pl.DataFrame({"request_id": ids, "video_id": requests.video_ids})
        found = wanted.join(table, on=["request_id", "video_id"], how="left", maintain_order="left")
        score = pl.col("score").cast(pl.Float64)
        bad = found.filter(pl.col("score").is_null() | ~score.is_finite())
        if len(bad):
            raise ValueError(
                f"{self._path}: no finite score for request {bad[0, 'request_id']}, video {bad[0, 'video_id']} "
                f"({len(bad)} of {len(found)} candidates): write one row for every logged candidate"
            )
        return found["score"].cast(pl.Float64).to_numpy()


class ActionProbabilities:
    """Probabilities of what was logged: enough for importance weights, nothing that needs the other candidates."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._path = path
        self._parts = _Parts(path, ("request_id", "slot", "probability"))

    def probability(self, requests: LoggedRequests, slates: Slates) -> Floats:
        """(N,) the file's probability of each shown row; one outside [0, 1] or missing is an error that names it."""
        table = self._parts.read(requests.part).with_columns(pl.col("slot").cast(pl.Int64))
        _refuse_twice(table, ["request_id", "slot"], self._path)
        ids = pl.Series(requests.request_id, dtype=pl.String).gather(slates.request)
        wanted = pl.DataFrame({"request_id": ids, "slot": slates.slot})
        found = wanted.join(table, on=["request_id", "slot"], how="left", maintain_order="left")
        p = pl.col("probability")
        bad = found.filter(p.is_null() | ~p.is_between(0, 1))
        if len(bad):
            raise ValueError(
                f"{self._path}: request {bad[0, 'request_id']}, slot {bad[0, 'slot']}: probability "
                f"{bad[0, 'probability']} is missing or outside [0, 1]; {len(bad)} such rows of {len(found)}"
            )
        return found["probability"].cast(pl.Float64).to_numpy()


def _refuse_twice(table: pl.DataFrame, key: list[str], path: Path) -> None:
    twice = table.filter(table.select(key).is_duplicated())
    if len(twice):
        where = ", ".join(f"{name.removesuffix('_id')} {twice[0, name]}" for name in key)
        raise ValueError(f"{path}: two rows for {where}; {len(twice)} such rows")
