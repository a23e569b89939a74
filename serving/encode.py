"""Uploads as the models read them: the bundle's own encoder and towers, as when its catalogue was embedded.

N videos of a call, V rows of the bundle, C features of (video, instant).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from features.inputs import UNKNOWN_UPLOAD, age_features
from features.schema import LIMITS, VIDEOS
from features.spec import Content
from features.transforms import Encoder
from serving.bundle import FeedBundle
from serving.catalogue import Slots
from serving.limits import VIDEO_COLUMNS
from serving.messages import Video

_AS_THEY_ARE = ("video_id", "author_id", "upload_ts_ms", "duration_ms", "tags", "eligible", *(f.name for f in LIMITS))
_log = logging.getLogger(__name__)


def content_width(encoder: Encoder) -> int | None:
    """Numbers of content that the encoder reads a video; None when it reads none."""
    widths = {feature.dim for feature in encoder.spec.video if isinstance(feature, Content)}
    return max(widths) if widths else None


@dataclass(frozen=True, slots=True)
class Encoded:
    """N uploads of distinct videos, by id."""

    ids_N: np.ndarray
    slots: Slots
    limits: pa.Table
    """The canonical columns of whom and when."""


def encode(bundle: FeedBundle, videos: Sequence[Video], instant_ms: int) -> Encoded:
    """Uploads of distinct videos; vectors as of the instant that the bundle's own are of.

    A video of the bundle keeps its counters, another has those of row 0. Content of another width than the encoder
    reads (stored under an earlier bundle) counts as not known.
    """
    table = _table(videos, content_width(bundle.encoder))
    encoded = bundle.encoder.videos(table)
    rows_N = np.arange(1, len(encoded) + 1)
    upload_ts_ms_N = _integers(table, "upload_ts_ms", UNKNOWN_UPLOAD)
    counters_NC = bundle.video_counters[bundle.videos.rows_of(encoded.ids)]
    at_instant_NC = np.concatenate([counters_NC, age_features(np.array(instant_ms), upload_ts_ms_N)], axis=1)
    slots = Slots(
        sparse=encoded.sparse[1:],
        dense=encoded.dense[1:],
        vectors=bundle.towers.video_vectors(encoded, rows_N, at_instant_NC).astype(np.float16),
        author_id=_integers(table, "author_id", 0),
        upload_ts_ms=upload_ts_ms_N,
        duration_ms=_integers(table, "duration_ms", 0),
        eligible=table["eligible"].to_numpy(zero_copy_only=False),
    )
    return Encoded(encoded.ids, slots, table.select([field.name for field in LIMITS]))


def _table(videos: Sequence[Video], width: int | None) -> pa.Table:
    """The canonical table, by id."""
    unfit = [v.video_id for v in videos if v.content is not None and width is not None and len(v.content) != width]
    if unfit:
        _log.warning("%d videos, %d the first, have content of another width than %s", len(unfit), unfit[0], width)
    columns: dict[str, list] = {name: [] for name in VIDEOS.names}
    for video in sorted(videos, key=lambda video: video.video_id):
        for name in _AS_THEY_ARE:
            columns[name].append(getattr(video, name))
        fits = video.content is not None and len(video.content) == width
        columns["content"].append(video.content if fits else None)
        for name, kind in VIDEO_COLUMNS.items():
            text = video.columns.get(name)
            columns[name].append(int(text) if text is not None and pa.types.is_integer(kind) else text)
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in VIDEOS}, schema=VIDEOS)


def _integers(table: pa.Table, column: str, unknown: int) -> np.ndarray:
    return table[column].fill_null(unknown).to_numpy().astype(np.int64)
