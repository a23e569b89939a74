"""One version of the feed in memory: towers, ranker, index, features, histories, sources and configuration together.

`write_bundle` lays the folder out, `FeedBundle.load` opens a verified one. Arrays are memory-mapped and by row (V
videos and U users, row 0 unknown); nothing in a loaded bundle ever changes, so threads share it. `serving.live` makes
of it one that takes uploads, by exchanging the columns of videos, the rules and the channels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from candidate_gen.allowed import Eligibility
from candidate_gen.index import VideoIndex
from candidate_gen.infer import Towers
from candidate_gen.sources import Source, UploadOrders
from features.artifacts import Bundle
from features.dataset import Dataset
from features.eligibility import Attributes
from features.entities import ByRow, Entities
from features.follows import Follows
from features.history import HistoryLog
from features.schema import LIMITS
from features.transforms import Encoder
from ranking.infer import Ranker
from serving.catalogue import Catalogue, LiveAttributes, LiveVideos
from serving.channels import open_channels, write_channels
from serving.config import FeedConfig
from serving.live_channels import LiveEligibility

T = TypeVar("T", Entities, HistoryLog, Follows)
LAYOUT = 5
"""Of a bundle's folder, in `layout.json`; 1, without that file, had no co-visitation, 2 no limits of videos, 3 no
times of follows, 4 profiles of viewers that hung on the order of a sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedBundle:
    """Everything one version of the feed needs."""

    version: str
    config: FeedConfig
    encoder: Encoder
    users: Entities
    videos: Entities | LiveVideos
    ids_by_row: np.ndarray
    """(V,) int64; row 0 is nobody's, whatever stands there."""
    user_counters: np.ndarray
    video_counters: ByRow
    history: HistoryLog
    follows: Follows
    upload_ts_ms: ByRow
    author_id: ByRow
    """(V,) int64, 0 where not known."""
    eligible: ByRow
    attributes: Attributes | LiveAttributes
    """Whom each video may be shown to."""
    duration_ms: ByRow
    """(V,) int64, 0 where not known."""
    vectors: ByRow
    """(V, D) of the video tower, as the index keeps them."""
    towers: Towers
    ranker: Ranker
    index: VideoIndex
    sources: tuple[Source, ...]
    uploads: UploadOrders
    eligibility: Eligibility | LiveEligibility
    static_rows: np.ndarray
    """See `Channels`."""
    created_ms: int
    """When it was published."""
    catalogue: Catalogue | None = None
    """Of uploads since; None where there are none to come."""

    @classmethod
    def load(cls, bundle: Bundle, *, scan_on: str | None = None) -> FeedBundle:
        """Open a bundle whose every byte the registry has verified; `scan_on`: see `VideoIndex`."""
        created_ms = round(datetime.fromisoformat(bundle.created).timestamp() * 1000)
        return cls.open(bundle.folder, bundle.version, created_ms, scan_on=scan_on)

    @classmethod
    def open(cls, folder: Path, version: str, created_ms: int = 0, *, scan_on: str | None = None) -> FeedBundle:
        """Open a folder as `write_bundle` left it; serving uses `load`, which only takes verified bundles."""

        def array(name: str) -> np.ndarray:
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

        _check_layout(folder, version)
        encoder = Encoder.load(folder / "encoder")
        users, videos = (
            _plain(Entities.load(folder / f"{side}s", f"{side}s", encoder.columns(side))) for side in ("user", "video")
        )
        upload_ts_ms, eligible = array("videos/videos_upload_ts_ms"), array("videos/videos_eligible")
        index = VideoIndex(folder / "index", scan_on)
        config = FeedConfig.from_json((folder / "feed.json").read_text())
        attributes = Attributes.load(folder / "videos")
        channels = open_channels(folder / "channels", config, index, upload_ts_ms, eligible, attributes)
        loaded = cls(
            version=version,
            config=config,
            encoder=encoder,
            users=users,
            videos=videos,
            ids_by_row=_ids_by_row(folder / "videos" / "videos_ids.npy"),
            user_counters=array("users/counters_user"),
            video_counters=array("videos/counters_video"),
            history=_plain(HistoryLog.load(folder / "history")),
            follows=_plain(Follows.load(folder / "users")),
            upload_ts_ms=upload_ts_ms,
            author_id=array("videos/videos_author_id"),
            eligible=eligible,
            attributes=attributes,
            duration_ms=array("videos/videos_duration_ms"),
            vectors=index.vectors,
            towers=Towers.load(folder / "towers"),
            ranker=Ranker.load(folder / "ranker"),
            index=index,
            sources=channels.sources,
            uploads=channels.uploads,
            eligibility=channels.eligibility,
            static_rows=channels.static_rows,
            created_ms=created_ms,
        )
        loaded.check()
        return loaded

    def check(self) -> None:
        """Arrays that belong together have one length; raises ValueError naming the first that does not."""
        n_videos, n_users = len(self.videos) + 1, len(self.users) + 1
        expected = {
            "video_counters": n_videos,
            "upload_ts_ms": n_videos,
            "author_id": n_videos,
            "eligible": n_videos,
            "attributes": n_videos,
            "duration_ms": n_videos,
            "user_counters": n_users,
        }
        for name, rows in expected.items():
            if len(getattr(self, name)) != rows:
                found = len(getattr(self, name))
                raise ValueError(f"bundle {self.version}: {name} has {found} rows, expected {rows}; publish it again")
        by_user = (len(self.history.user_start), len(self.follows.start))
        if self.index.n_rows != n_videos or by_user != (n_users + 1, n_users + 1):
            raise ValueError(
                f"bundle {self.version}: index, history, follows and entities differ in rows; publish it again"
            )

    @property
    def newest_event_ms(self) -> int:
        """The last instant the histories know of; 0 when no event is dated."""
        return int(self.history.ts_ms.max(initial=0))

    @property
    def known_until_ms(self) -> int:
        """Of what was said of videos up to here, the bundle knows: its logs reach so far, and they were there before
        it was published (events may be dated ahead of any clock)."""
        return min(self.newest_event_ms, self.created_ms)

    @property
    def changes(self) -> int:
        """Two equal readings say that no upload or removal became visible between them."""
        return 0 if self.catalogue is None else self.catalogue.changes


