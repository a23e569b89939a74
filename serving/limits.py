"""What a request may hold: checked before any work starts; the message names the field, the limit and what was sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from features.eligibility import Viewer
from features.schema import LIMITS, MAX_AGE_YEARS, MAX_SAFETY_LEVEL, VIDEOS
from serving.messages import Event, FeedRequest, Video

MAX_K = 100
MAX_POOL = 2_000
"""Candidates a Retrieve may ask for and a Rank may bring."""
MAX_EXCLUSIONS = 10_000
MAX_EVENTS = 1_000
MAX_UPLOADS = 1_000
MAX_REMOVALS = 10_000
MAX_TAGS = 1_000
MAX_REQUEST_ID = 128
MAX_SLOT = 9_999
MAX_LANGUAGES = 16
MAX_REGIONS = 256
MAX_CODE = 35
"""Characters of a language tag or region: RFC 5646 asks for room for 35."""
MAX_MESSAGE_BYTES = 4 << 20
"""Largest message the server reads; 10,000 exclusions and as many blocked authors are 160 kB, 1,000 uploads with
512 numbers of content each 2 MB."""
MAX_TS_MS = 253_402_300_799_000
"""The end of the year 9999: later instants have no calendar date to be stored under."""
MAX_AHEAD_MS = 300_000
"""An event or an upload may be this far ahead of the server's clock; later ones would lie in nobody's past for long."""
_VIDEO_FIELDS = ("video_id", "author_id", "upload_ts_ms", "duration_ms", "tags", "content", "eligible")
_NOT_COLUMNS = {*_VIDEO_FIELDS, *(field.name for field in LIMITS)}
VIDEO_COLUMNS: dict[str, pa.DataType] = {field.name: field.type for field in VIDEOS if field.name not in _NOT_COLUMNS}
"""What a video may have in `columns`: all that the canonical table knows, for the next bundle may read what this one
does not."""
NO_VIDEO_IDS = (0, -(2**63))
"""Unset on the wire, and what pads a search's results."""


class InvalidRequestError(ValueError):
    """A request nobody should retry unchanged."""


def check_page(request: FeedRequest, surfaces: Sequence[str], *, max_k: int = MAX_K) -> None:
    """Check a GetFeed (or, with another `max_k`, a Retrieve)."""
    check_range("k", request.k, 1, max_k)
    check_surface(request.surface, surfaces)
    check_text("request_id", request.request_id)
    check_range("now_ms", request.now_ms, 0, MAX_TS_MS)
    check_count("excluded_video_ids", len(request.excluded_video_ids), 0, MAX_EXCLUSIONS)
    check_count("blocked_author_ids", len(request.blocked_author_ids), 0, MAX_EXCLUSIONS)
    check_viewer(request.viewer)


def check_viewer(viewer: Viewer) -> None:
    """What is not given is not checked."""
    check_text("viewer.region", viewer.region or "", MAX_CODE)
    check_count("viewer.languages", len(viewer.languages), 0, MAX_LANGUAGES)
    for i, language in enumerate(viewer.languages):
        if not language.strip():
            raise InvalidRequestError(f"viewer.languages[{i}]: empty; leave it out when the language is not known")
        check_text(f"viewer.languages[{i}]", language, MAX_CODE)
    for name, value, most in (
        ("age_years", viewer.age_years, MAX_AGE_YEARS),
        ("max_safety_level", viewer.max_safety_level, MAX_SAFETY_LEVEL),
    ):
        if value is not None:
            check_range(f"viewer.{name}", value, 0, most)


def check_candidates(n_candidates: int, surface: str, now_ms: int, surfaces: Sequence[str]) -> None:
    """Check a Rank."""
    check_count("video_ids", n_candidates, 1, MAX_POOL)
    check_surface(surface, surfaces)
    check_range("now_ms", now_ms, 0, MAX_TS_MS)


def check_events(events: Sequence[Event], clock_ms: int) -> None:
    """Check a LogEvents; one bad event refuses the list, with its position in the field path."""
    check_count("events", len(events), 1, MAX_EVENTS)
    for i, event in enumerate(events):
        path = f"events[{i}]"
        if not event.request_id:
            raise InvalidRequestError(f"{path}.request_id: empty; send the request_id that GetFeed returned")
        check_text(f"{path}.request_id", event.request_id)
        check_range(f"{path}.slot", event.slot, 0, MAX_SLOT)
        check_range(f"{path}.ts_ms", event.ts_ms, 1, clock_ms + MAX_AHEAD_MS)
        for name in ("watch_ms", "duration_ms"):
            value = getattr(event, name)
            if value is not None:
                check_range(f"{path}.{name}", value, 0, MAX_TS_MS)


