"""KuaiRand's own CSV files as canonical tables: FOLDER/data/*.csv, or FOLDER/*.csv; also with the complete download.

N rows of one chunk. What is chosen here, and why:
- an impression's partition is the log's own `date` (server days, UTC+8, which `time_ms` crosses by up to two hours);
- `duration_ms` 0 means a photo post, and becomes null;
- a video is eligible when its visible_status is 0 (every video of KuaiRand-Pure) or "public";
- of the undated impressions 2,555 repeat a (user, video) under another label: labels right, order a guess;
- clicks of the undated impressions come from the list of clicked pairs up to 04-21. The impressions run on to 04-24
  without days, but in order: up to a user's last one that the list holds, one that it does not hold was no click;
  beyond it nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from features.validate import SchemaError
from pipelines.adapters import Chunk
from pipelines.adapters.reading import RawChunk, check_columns, csv_header, read_csv, read_parquet
from pipelines.storage import Location, location

SIGNAL_COLUMNS = {
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "share": "is_forward",
    "profile_enter": "is_profile_enter",
    "hate": "is_hate",
}
LOG_COLUMNS = (
    *("user_id", "video_id", "date", "time_ms", "play_time_ms", "duration_ms", "is_rand", "tab"),
    *SIGNAL_COLUMNS.values(),
)
VIDEO_COLUMNS = (
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type"),
    *("visible_status", "video_duration", "music_id", "tag"),
)
USER_COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_LABELS = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"),
    *(f"onehot_feat{index}" for index in range(18)),
)
CLICKED = "standard_clicks_0408_0421.parquet"
UNDATED_COLUMNS = ("user_id", "video_id", "seq_pos", "long_view", "is_like")
PUBLIC = ("0", "0.0", "public")
CHINA_OFFSET_MS = 8 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class KuaiRandAdapter:
    """A KuaiRand folder. Headers are checked at once, so a wrong file is named before any work starts."""

    root: Location
    name: str = "kuairand"

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", location(self.root))
        for table, columns in (
            ("events", LOG_COLUMNS),
            ("videos", VIDEO_COLUMNS),
            ("users", ("user_id", *USER_LABELS)),
        ):
            for file in self.files(table):
                check_columns(file, csv_header(file), columns)

    def tables(self) -> list[str]:
        return ["users", "videos", "events", *(["undated"] if self.files("undated") else [])]

    def files(self, table: str) -> list[Location]:
        if table == "undated":
            # These impressions end where the partial log begins; with the complete log they would count twice.
            complete = list(self._folder().glob("log_standard_4_08_to_4_21_*.csv"))
            found = self.root / "reconstructed" / "train_impressions_last50.parquet"
            return [found] if found.exists() and not complete else []
        pattern = {"events": "log_*.csv", "videos": "video_features_basic_*.csv", "users": "user_features_*.csv"}[table]
        found = sorted(self._folder().glob(pattern), key=str)
        if not found:
            raise SchemaError(
                f"{self._folder()}: no {pattern} there for {table}; point at the folder that holds KuaiRand's data/ "
                "(download: https://kuairand.com)"
            )
        return found

    def context(self, table: str) -> list[Location]:
        """Authors of impressions come from the videos, clicks of the undated ones from a list of their own."""
        if table == "undated":
            return [clicks for file in self.files(table) if (clicks := file.with_name(CLICKED)).exists()]
        return self.files("videos") if table == "events" else []

    def read(self, table: str, file: Location) -> Iterator[Chunk]:
        if table == "events":
            authors = self._authors()
            yield from (_events(raw, file.stem, authors) for raw in read_csv(file, LOG_COLUMNS))
        elif table == "videos":
            yield from (_videos(raw) for raw in read_csv(file, VIDEO_COLUMNS))
        elif table == "users":
            yield from (_users(raw) for raw in read_csv(file, ("user_id", *USER_COUNTS, *USER_LABELS)))
        else:
            clicked = self._clicked(file)
            yield from (_undated(raw, clicked) for raw in read_parquet(file, UNDATED_COLUMNS))

    def _clicked(self, undated: Location) -> pl.DataFrame | None:
        """user_id, video_id, until: clicked pairs, and the position up to which the list knows the user's clicks."""
        file = undated.with_name(CLICKED)
        if not file.exists():
            return None
        pairs = pl.concat([raw.frame for raw in read_parquet(file, ("user_id", "video_id"))]).cast(pl.Int64).unique()
        shown = [raw.frame for raw in read_parquet(undated, ("user_id", "video_id", "seq_pos"))]
        hits = pl.concat(shown).cast(pl.Int64).join(pairs, on=["user_id", "video_id"], how="semi")
        return pairs.join(hits.group_by("user_id").agg(until=pl.col("seq_pos").max()), on="user_id")

    def _folder(self) -> Location:
        return self.root / "data" if (self.root / "data").is_dir() else self.root

    def _authors(self) -> pl.DataFrame:
        """video_id -> author_id, for the join of the log; rows that cannot be read are reported with `videos`."""
        chunks = [raw for file in self.files("videos") for raw in read_csv(file, ("video_id", "author_id"))]
        pairs = [pl.DataFrame({name: raw.whole(name) for name in ("video_id", "author_id")}) for raw in chunks]
        return pl.concat(pairs).drop_nulls().unique("video_id", keep="first", maintain_order=True)


