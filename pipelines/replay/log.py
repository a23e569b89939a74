"""Reads the log that replay judges by: shown rows, their candidate sets, their rewards, checked row by row.

A log that breaks its contract is refused with the row and the reason; nothing is dropped or mended in silence. Logs
of any size are read in parts of whole requests (`spill.py`). R requests, N shown rows ordered by (request, slot).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.schema import CANDIDATES, NOT_JUDGED, SESSION_CANDIDATES, SIGNALS, VIDEOS
from pipelines.replay.checks import ReplayInputError, check_candidates, check_shown, check_slots, refuse_labels
from pipelines.replay.policies import History
from pipelines.replay.rewards import METRICS, reward
from pipelines.replay.slates import Ints, LoggedRequests, Shard, Slates
from pipelines.replay.spill import Divided, Part, frame, parts_for

DAY_MS = 86_400_000
NEEDED = ("request_id", "user_id", "video_id", "ts_ms", "slot", "propensity")
OPTIONAL = ("author_id", "surface", "connected", "watch_ms", "duration_ms")
_BATCH_REQUESTS = 1 << 13


class ReplayLog(Protocol):
    """A log that can be judged."""

    history: History
    default_metrics: tuple[str, ...]
    metrics: tuple[str, ...]
    """What is asked of it, the guardrails' rewards last."""

    def shards(self) -> Iterator[Shard]:
        """The evaluated window, part by part."""
        ...

    def outcomes(self) -> pl.LazyFrame:
        """user_id, video_id, slot and one column a metric of every shown row: what a reward model learns from."""
        ...

    def not_judged(self) -> dict[str, int]:
        """Requests of the parts read so far that are known to have no candidate set, by reason."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Which of the log is judged."""

    days: float | None = None
    """The log's last days only."""
    slots: int | None = None
    """The first slots of each slate only: weights multiply down the slate, so fewer slots need a shorter log."""

    def __post_init__(self) -> None:
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots {self.slots}: judge at least the first slot")
        if self.days is not None and not self.days > 0:
            raise ValueError(f"days {self.days}: judge more than nothing")


