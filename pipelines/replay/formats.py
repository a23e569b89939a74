"""Public logs read as they are published: the Open Bandit Dataset, and KuaiRand's log of random exposures.

Both become one-slot requests with their candidate sets and propensities, so everything else is the same. They are read
whole: a campaign of the Open Bandit Dataset, or KuaiRand's random log, fits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from features.schema import SIGNALS
from pipelines.replay.checks import ReplayInputError, check_shown
from pipelines.replay.log import CanonicalLog, ReplayLog, Window, assemble
from pipelines.replay.policies import History
from pipelines.replay.rewards import METRICS, reward
from pipelines.replay.slates import LoggedRequests, Shard
from pipelines.replay.spill import ROWS_A_PART, Part

KUAIRAND_SIGNALS = {
    "is_click": "click", "long_view": "long_view", "is_like": "like", "is_follow": "follow", "is_comment": "comment",
    "is_forward": "share", "is_profile_enter": "profile_enter", "is_hate": "hate",
}  # fmt: skip
CANDIDATES_A_PART = 20_000_000
"""KuaiRand's sets are users' random impressions: a part holds so many candidates."""


def open_log(path: Path, metrics: tuple[str, ...] | None, window: Window, extra: tuple[str, ...] = ()) -> ReplayLog:
    """The log at `path`: a folder of canonical tables, an Open Bandit campaign (`.../bts/men`, or its CSV file), or
    KuaiRand's `log_random_*.csv`. Raises ReplayInputError when it is none of them."""
    if path.suffix == ".csv" and "log_random" in path.name:
        return RandomExposures([path], metrics, window, extra)
    if path.suffix == ".csv":
        return OpenBandit(path, metrics, window, extra)
    if (path / "events").exists() or (path / "candidates.parquet").exists():
        return CanonicalLog(path, metrics or CanonicalLog.default_metrics, window, extra)
    campaign = path / f"{path.name}.csv"
    if campaign.exists():
        return OpenBandit(campaign, metrics, window, extra)
    random = sorted([*path.glob("log_random_*.csv"), *path.glob("data/log_random_*.csv")])
    if random:
        return RandomExposures(random, metrics, window, extra)
    raise ReplayInputError(
        f"{path}: no log found; give a folder with events/ and candidates.parquet, an Open Bandit campaign "
        "(a folder NAME with NAME.csv), or KuaiRand's log_random_*.csv"
    )


class OpenBandit:
    """One campaign of the Open Bandit Dataset (Saito et al., 2020): a row an impression, any of the items possible.

    The three positions of a page were filled independently and rows do not say which belong together, nor whose they
    are: every row is a request, and a user, of its own.
    """

    default_metrics: tuple[str, ...] = ("click",)

    def __init__(self, file: Path, metrics: tuple[str, ...] | None, window: Window, extra: tuple[str, ...]) -> None:
        needed = ("timestamp", "item_id", "position", "click", "propensity_score")
        table = _read_csv(file, needed)
        self.metrics = metrics or self.default_metrics
        unknown = [m for m in self.metrics if m != "click"]
        if unknown:
            raise ReplayInputError(f"{file}: metric {unknown[0]} is not in the Open Bandit Dataset, which logs clicks")
        ts_ms = table["timestamp"].str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", time_zone="UTC").dt.epoch("ms")
        n = len(table)
        self._file, self._extra = file, extra
        self._rows = pl.DataFrame(
            {
                "request_id": [f"{i:09d}" for i in range(n)],
                "user_id": np.arange(n),
                "video_id": table["item_id"].cast(pl.Int64),
                "ts_ms": ts_ms,
                "slot": np.zeros(n, dtype=np.int64),
                "propensity": table["propensity_score"],
                "surface": "position " + table["position"].cast(pl.String),
                "click": table["click"].cast(pl.Int8),
                "file": np.zeros(n, dtype=np.int32),
                "row": np.arange(n),
                "request": np.arange(n),
                "candidate_user": np.arange(n),
            }
        )
        if window.days is not None:
            newest = int(ts_ms.to_numpy().max())
            self._rows = self._rows.filter(pl.col("ts_ms") > newest - round(window.days * 86_400_000))
            self._rows = self._rows.with_columns(request=pl.int_range(pl.len()))
        self._items = _items(file, table)
        videos = pl.DataFrame({"video_id": self._items})
        self.history = History(events=_no_history(), videos=videos)

    def shards(self) -> Iterator[Shard]:
        """The whole log at once."""
        rows, items = self._rows, self._items
        check_shown(rows, [str(self._file)], ["click"])
        requests = LoggedRequests(
            request_id=rows["request_id"].to_list(),
            user_id=rows["user_id"].to_numpy(),
            ts_ms=rows["ts_ms"].to_numpy(),
            surface=rows["surface"].to_list(),
            offsets=np.arange(len(rows) + 1) * len(items),
            video_ids=np.tile(items, len(rows)),
        )
        yield assemble(rows, requests, (*self.metrics, *self._extra), [str(self._file)])

    def not_judged(self) -> dict[str, int]:
        """None."""
        return {}

    def outcomes(self) -> pl.LazyFrame:
        """Clicks."""
        return self._rows.lazy().select("user_id", "video_id", "slot", pl.col("click").cast(pl.Float64))