def _events(raw: RawChunk, stem: str, authors: pl.DataFrame) -> Chunk:
    size = len(raw.frame)
    video_id, duration_ms = raw.whole("video_id"), raw.whole("duration_ms")
    author_id = video_id.to_frame("video_id").join(authors, on="video_id", how="left", maintain_order="left")[
        "author_id"
    ]
    day = raw.frame["date"].str.to_date("%Y%m%d", strict=False)
    raw.fault("date is not a day like 20220425", day.is_null())
    policy = raw.whole("is_rand").replace_strict({0: "standard", 1: "random"}, default=None, return_dtype=pl.String)
    raw.fault("is_rand is not 0 or 1", policy.is_null())
    return raw.chunk(
        {
            "request_id": f"{stem}:" + pl.Series(raw.lines).cast(pl.String),
            "user_id": raw.whole("user_id"),
            "video_id": video_id,
            "author_id": author_id,
            "ts_ms": raw.whole("time_ms"),
            "surface": "tab" + raw.whole("tab").cast(pl.String),
            "slot": pl.Series([None] * size, dtype=pl.Int32),
            "source": policy,
            "policy_id": policy,
            "watch_ms": raw.whole("play_time_ms"),
            "duration_ms": duration_ms.set(duration_ms == 0, None),
            **{signal: raw.whole(column) for signal, column in SIGNAL_COLUMNS.items()},
            "date": day.dt.strftime("%Y-%m-%d"),
        }
    )


def _videos(raw: RawChunk) -> Chunk:
    day = raw.frame["upload_dt"].str.to_datetime("%Y-%m-%d", strict=False)
    raw.fault("upload_dt is not a day like 2022-04-10", raw.frame["upload_dt"].is_not_null() & day.is_null())
    return raw.chunk(
        {
            "video_id": raw.whole("video_id"),
            "author_id": raw.whole("author_id"),
            "upload_ts_ms": day.dt.epoch("ms") - CHINA_OFFSET_MS,
            "duration_ms": raw.whole("video_duration"),
            "music_id": raw.whole("music_id"),
            "video_type": raw.frame["video_type"],
            "upload_type": raw.frame["upload_type"],
            "tags": raw.whole_list("tag", ","),
            "eligible": raw.frame["visible_status"].is_in(PUBLIC).fill_null(False),
        }
    )


def _users(raw: RawChunk) -> Chunk:
    """Counts as integers; labels as strings, written the same whether the file says 1 or 1.0."""
    labels = {name: raw.frame[name].str.replace(r"^(-?\d+)\.0$", "$1") for name in USER_LABELS}
    return raw.chunk({"user_id": raw.whole("user_id"), **{name: raw.whole(name) for name in USER_COUNTS}, **labels})


def _undated(raw: RawChunk, clicked: pl.DataFrame | None) -> Chunk:
    columns = {
        "user_id": raw.whole("user_id"),
        "video_id": raw.whole("video_id"),
        "position": raw.whole("seq_pos"),
        "long_view": raw.whole("long_view"),
        "like": raw.whole("is_like"),
    }
    if clicked is not None:
        rows = pl.DataFrame({name: columns[name].cast(pl.Int64) for name in ("user_id", "video_id", "position")})
        until = clicked.group_by("user_id").agg(pl.col("until").first())
        pairs = clicked.select("user_id", "video_id", click=pl.lit(1, pl.Int8))
        rows = rows.join(until, on="user_id", how="left", maintain_order="left")
        rows = rows.join(pairs, on=["user_id", "video_id"], how="left", maintain_order="left")
        known = pl.when(pl.col("position") <= pl.col("until")).then(pl.col("click").fill_null(0))
        columns["click"] = rows.select(known.alias("click"))["click"]
    return raw.chunk(columns)