class CanonicalLog:
    """A folder of canonical tables: events with propensities, and the candidate sets of the requests to judge.

    Everything before the first of those requests is the policies' history.
    """

    default_metrics: tuple[str, ...] = ("long_view", "watch_s")

    def __init__(
        self, folder: str | Path, metrics: tuple[str, ...], window: Window, extra: tuple[str, ...] = ()
    ) -> None:
        """`metrics` must be logged in every row; `extra` are taken where they are."""
        self._folder, self._window = Path(folder), window
        self.metrics, self._extra = metrics, tuple(m for m in extra if m not in metrics)
        self._candidates_path = self._folder / "candidates.parquet"
        self._check_tables()
        start_ms = self._start_ms()
        self._videos = _read_videos(self._folder)
        self._uploads = self._videos.select("video_id", "upload_ts_ms")
        recent = [file for file in self._files if _newest_ms(file) >= start_ms - DAY_MS]
        self._parts = parts_for(sum(pq.read_metadata(file).num_rows for file in recent))
        self._start, self._recent = start_ms, recent
        before = pl.scan_parquet(self._files, hive_partitioning=False).filter(pl.col("ts_ms") < start_ms)
        kept = [name for name in ("user_id", "video_id", "author_id", "ts_ms", *SIGNALS) if name in self._columns]
        everything = pl.scan_parquet(self._files, hive_partitioning=False)
        self.history = History(events=before.select(kept), videos=self._videos, start_ms=start_ms, log=everything)
        self._not_judged: Counter[str] = Counter()
        self._scratch = tempfile.TemporaryDirectory(prefix="reelrank-replay-")
        # A request belongs to the window when it was asked in it; what it showed may come later. So the day before is
        # looked at too, to tell requests that began there from those without a candidate set.
        self._events = Divided(
            recent,
            self._columns,
            self._parts,
            Path(self._scratch.name) / "events",
            keep=lambda table: _since(table, start_ms - DAY_MS),
        )
        self._others = Divided(
            [path for path in [self._folder / "not_judged.parquet"] if path.exists()],
            NOT_JUDGED.names,
            self._parts,
            Path(self._scratch.name) / "others",
        )
        self._candidates = Divided(
            [self._candidates_path],
            self._candidate_columns,
            self._parts,
            Path(self._scratch.name) / "candidates",
            keep=lambda table: _since(table, start_ms - DAY_MS),
            batch_rows=_BATCH_REQUESTS,
        )

    def shards(self) -> Iterator[Shard]:
        """Checked parts of the window; raises ReplayInputError at the first row that breaks the contract."""
        found = False
        for index in range(self._parts):
            table, events = self._candidates.part(index), self._events.part(index)
            candidates = frame(table if table is not None else CANDIDATES.empty_table())
            check_candidates(candidates, self._candidates_path)
            judged = candidates.filter(pl.col("ts_ms") >= self._start).sort("request_id")
            events = self._set_aside(events, index)
            rows = self._shown_rows(events, candidates, judged)
            if rows is not None and len(rows):
                found = True
                yield self._shard(rows, judged, Part(index, self._parts))
        if not found:
            raise ReplayInputError("no event belongs to the requests in candidates.parquet: are they of the same log?")

    def outcomes(self) -> pl.LazyFrame:
        """Outcomes of the window and of the day before it."""
        scan = pl.scan_parquet(self._recent, hive_partitioning=False).filter(pl.col("ts_ms") >= self._start - DAY_MS)
        signals = [pl.col(METRICS[m][0]).cast(pl.Float64).alias(m) for m in self.metrics if m in SIGNALS]
        others = [m for m in self.metrics if m not in SIGNALS]
        if others:
            scan = scan.join(self._uploads.lazy(), on="video_id", how="left")
        signals += [_expression(m).alias(m) for m in others]
        return scan.select("user_id", "video_id", "slot", *signals)

    def not_judged(self) -> dict[str, int]:
        """From `not_judged.parquet`: a server's log says itself what it cannot answer for."""
        return dict(self._not_judged)

    def _set_aside(self, events: pa.Table | None, index: int) -> pa.Table | None:
        """The events without those of requests that are known to have no candidate set; the window's are counted."""
        others = self._others.part(index)
        if events is None or others is None:
            return events
        found = frame(events).join(frame(others).select("request_id", "reason"), on="request_id", how="inner")
        asked = found.group_by("request_id").agg(pl.col("reason").first(), ts_ms=pl.col("ts_ms").min())
        self._not_judged.update(asked.filter(pl.col("ts_ms") >= self._start)["reason"].fill_null("unknown").to_list())
        known = pc.is_in(events["request_id"], value_set=others["request_id"].combine_chunks())  # pyright: ignore[reportAttributeAccessIssue]
        return events.filter(pc.invert(known))  # pyright: ignore[reportAttributeAccessIssue]

    def _check_tables(self) -> None:
        if not self._candidates_path.exists():
            raise ReplayInputError(
                f"{self._candidates_path}: not there; replay re-ranks what the logger chose from, so log candidate sets"
            )
        names = pq.read_schema(self._candidates_path).names
        missing = [name for name in CANDIDATES.names if name not in names]
        if missing:
            raise ReplayInputError(f"{self._candidates_path}: no column {', '.join(missing)}")
        refuse_labels(self._candidates_path, names)
        self._candidate_columns = [name for name in SESSION_CANDIDATES.names if name in names]
        self._files = sorted((self._folder / "events").glob("**/*.parquet"))
        if not self._files:
            raise ReplayInputError(f"{self._folder / 'events'}: no Parquet files; give the folder that holds events/")
        from_videos = {"upload_ts_ms"}
        needed = dict.fromkeys((*NEEDED, *SIGNALS, *(c for m in self.metrics for c in METRICS[m])))
        needed = [name for name in needed if name not in from_videos]
        known = set(pq.read_schema(self._files[0]).names)
        self._columns = [*needed, *(name for name in OPTIONAL if name in known and name not in needed)]
        for file in self._files:
            columns = set(pq.read_schema(file).names)
            missing = [name for name in self._columns if name not in columns]
            if missing:
                raise ReplayInputError(
                    f"{file}: no column {', '.join(missing)}; see the events table in features/schema.py"
                )

    def _start_ms(self) -> int:
        ts_ms = pq.read_table(self._candidates_path, columns=["ts_ms"])["ts_ms"]
        if not len(ts_ms):
            raise ReplayInputError(f"{self._candidates_path}: no rows; there is nothing to replay")
        known, days = ts_ms.drop_null().to_numpy(), self._window.days
        return int(known.min(initial=2**62)) if days is None else int(known.max(initial=0)) - round(days * DAY_MS) + 1

    def _shown_rows(
        self, events: pa.Table | None, candidates: pl.DataFrame, judged: pl.DataFrame
    ) -> pl.DataFrame | None:
        """The window's rows among `events`, with `request`, checked and in order."""
        if events is None:
            return None
        rows = frame(events)
        asked = candidates.select("request_id", asked_ms="ts_ms")
        rows = rows.join(asked, on="request_id", how="left", maintain_order="left")
        began_ms = pl.coalesce("asked_ms", pl.col("ts_ms").min().over("request_id"))
        requests = judged.select("request_id", candidate_user="user_id").with_row_index("request")
        rows = rows.filter(began_ms >= self._start)
        rows = rows.join(requests, on="request_id", how="left", maintain_order="left")
        files = [str(file) for file in self._recent]
        needed = [c for m in self.metrics for c in METRICS[m] if c != "upload_ts_ms"]
        check_shown(rows, files, needed)
        rows = rows.sort("request", "slot")
        check_slots(rows, files)
        if self._window.slots is not None:
            rows = rows.filter(pl.col("slot") < self._window.slots)
        return rows.join(self._uploads, on="video_id", how="left", maintain_order="left")

    def _shard(self, rows: pl.DataFrame, candidates: pl.DataFrame, part: Part) -> Shard:
        lengths = candidates["video_ids"].list.len().to_numpy()
        requests = LoggedRequests(
            request_id=candidates["request_id"].to_list(),
            user_id=candidates["user_id"].to_numpy(),
            ts_ms=candidates["ts_ms"].to_numpy(),
            surface=candidates["surface"].to_list(),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            video_ids=candidates["video_ids"].explode(empty_as_null=False).to_numpy(),
            session_ids=_session_ids(candidates),
            part=part,
        )
        files = [str(file) for file in self._recent]
        return assemble(rows, requests, (*self.metrics, *self._extra), files)


