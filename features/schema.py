"""The canonical tables: what an event, a video, a user and a follow are, column by column.

Every adapter writes these and everything downstream reads only these. Units are in the names; ids are opaque
signed 64-bit integers; a null means "not logged", never "zero".
"""

from __future__ import annotations

import pyarrow as pa

SIGNALS: tuple[str, ...] = ("click", "long_view", "like", "follow", "comment", "share", "profile_enter", "hate")
"""Feedback signals of an impression, one nullable int8 column (0 or 1) each; their order is the bit order of a mask."""

EVENTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("author_id", pa.int64()),
        pa.field("ts_ms", pa.int64(), nullable=False),
        pa.field("surface", pa.string()),
        pa.field("slot", pa.int32()),
        pa.field("source", pa.string()),
        pa.field("connected", pa.bool_()),
        pa.field("policy_id", pa.string()),
        pa.field("propensity", pa.float64()),
        pa.field("bundle_version", pa.string()),
        pa.field("watch_ms", pa.int64()),
        pa.field("duration_ms", pa.int64()),
        *[pa.field(signal, pa.int8()) for signal in SIGNALS],
    ]
)
"""One row an impression. Stored as `events/date=YYYY-MM-DD/*.parquet`; `slot` counts from 0; `propensity` is the
probability of this video in this slot given the slots before it, null when the logger did not record it."""

MAX_AGE_YEARS = 130
MAX_SAFETY_LEVEL = 9
LIMITS: tuple[pa.Field, ...] = (
    pa.field("regions", pa.list_(pa.string())),
    pa.field("language", pa.string()),
    pa.field("min_age", pa.int16()),
    pa.field("safety_level", pa.int8()),
    pa.field("available_from_ms", pa.int64()),
    pa.field("available_until_ms", pa.int64()),
)
"""Whom a video may be shown to, and when; null is no limit. schema.org says regionsAllowed, inLanguage, typicalAgeRange
and availabilityStarts / availabilityEnds for these; the names here carry units.

`regions` are those where it may be shown (ISO 3166 codes by habit), null or empty everywhere; `language` is a BCP 47
tag, null for what needs none (music); `min_age` is in years; `safety_level` runs from 0, suitable everywhere, to
MAX_SAFETY_LEVEL: null is 0, so what has not been reviewed must not be `eligible`, or must carry a level. A video is
available from the first instant up to, and not at, the second."""

VIDEOS = pa.schema(
    [
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("author_id", pa.int64()),
        pa.field("upload_ts_ms", pa.int64()),
        pa.field("duration_ms", pa.int64()),
        pa.field("music_id", pa.int64()),
        pa.field("video_type", pa.string()),
        pa.field("upload_type", pa.string()),
        pa.field("tags", pa.list_(pa.int64())),
        pa.field("content", pa.list_(pa.float32())),
        pa.field("eligible", pa.bool_(), nullable=False),
        *LIMITS,
    ]
)
"""One row a video. An ineligible one is shown to nobody; `LIMITS` hold for some viewers or some of the time. `content`
is a content embedding of one width in the whole table, or null throughout."""

USERS = pa.schema([pa.field("user_id", pa.int64(), nullable=False)])
"""One row a user: the id, then any string, integer or float columns; the feature spec says which are used."""

FOLLOWS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("author_id", pa.int64(), nullable=False),
        pa.field("ts_ms", pa.int64()),
    ]
)
"""One row a follow; a null time means it was there before the log began."""

UNDATED = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        *[pa.field(signal, pa.int8()) for signal in SIGNALS],
    ]
)
"""Impressions known to precede every dated event, in order of `position` within a user but without times.
They seed histories and counters; they are never evaluated on."""

CANDIDATES = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("ts_ms", pa.int64(), nullable=False),
        pa.field("surface", pa.string()),
        pa.field("video_ids", pa.list_(pa.int64()), nullable=False),
    ]
)
"""One row a request whose logger recorded what it chose from: the candidate set that replay re-ranks."""

SESSION_CANDIDATES = pa.schema([*CANDIDATES, pa.field("session_ids", pa.list_(pa.int64()))])
"""`candidates` of a feed with sessions: which videos the session had shown before, as a page is compared with them."""

NOT_JUDGED = pa.schema([pa.field("request_id", pa.string(), nullable=False), pa.field("reason", pa.string())])
"""`not_judged.parquet` beside `candidates`: requests that are known to have no candidate set, and why. Replay sets them
aside and counts them; a request that is in neither table is refused."""

QUARANTINE_REASON = "reason"
"""Extra column of a quarantine table (`quarantine/TABLE.parquet`): why the row was set aside."""

TABLES: dict[str, pa.Schema] = {
    "events": EVENTS,
    "videos": VIDEOS,
    "users": USERS,
    "follows": FOLLOWS,
    "undated": UNDATED,
    "candidates": SESSION_CANDIDATES,
}
"""Layout of a dataset folder: `events/date=*/*.parquet`, and `NAME.parquet` for each other table that exists."""
