"""Training data as memory-mapped arrays: encoded users and videos, histories, counters, and one example an impression.

E examples, S signals. Built once from the canonical tables, opened by every training worker and by evaluation; all
workers on a machine share its pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.counters import BEFORE, DailyCounters, count_days
from features.entities import Entities, mapped
from features.follows import Follows
from features.history import UNDATED_TS_MS, HistoryLog, signal_bits, watch_fraction
from features.inputs import UNKNOWN_UPLOAD, Inputs, UserRows, assemble
from features.pairs import PAST
from features.schema import SIGNALS
from features.spec import FeatureSpec
from features.transforms import Encoder


@dataclass(frozen=True, slots=True)
class Examples:
    """Impressions."""

    user_row: np.ndarray
    video_row: np.ndarray
    ts_ms: np.ndarray
    day: np.ndarray
    """(E,) int64, index into `Dataset.dates`; BEFORE for those that precede the log."""
    history_end: np.ndarray
    """(E,) int64, position in the history log one past the last event the impression may see."""
    surface: np.ndarray
    slot: np.ndarray
    signals: np.ndarray
    """(E, S) float32, NaN for not logged."""
    watch_ms: np.ndarray
    """(E,) float32, NaN for not logged."""
    duration_ms: np.ndarray
    followed: np.ndarray
    """(E,) bool, whether the user followed the author strictly before the impression."""

    def __len__(self) -> int:
        return len(self.user_row)

    def take(self, rows_B: np.ndarray) -> Examples:
        """These impressions, in this order."""
        return Examples(*(np.asarray(getattr(self, f.name)[rows_B]) for f in fields(self)))

    def __add__(self, other: Examples) -> Examples:
        return Examples(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Dataset:
    """Everything a training task or an evaluation reads."""

    encoder: Encoder
    users: Entities
    videos: Entities
    upload_ts_ms: np.ndarray
    """(videos + 1,) int64 by video row; UNKNOWN_UPLOAD where not known."""
    author_id: np.ndarray
    """(videos + 1,) int64 by video row; 0 where not known."""
    eligible: np.ndarray
    """(videos + 1,) bool by video row."""
    history: HistoryLog
    counters: DailyCounters
    follows: Follows
    examples: Examples
    """Dated, in the order of the canonical table (by date, then file order)."""
    undated: Examples
    """Impressions that precede the log, by user and position: no time, surface, slot or watch time is known of them."""
    dates: tuple[str, ...]

    @classmethod
    def build(
        cls,
        spec: FeatureSpec,
        *,
        users: pa.Table,
        videos: pa.Table,
        events: pa.Table,
        undated: pa.Table | None,
        train_dates: tuple[str, ...],
        follows: pa.Table | None = None,
        author_feature: str = "author_id",
        tag_feature: str = "tags",
        encoder: Encoder | None = None,
    ) -> Dataset:
        """Encode the canonical tables. `events` carries a `date` column (string); the encoder is fitted on, and
        known ids are taken from, the training dates (and undated impressions) alone, unless there is an `encoder` to be
        carried on. Without `follows`, the events' own follow signals say who follows whom."""
        dates = tuple(sorted(set(events["date"].to_pylist())))
        if undated is not None:
            undated = undated.sort_by([("user_id", "ascending"), ("position", "ascending")])
        if encoder is None:
            encoder = Encoder.fit(
                spec,
                users,
                videos,
                seen_users=ids_on(events, train_dates, "user_id", undated),
                seen_videos=ids_on(events, train_dates, "video_id", undated),
            )
        user_rows, video_rows = encoder.users(users), encoder.videos(videos)
        followed = Follows.build(user_rows, follows, events)
        return _with_events(
            encoder, user_rows, video_rows, videos, events, undated, followed, dates, author_feature, tag_feature
        )

    def rows_on(self, dates: tuple[str, ...]) -> np.ndarray:
        """Examples of these dates (row numbers, ascending)."""
        wanted = [self.dates.index(date) for date in dates]
        return np.flatnonzero(np.isin(self.examples.day, wanted))

    def inputs(
        self,
        rows_B: np.ndarray,
        *,
        extra_rows_X: np.ndarray | None = None,
        with_slot: bool = True,
        counters_day: int | None = None,
    ) -> Inputs:
        """One context and one candidate an example. `with_slot=False` hides the slot, as serving does;
        `counters_day` holds the counters at that day's view, as a bundle does that was made on the day before."""
        e = self.examples.take(rows_B)
        day = e.day if counters_day is None else np.minimum(e.day, counters_day)
        slot = e.slot if with_slot else np.zeros(len(rows_B), np.int64)
        return self.inputs_of(replace(e, day=day, slot=slot), extra_rows_X)

    def inputs_of(
        self,
        e: Examples,
        extra_rows_X: np.ndarray | None = None,
        *,
        history: bool = True,
        pairs: bool = True,
    ) -> Inputs:
        """One context and one candidate an impression; without histories, or counters of pairs, for a model that does
        not read them: gathering them is most of the work."""
        length = self.encoder.spec.history_length if history else 0
        past = self.history.windows(e.user_row, e.history_end, max(PAST, length) if pairs else length)
        return assemble(
            user=UserRows.take(self.users, e.user_row),
            user_counters_BC=self.counters.user(e.day, e.user_row),
            surface_B=e.surface,
            now_ms_B=e.ts_ms,
            history=past.last(length),
            past=past.last(PAST) if pairs else None,
            videos=self.videos,
            candidate_rows_N=e.video_row,
            owner_N=np.arange(len(e)),
            candidate_counters_NC=self.counters.video(e.day, e.video_row),
            candidate_upload_ts_ms_N=self.upload_ts_ms[e.video_row],
            slot_N=e.slot,
            followed_N=e.followed,
            extra_rows_X=extra_rows_X,
        )

    def save(self, folder: Path) -> None:
        """Write everything as .npy and .json into `folder` (created)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder)
        self.users.save(folder, "users")
        self.videos.save(folder, "videos")
        self.history.save(folder)
        self.counters.save(folder)
        self.follows.save(folder)
        for name in ("upload_ts_ms", "author_id", "eligible"):
            np.save(folder / f"videos_{name}.npy", getattr(self, name), allow_pickle=False)
        for name in ("examples", "undated"):
            for field in fields(Examples):
                values = getattr(getattr(self, name), field.name)
                np.save(folder / f"{name}_{field.name}.npy", values, allow_pickle=False)
        (folder / "dates.json").write_text(json.dumps(self.dates))

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Memory-map what `save` wrote."""
        encoder = Encoder.load(folder)

        def array(name: str) -> np.ndarray:
            return mapped(folder / f"{name}.npy")

        return cls(
            encoder=encoder,
            users=Entities.load(folder, "users", encoder.columns("user")),
            videos=Entities.load(folder, "videos", encoder.columns("video")),
            upload_ts_ms=array("videos_upload_ts_ms"),
            author_id=array("videos_author_id"),
            eligible=array("videos_eligible"),
            history=HistoryLog.load(folder),
            counters=DailyCounters.load(folder),
            follows=Follows.load(folder),
            examples=Examples(**{f.name: array(f"examples_{f.name}") for f in fields(Examples)}),
            undated=Examples(**{f.name: array(f"undated_{f.name}") for f in fields(Examples)}),
            dates=tuple(json.loads((folder / "dates.json").read_text())),
        )


