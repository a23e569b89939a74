"""Training data as memory-mapped arrays: encoded users and videos, histories, counters, and one example an impression.

E examples, S signals. Built once from the canonical tables, opened by every training worker and by evaluation; all
workers on a machine share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.arrays import in_folder, in_memory
from features.building import fill_followed, histories_and_counters, undated_examples
from features.counters import DailyCounters
from features.entities import Entities, mapped
from features.examples import EventPart, Examples, dates_of, encode_events, integers, parts_of
from features.follows import Follows
from features.history import HistoryLog
from features.inputs import UNKNOWN_UPLOAD, Inputs, UserRows, assemble
from features.pairs import PAST
from features.spec import FeatureSpec
from features.transforms import Encoder

DATES_FILE = "dates.json"
"""Written last."""


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
        events: pa.Table | Sequence[EventPart],
        undated: pa.Table | None,
        train_dates: tuple[str, ...],
        follows: pa.Table | None = None,
        author_feature: str = "author_id",
        tag_feature: str = "tags",
        encoder: Encoder | None = None,
        folder: Path | None = None,
        workers: int = 1,
    ) -> Dataset:
        """Encode the canonical tables. `events` carries a `date` column (string), or comes in parts that are read when
        they are needed; the encoder is fitted on, and known ids are taken from, the training dates (and undated
        impressions) alone, unless an `encoder` is carried on. Without `follows`, the events' own follow signals say who
        follows whom.

        With a `folder` the large arrays are made there, and the result is as `save` and `load` would give it, but was
        never in memory at once. `workers` threads share the parts of the events and the shards of the users; the result
        is the same, bit for bit, for any number of them.
        """
        allocate = in_memory if folder is None else in_folder(folder)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DATES_FILE).unlink(missing_ok=True)  # written last: without it there is no dataset
        parts = parts_of(events)
        dates = dates_of(parts)
        user_ids, video_ids = np.sort(integers(users, "user_id")), np.sort(integers(videos, "video_id"))
        examples = Examples.allocate(allocate, "examples", sum(part.rows for part in parts))
        seen = encode_events(
            parts, examples, spec, user_ids, video_ids, dates=dates, train_dates=train_dates, workers=workers
        )
        past = undated_examples(undated, user_ids, video_ids)
        seen.users[past.user_row], seen.videos[past.video_row] = True, True
        if encoder is None:
            encoder = Encoder.fit(
                spec, users, videos, seen_users=user_ids[seen.users[1:]], seen_videos=video_ids[seen.videos[1:]]
            )
        user_rows, video_rows = encoder.users(users), encoder.videos(videos)
        history, counters = histories_and_counters(
            past,
            examples,
            seen,
            users=user_rows,
            videos=video_rows,
            n_days=len(dates),
            author_feature=author_feature,
            tag_feature=tag_feature,
            allocate=allocate,
            workers=workers,
        )
        by_id = videos.select(["video_id", "author_id", "upload_ts_ms", "eligible"]).sort_by("video_id")
        author_id = np.concatenate([[0], integers(by_id, "author_id")])
        followed = Follows.build(user_rows, pa.concat_tables(seen.follows) if follows is None else follows)
        fill_followed(examples, followed, author_id, workers)
        dataset = cls(
            encoder=encoder,
            users=user_rows,
            videos=video_rows,
            upload_ts_ms=np.concatenate([[UNKNOWN_UPLOAD], integers(by_id, "upload_ts_ms", null=UNKNOWN_UPLOAD)]),
            author_id=author_id,
            eligible=np.concatenate([[False], by_id["eligible"].to_numpy()]),
            history=history,
            counters=counters,
            follows=followed,
            examples=examples,
            undated=past.take(np.flatnonzero(past.user_row > 0)),
            dates=dates,
        )
        if folder is None:
            return dataset
        dataset._save_rest(folder)
        return cls.load(folder)

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
        self.history.save(folder)
        self.counters.save(folder)
        self.examples.save(folder, "examples")
        self._save_rest(folder)

    def _save_rest(self, folder: Path) -> None:
        """What `build` does not make in its folder."""
        self.encoder.save(folder)
        self.users.save(folder, "users")
        self.videos.save(folder, "videos")
        self.follows.save(folder)
        for name in ("upload_ts_ms", "author_id", "eligible"):
            np.save(folder / f"videos_{name}.npy", getattr(self, name), allow_pickle=False)
        self.undated.save(folder, "undated")
        (folder / DATES_FILE).write_text(json.dumps(self.dates))

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
            examples=Examples.load(folder, "examples"),
            undated=Examples.load(folder, "undated"),
            dates=tuple(json.loads((folder / DATES_FILE).read_text())),
        )