class RandomExposures:
    """KuaiRand's random log (Gao et al., CIKM 2022): videos of a pool shown in place of a recommendation, all alike.

    No propensity is logged, and choosing among the whole pool nearly no row would match. So a user's random
    impressions are the candidate set of each of them, any of them equally likely (1 / their number): a policy is worth
    what its choice among videos earned that this user was shown for no reason.
    """

    default_metrics: tuple[str, ...] = ("long_view", "watch_s")

    def __init__(
        self, files: list[Path], metrics: tuple[str, ...] | None, window: Window, extra: tuple[str, ...]
    ) -> None:
        self.metrics, self._extra = metrics or self.default_metrics, extra
        self._files = files
        needed = ("user_id", "video_id", "time_ms", "play_time_ms", "duration_ms", "tab", *KUAIRAND_SIGNALS)
        tables = [_read_csv(f, needed).select(needed).with_row_index("row").with_columns(file=pl.lit(i))
                  for i, f in enumerate(files)]  # fmt: skip
        names = {"time_ms": "ts_ms", "play_time_ms": "watch_ms", **KUAIRAND_SIGNALS}
        rows = pl.concat(tables).rename(names).with_columns(
            pl.col("user_id", "video_id", "ts_ms", "watch_ms", "duration_ms").cast(pl.Int64),
            pl.col(SIGNALS).cast(pl.Int8),
            surface="tab " + pl.col("tab").cast(pl.String),
        )  # fmt: skip
        if window.days is not None:
            rows = rows.filter(pl.col("ts_ms") > pl.col("ts_ms").max() - round(window.days * 86_400_000))
        # The file holds exact duplicates; a video shown twice to a user is one candidate, its first showing counts.
        self._rows = rows.unique(["user_id", "video_id"], keep="first", maintain_order=True).sort(
            "user_id", "ts_ms", "video_id"
        ).with_columns(
            request_id=pl.format("{}-{}", "user_id", "video_id"), slot=pl.lit(0, dtype=pl.Int64),
            propensity=1.0 / pl.len().over("user_id"), candidate_user="user_id",
        )  # fmt: skip
        self.history = History(events=_no_history(), videos=pl.DataFrame(schema={"video_id": pl.Int64}))

    def shards(self) -> Iterator[Shard]:
        """Whole users at a time."""
        size = self._rows.group_by("user_id", maintain_order=True).agg(n=pl.len())["n"].to_numpy()
        load = np.cumsum(size.astype(np.float64) ** 2) / CANDIDATES_A_PART
        part_U = np.maximum(np.floor(load), np.floor(np.cumsum(size) / ROWS_A_PART)).astype(np.int64)
        part_N = np.repeat(np.unique(part_U, return_inverse=True)[1], size)
        parts = int(part_N.max()) + 1
        for i in range(parts):
            yield self._shard(self._rows.filter(pl.Series(part_N == i)), Part(i, parts))

    def not_judged(self) -> dict[str, int]:
        """None."""
        return {}

    def outcomes(self) -> pl.LazyFrame:
        """The metrics of every row."""
        found = {m: reward(self._rows, m) for m in self.metrics}
        return self._rows.select("user_id", "video_id", "slot").with_columns(**found).lazy()

    def _shard(self, rows: pl.DataFrame, part: Part) -> Shard:
        rows = rows.with_columns(request=pl.int_range(pl.len()))
        files = [str(f) for f in self._files]
        check_shown(rows, files, [c for m in self.metrics for c in METRICS[m]])
        n = rows.select(n=pl.len().over("user_id"))["n"].to_numpy().astype(np.int64)
        first = np.flatnonzero(np.diff(rows["user_id"].to_numpy(), prepend=-1) != 0)
        start = np.repeat(first, np.diff(first, append=len(rows)))
        offsets = np.concatenate([[0], np.cumsum(n)])
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n)
        requests = LoggedRequests(
            request_id=rows["request_id"].to_list(),
            user_id=rows["user_id"].to_numpy(),
            ts_ms=rows["ts_ms"].to_numpy(),
            surface=rows["surface"].to_list(),
            offsets=offsets,
            video_ids=rows["video_id"].to_numpy()[np.repeat(start, n) + place],
            part=part,
        )
        return assemble(rows, requests, (*self.metrics, *(m for m in self._extra if m not in self.metrics)), files)


def _items(file: Path, table: pl.DataFrame) -> np.ndarray:
    """The campaign's items: those of item_context.csv where it lies beside, else those that were shown."""
    context = file.parent / "item_context.csv"
    known = _read_csv(context, ("item_id",)) if context.exists() else table
    return known["item_id"].cast(pl.Int64).unique().sort().to_numpy()


def _no_history() -> pl.LazyFrame:
    columns = dict.fromkeys(("video_id", "ts_ms"), pl.Int64) | dict.fromkeys(SIGNALS, pl.Int8)
    return pl.LazyFrame(schema=columns)


def _read_csv(file: Path, needed: tuple[str, ...]) -> pl.DataFrame:
    if not file.exists():
        raise ReplayInputError(f"{file}: not there")
    table = pl.read_csv(file, infer_schema_length=10_000)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ReplayInputError(f"{file}: no column {', '.join(missing)}; is it the file as published?")
    return table