def ids_on(events: pa.Table, dates: tuple[str, ...], column: str, undated: pa.Table | None = None) -> np.ndarray:
    """Ids of the events of these dates, and of the undated impressions; repeats and all."""
    dated = events.filter(pa.array(np.isin(np.array(events["date"].to_pylist()), np.array(dates))))
    return np.concatenate([_ids(table, column) for table in (dated, undated) if table is not None])


def signals_of(table: pa.Table) -> np.ndarray:
    """Signal columns -> (rows, S) float32, NaN for null."""
    return np.stack([table[s].cast(pa.float32()).to_numpy().astype(np.float32) for s in SIGNALS], axis=1)


def _with_events(
    encoder: Encoder,
    users: Entities,
    videos: Entities,
    video_table: pa.Table,
    events: pa.Table,
    undated: pa.Table | None,
    follows: Follows,
    dates: tuple[str, ...],
    author_feature: str,
    tag_feature: str,
) -> Dataset:
    n = events.num_rows
    user_row, video_row = users.rows_of(_ids(events, "user_id")), videos.rows_of(_ids(events, "video_id"))
    ts_ms, day = _ids(events, "ts_ms"), np.searchsorted(np.array(dates), np.array(events["date"].to_pylist()))
    signals, watch, duration = signals_of(events), _floats(events, "watch_ms"), _floats(events, "duration_ms")
    past_users, past_videos = np.zeros(0, np.int64), np.zeros(0, np.int64)
    past_signals = np.zeros((0, len(SIGNALS)), np.float32)
    if undated is not None:
        past_users, past_videos = users.rows_of(_ids(undated, "user_id")), videos.rows_of(_ids(undated, "video_id"))
        past_signals = signals_of(undated)
    history = HistoryLog.build(
        n_users=len(users),
        user_row=np.concatenate([past_users, user_row]),
        video_row=np.concatenate([past_videos, video_row]),
        ts_ms=np.concatenate([np.full(len(past_users), UNDATED_TS_MS), ts_ms]),
        signals=signal_bits(np.concatenate([past_signals, signals])),
        watch_fraction=np.concatenate([np.zeros(len(past_users), np.float32), watch_fraction(watch, duration)]),
    )
    counters = count_days(
        users=users,
        videos=videos,
        author_feature=author_feature,
        tag_feature=tag_feature,
        n_days=len(dates),
        day_N=np.concatenate([np.full(len(past_users), BEFORE), day]),
        user_row_N=np.concatenate([past_users, user_row]),
        video_row_N=np.concatenate([past_videos, video_row]),
        signals_NS=np.concatenate([past_signals, signals]),
    )
    by_id = video_table.sort_by("video_id")
    author_id = np.concatenate([[0], _ids(by_id, "author_id")])
    examples = Examples(
        user_row=user_row,
        video_row=video_row,
        ts_ms=ts_ms,
        day=day.astype(np.int64),
        history_end=history.ends_at(user_row, ts_ms),
        surface=encoder.surface_rows(events["surface"].to_pylist()),
        slot=encoder.slot_rows(events["slot"].fill_null(-1).to_numpy()) if n else np.zeros(0, np.int64),
        signals=signals,
        watch_ms=watch,
        duration_ms=duration,
        followed=follows.at(user_row, author_id[video_row], ts_ms),
    )
    nothing = np.full(len(past_users), np.nan, np.float32)
    zeros = np.zeros(len(past_users), np.int64)
    past = Examples(
        user_row=past_users,
        video_row=past_videos,
        ts_ms=zeros + UNDATED_TS_MS,
        day=zeros + BEFORE,
        history_end=history.user_start[past_users] + _places(past_users),
        surface=zeros,
        slot=zeros,
        signals=past_signals,
        watch_ms=nothing,
        duration_ms=nothing,
        followed=zeros.astype(bool),
    )
    return Dataset(
        encoder=encoder,
        users=users,
        videos=videos,
        upload_ts_ms=np.concatenate([[UNKNOWN_UPLOAD], _ids(by_id, "upload_ts_ms", null=UNKNOWN_UPLOAD)]),
        author_id=author_id,
        eligible=np.concatenate([[False], by_id["eligible"].to_numpy(zero_copy_only=False)]),
        history=history,
        counters=counters,
        follows=follows,
        examples=examples,
        undated=past.take(np.flatnonzero(past_users > 0)),
        dates=dates,
    )


def _places(owner_N: np.ndarray) -> np.ndarray:
    """Running number of each row among its owner's; rows of one owner stand together."""
    first_N = np.flatnonzero(np.concatenate([[True], owner_N[1:] != owner_N[:-1]])[: len(owner_N)])
    return np.arange(len(owner_N)) - np.repeat(first_N, np.diff(np.append(first_N, len(owner_N))))


def _ids(table: pa.Table, column: str, null: int = 0) -> np.ndarray:
    return table[column].fill_null(null).to_numpy().astype(np.int64, copy=False)


def _floats(table: pa.Table, column: str) -> np.ndarray:
    return table[column].cast(pa.float32()).to_numpy().astype(np.float32)