def _ids_by_row(path: Path) -> np.ndarray:
    """The file's ids from row 1 on, mapped: row 0 is the last eight bytes of the header, which costs no copy."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    shape = (len(mapped) + 1,)
    return np.asarray(np.memmap(path, mapped.dtype, "r", offset=mapped.offset - mapped.dtype.itemsize, shape=shape))


def _plain(mapped: T) -> T:
    """The same mapped memory as plain arrays: numpy's memmap class costs some 10 us at each indexing."""
    found = {f.name: getattr(mapped, f.name) for f in fields(mapped)}
    return replace(mapped, **{name: np.asarray(a) for name, a in found.items() if isinstance(a, np.memmap)})


def write_bundle(
    folder: Path,
    dataset: Dataset,
    *,
    videos: pa.Table,
    towers_dir: Path,
    ranker_dir: Path,
    index: VideoIndex,
    feed_config: FeedConfig,
    metrics: Mapping[str, Any],
    popular_examples: np.ndarray | None = None,
    counters_day: int | None = None,
) -> None:
    """Lay out a staged folder, all but `golden.json` (see `serving.golden.record`).

    `videos` is the canonical table; `popular_examples` are the example rows that popularity is
    counted on (all by default); `counters_day` is the day whose view of the counters is served: by default the last,
    which knows every event of the dataset.
    """
    day = dataset.counters.days - 1 if counters_day is None else counters_day
    for name in ("encoder", "users", "videos", "history"):
        (folder / name).mkdir(parents=True)
    dataset.encoder.save(folder / "encoder")
    dataset.users.save(folder / "users", "users")
    dataset.videos.save(folder / "videos", "videos")
    dataset.history.save(folder / "history")
    wanted = ["video_id", "duration_ms", *(field.name for field in LIMITS if field.name in videos.column_names)]
    by_row = videos.select(wanted).sort_by("video_id")
    duration_ms = by_row["duration_ms"].fill_null(0).to_numpy().astype(np.int64)
    attributes = Attributes.of(by_row, first_row=1)
    attributes.save(folder / "videos")
    dataset.follows.save(folder / "users")
    arrays = {
        "users/counters_user": dataset.counters.user_day[day],
        "videos/counters_video": dataset.counters.video_day[day],
        "videos/videos_upload_ts_ms": dataset.upload_ts_ms,
        "videos/videos_author_id": dataset.author_id,
        "videos/videos_eligible": dataset.eligible,
        "videos/videos_duration_ms": np.concatenate([[0], duration_ms]),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(values), allow_pickle=False)
    examples = np.arange(len(dataset.examples)) if popular_examples is None else popular_examples
    write_channels(folder / "channels", dataset, feed_config, attributes, popular_examples=examples)
    shutil.copytree(towers_dir, folder / "towers")
    shutil.copytree(ranker_dir, folder / "ranker")
    index.copy_to(folder / "index")
    (folder / "feed.json").write_text(feed_config.to_json())
    (folder / "metrics.json").write_text(json.dumps(dict(metrics), indent=2, sort_keys=True))
    (folder / "layout.json").write_text(json.dumps({"layout": LAYOUT}))


def _check_layout(folder: Path, version: str) -> None:
    path = folder / "layout.json"
    found = json.loads(path.read_text())["layout"] if path.exists() else 1
    if found != LAYOUT:
        raise ValueError(f"bundle {version} has layout {found}, this release reads {LAYOUT}: publish it again")