def assemble(rows: pl.DataFrame, requests: LoggedRequests, metrics: tuple[str, ...], files: list[str]) -> Shard:
    """Ordered shown rows (with `request`) and their requests as arrays; finds each row's video among the candidates."""
    users, user = np.unique(rows["user_id"].to_numpy(), return_inverse=True)
    request, slot = rows["request"].to_numpy().astype(np.int64), rows["slot"].to_numpy().astype(np.int64)
    candidate = _locate(rows["video_id"].to_numpy(), request, slot, requests)
    lost = rows.filter(pl.Series(candidate < 0))
    if len(lost):
        row = lost.row(0, named=True)
        raise ReplayInputError(
            f"{files[row['file']]}: row {row['row']} (request {row['request_id']}, slot {row['slot']}): video "
            f"{row['video_id']} is not in its request's candidate set; {len(lost)} such rows of {len(rows)}"
        )
    slates = Slates(request=request, slot=slot, user=user, logged=rows["propensity"].to_numpy(), candidate=candidate)
    rewards = {metric: reward(rows, metric) for metric in metrics}
    return Shard(requests=requests, slates=slates, user_ids_U=users, rewards=rewards, rows=rows)


def _locate(video_N: Ints, request_N: Ints, slot_N: Ints, requests: LoggedRequests) -> Ints:
    """Flat index of each shown video among its request's candidates, -1 where it is none of them."""
    candidate_N = np.full(len(video_N), -1, dtype=np.int64)
    counts, request_C = np.diff(requests.offsets), requests.request_of_candidate()
    for slot in range(int(slot_N.max(initial=-1)) + 1):
        rows = np.flatnonzero(slot_N == slot)
        row_of_request = np.full(len(counts), -1, dtype=np.int64)
        row_of_request[request_N[rows]] = rows
        row_C = row_of_request[request_C]
        hit = np.flatnonzero((row_C >= 0) & (video_N[row_C] == requests.video_ids))
        candidate_N[row_C[hit]] = hit
    return candidate_N


def _session_ids(candidates: pl.DataFrame) -> list[list[int]] | None:
    if "session_ids" not in candidates.columns:
        return None
    return [ids or [] for ids in candidates["session_ids"].to_list()]


def _since(table: pa.Table, first_ms: int) -> pa.Table:
    """The rows from `first_ms` on, and those without a time, which the checks will name."""
    ts_ms = table["ts_ms"].to_numpy()
    return table.filter(pa.array(~(ts_ms < first_ms)))


def _newest_ms(file: Path) -> int:
    """The latest ts_ms that the file's own statistics admit; files without statistics are read."""
    meta = pq.read_metadata(file)
    column = meta.schema.names.index("ts_ms")
    groups = [meta.row_group(i).column(column).statistics for i in range(meta.num_row_groups)]
    if any(s is None or not s.has_min_max for s in groups):
        return np.iinfo(np.int64).max
    return max((int(s.max) for s in groups), default=0)


def _expression(metric: str) -> pl.Expr:
    """The metric of a row as a polars expression, for scans."""
    columns = list(METRICS[metric])
    return pl.struct(columns).map_batches(lambda s: pl.Series(reward(s.struct.unnest(), metric)), pl.Float64)


def _read_videos(folder: Path) -> pl.DataFrame:
    path = folder / "videos.parquet"
    if not path.exists():
        return pl.DataFrame(schema={"video_id": pl.Int64, "upload_ts_ms": pl.Int64})
    kept = [name for name in VIDEOS.names if name in pq.read_schema(path).names]
    return pl.read_parquet(path, columns=kept)