def check_uploads(videos: Sequence[Video], clock_ms: int, width: int | None) -> None:
    """Check an UpsertVideos; one bad video refuses the list, with its position in the field path.

    `width` is that of the content which the models read, None when they read none.
    """
    check_count("videos", len(videos), 1, MAX_UPLOADS)
    for i, video in enumerate(videos):
        path = f"videos[{i}]"
        _check_video_id(f"{path}.video_id", video.video_id)
        if video.upload_ts_ms is not None:
            check_range(f"{path}.upload_ts_ms", video.upload_ts_ms, 0, clock_ms + MAX_AHEAD_MS)
        if video.duration_ms is not None:
            check_range(f"{path}.duration_ms", video.duration_ms, 0, MAX_TS_MS)
        check_count(f"{path}.tags", len(video.tags), 0, MAX_TAGS)
        if video.content is not None:
            if width is not None and len(video.content) != width:
                raise InvalidRequestError(f"{path}.content: {len(video.content)} numbers, this bundle reads {width}")
            if not np.isfinite(video.content).all():
                raise InvalidRequestError(f"{path}.content: holds numbers that are not finite")
        _check_limits(path, video)
        for name, value in video.columns.items():
            _check_column(f"{path}.columns", name, value)


def _check_limits(path: str, video: Video) -> None:
    """Whom it may be shown to: what cannot be read must not be taken for no limit."""
    check_count(f"{path}.regions", len(video.regions), 0, MAX_REGIONS)
    codes = {f"{path}.regions[{i}]": region for i, region in enumerate(video.regions)}
    if video.language is not None:
        codes[f"{path}.language"] = video.language
    for field, code in codes.items():
        if not code.strip():
            raise InvalidRequestError(f"{field}: empty; leave it out where there is no limit")
        check_text(field, code, MAX_CODE)
    for name, value, most in (
        ("min_age", video.min_age, MAX_AGE_YEARS),
        ("safety_level", video.safety_level, MAX_SAFETY_LEVEL),
        ("available_from_ms", video.available_from_ms, MAX_TS_MS),
        ("available_until_ms", video.available_until_ms, MAX_TS_MS),
    ):
        if value is not None:
            check_range(f"{path}.{name}", value, 0, most)
    begin, end = video.available_from_ms, video.available_until_ms
    if begin is not None and end is not None and end <= begin:
        raise InvalidRequestError(f"{path}.available_until_ms: {end} is not after available_from_ms, {begin}")


def check_removals(video_ids: Sequence[int]) -> None:
    """Check a RemoveVideos."""
    check_count("video_ids", len(video_ids), 1, MAX_REMOVALS)
    for i, video_id in enumerate(video_ids):
        _check_video_id(f"video_ids[{i}]", video_id)


def _check_video_id(field: str, video_id: int) -> None:
    if video_id in NO_VIDEO_IDS:
        raise InvalidRequestError(f"{field}: {video_id} names no video")


def _check_column(field: str, name: str, value: str) -> None:
    if name not in VIDEO_COLUMNS:
        known = ", ".join(sorted(VIDEO_COLUMNS))
        raise InvalidRequestError(f"{field}: {name[:64]!r} is no column of a video; there are {known}")
    check_text(f"{field}[{name}]", value)
    if pa.types.is_integer(VIDEO_COLUMNS[name]):
        try:
            number = int(value)
        except ValueError:
            raise InvalidRequestError(f"{field}[{name}]: {value!r} is not an integer") from None
        check_range(f"{field}[{name}]", number, -(2**63), 2**63 - 1)


def check_range(field: str, value: int, low: int, high: int) -> None:
    """Inclusive on both ends."""
    if not low <= value <= high:
        raise InvalidRequestError(f"{field}: {value} is outside {low} .. {high}")


def check_count(field: str, count: int, low: int, high: int) -> None:
    """Entries of a list."""
    if not low <= count <= high:
        raise InvalidRequestError(f"{field}: {count} entries, allowed are {low} .. {high}")


def check_text(field: str, text: str, most: int = MAX_REQUEST_ID) -> None:
    """Short and printable: request ids end up in logs and tables."""
    if len(text) > most:
        raise InvalidRequestError(f"{field}: {len(text)} characters, allowed are {most}")
    if text and not text.isprintable():
        raise InvalidRequestError(f"{field}: holds characters that cannot be printed")


def check_surface(surface: str, surfaces: Sequence[str]) -> None:
    """Empty means the default."""
    if surface and surface not in surfaces:
        known = ", ".join(repr(name) for name in surfaces)
        raise InvalidRequestError(f"surface: {surface[:64]!r} is not known to this bundle; it knows {known}")
