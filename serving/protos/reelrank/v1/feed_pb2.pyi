from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEVEL_UNSPECIFIED: _ClassVar[Level]
    LEVEL_FULL: _ClassVar[Level]
    LEVEL_FEATURES_MISSING: _ClassVar[Level]
    LEVEL_RETRIEVAL_ORDER: _ClassVar[Level]
    LEVEL_POPULAR: _ClassVar[Level]
    LEVEL_STATIC: _ClassVar[Level]
LEVEL_UNSPECIFIED: Level
LEVEL_FULL: Level
LEVEL_FEATURES_MISSING: Level
LEVEL_RETRIEVAL_ORDER: Level
LEVEL_POPULAR: Level
LEVEL_STATIC: Level

class GetFeedRequest(_message.Message):
    __slots__ = ("user_id", "k", "surface", "request_id", "excluded_video_ids", "blocked_author_ids", "now_ms", "viewer", "page_token")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_VIDEO_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_AUTHOR_IDS_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    VIEWER_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    k: int
    surface: str
    request_id: str
    excluded_video_ids: _containers.RepeatedScalarFieldContainer[int]
    blocked_author_ids: _containers.RepeatedScalarFieldContainer[int]
    now_ms: int
    viewer: Viewer
    page_token: bytes
    def __init__(self, user_id: _Optional[int] = ..., k: _Optional[int] = ..., surface: _Optional[str] = ..., request_id: _Optional[str] = ..., excluded_video_ids: _Optional[_Iterable[int]] = ..., blocked_author_ids: _Optional[_Iterable[int]] = ..., now_ms: _Optional[int] = ..., viewer: _Optional[_Union[Viewer, _Mapping]] = ..., page_token: _Optional[bytes] = ...) -> None: ...

class Viewer(_message.Message):
    __slots__ = ("region", "languages", "age_years", "max_safety_level")
    REGION_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    AGE_YEARS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAFETY_LEVEL_FIELD_NUMBER: _ClassVar[int]
    region: str
    languages: _containers.RepeatedScalarFieldContainer[str]
    age_years: int
    max_safety_level: int
    def __init__(self, region: _Optional[str] = ..., languages: _Optional[_Iterable[str]] = ..., age_years: _Optional[int] = ..., max_safety_level: _Optional[int] = ...) -> None: ...

class StageStats(_message.Message):
    __slots__ = ("name", "received", "kept", "removed", "ms", "begin_ms")
    class RemovedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    received: int
    kept: int
    removed: _containers.ScalarMap[str, int]
    ms: float
    begin_ms: float
    def __init__(self, name: _Optional[str] = ..., received: _Optional[int] = ..., kept: _Optional[int] = ..., removed: _Optional[_Mapping[str, int]] = ..., ms: _Optional[float] = ..., begin_ms: _Optional[float] = ...) -> None: ...

class ServedItem(_message.Message):
    __slots__ = ("video_id", "author_id", "slot", "sources", "reason", "connected", "retrieval_score", "scores", "predicted_watch_ms", "value", "value_terms", "propensity", "duration_ms")
    class ValueTermsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_WATCH_MS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    VALUE_TERMS_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    video_id: int
    author_id: int
    slot: int
    sources: _containers.RepeatedScalarFieldContainer[str]
    reason: str
    connected: bool
    retrieval_score: float
    scores: _containers.RepeatedScalarFieldContainer[float]
    predicted_watch_ms: float
    value: float
    value_terms: _containers.ScalarMap[str, float]
    propensity: float
    duration_ms: int
    def __init__(self, video_id: _Optional[int] = ..., author_id: _Optional[int] = ..., slot: _Optional[int] = ..., sources: _Optional[_Iterable[str]] = ..., reason: _Optional[str] = ..., connected: _Optional[bool] = ..., retrieval_score: _Optional[float] = ..., scores: _Optional[_Iterable[float]] = ..., predicted_watch_ms: _Optional[float] = ..., value: _Optional[float] = ..., value_terms: _Optional[_Mapping[str, float]] = ..., propensity: _Optional[float] = ..., duration_ms: _Optional[int] = ...) -> None: ...

class GetFeedResponse(_message.Message):
    __slots__ = ("request_id", "bundle_version", "policy_id", "cold", "level", "degraded_reason", "shortfall_reason", "tasks", "items", "stages", "next_page_token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_REASON_FIELD_NUMBER: _ClassVar[int]
    SHORTFALL_REASON_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    bundle_version: str
    policy_id: str
    cold: bool
    level: Level
    degraded_reason: str
    shortfall_reason: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    items: _containers.RepeatedCompositeFieldContainer[ServedItem]
    stages: _containers.RepeatedCompositeFieldContainer[StageStats]
    next_page_token: bytes
    def __init__(self, request_id: _Optional[str] = ..., bundle_version: _Optional[str] = ..., policy_id: _Optional[str] = ..., cold: _Optional[bool] = ..., level: _Optional[_Union[Level, str]] = ..., degraded_reason: _Optional[str] = ..., shortfall_reason: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., items: _Optional[_Iterable[_Union[ServedItem, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[StageStats, _Mapping]]] = ..., next_page_token: _Optional[bytes] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("user_id", "k", "surface", "excluded_video_ids", "blocked_author_ids", "now_ms", "viewer")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_VIDEO_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_AUTHOR_IDS_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    VIEWER_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    k: int
    surface: str
    excluded_video_ids: _containers.RepeatedScalarFieldContainer[int]
    blocked_author_ids: _containers.RepeatedScalarFieldContainer[int]
    now_ms: int
    viewer: Viewer
    def __init__(self, user_id: _Optional[int] = ..., k: _Optional[int] = ..., surface: _Optional[str] = ..., excluded_video_ids: _Optional[_Iterable[int]] = ..., blocked_author_ids: _Optional[_Iterable[int]] = ..., now_ms: _Optional[int] = ..., viewer: _Optional[_Union[Viewer, _Mapping]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("bundle_version", "cold", "level", "degraded_reason", "sources", "video_ids", "scores", "source_index", "connected", "reasons", "stages")
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    VIDEO_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    bundle_version: str
    cold: bool
    level: Level
    degraded_reason: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    video_ids: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    source_index: _containers.RepeatedScalarFieldContainer[int]
    connected: _containers.RepeatedScalarFieldContainer[bool]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    stages: _containers.RepeatedCompositeFieldContainer[StageStats]
    def __init__(self, bundle_version: _Optional[str] = ..., cold: _Optional[bool] = ..., level: _Optional[_Union[Level, str]] = ..., degraded_reason: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., video_ids: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[float]] = ..., source_index: _Optional[_Iterable[int]] = ..., connected: _Optional[_Iterable[bool]] = ..., reasons: _Optional[_Iterable[str]] = ..., stages: _Optional[_Iterable[_Union[StageStats, _Mapping]]] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("user_id", "video_ids", "surface", "now_ms")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    VIDEO_IDS_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    NOW_MS_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    video_ids: _containers.RepeatedScalarFieldContainer[int]
    surface: str
    now_ms: int
    def __init__(self, user_id: _Optional[int] = ..., video_ids: _Optional[_Iterable[int]] = ..., surface: _Optional[str] = ..., now_ms: _Optional[int] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("bundle_version", "cold", "tasks", "scores", "predicted_watch_ms", "values", "unknown", "stages", "level", "degraded_reason")
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_WATCH_MS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_REASON_FIELD_NUMBER: _ClassVar[int]
    bundle_version: str
    cold: bool
    tasks: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedScalarFieldContainer[float]
    predicted_watch_ms: _containers.RepeatedScalarFieldContainer[float]
    values: _containers.RepeatedScalarFieldContainer[float]
    unknown: _containers.RepeatedScalarFieldContainer[int]
    stages: _containers.RepeatedCompositeFieldContainer[StageStats]
    level: Level
    degraded_reason: str
    def __init__(self, bundle_version: _Optional[str] = ..., cold: _Optional[bool] = ..., tasks: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[float]] = ..., predicted_watch_ms: _Optional[_Iterable[float]] = ..., values: _Optional[_Iterable[float]] = ..., unknown: _Optional[_Iterable[int]] = ..., stages: _Optional[_Iterable[_Union[StageStats, _Mapping]]] = ..., level: _Optional[_Union[Level, str]] = ..., degraded_reason: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("request_id", "slot", "user_id", "video_id", "ts_ms", "watch_ms", "duration_ms", "click", "long_view", "like", "follow", "comment", "share", "profile_enter", "hate")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    TS_MS_FIELD_NUMBER: _ClassVar[int]
    WATCH_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    CLICK_FIELD_NUMBER: _ClassVar[int]
    LONG_VIEW_FIELD_NUMBER: _ClassVar[int]
    LIKE_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ENTER_FIELD_NUMBER: _ClassVar[int]
    HATE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    slot: int
    user_id: int
    video_id: int
    ts_ms: int
    watch_ms: int
    duration_ms: int
    click: bool
    long_view: bool
    like: bool
    follow: bool
    comment: bool
    share: bool
    profile_enter: bool
    hate: bool
    def __init__(self, request_id: _Optional[str] = ..., slot: _Optional[int] = ..., user_id: _Optional[int] = ..., video_id: _Optional[int] = ..., ts_ms: _Optional[int] = ..., watch_ms: _Optional[int] = ..., duration_ms: _Optional[int] = ..., click: _Optional[bool] = ..., long_view: _Optional[bool] = ..., like: _Optional[bool] = ..., follow: _Optional[bool] = ..., comment: _Optional[bool] = ..., share: _Optional[bool] = ..., profile_enter: _Optional[bool] = ..., hate: _Optional[bool] = ...) -> None: ...

class LogEventsRequest(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class LogEventsResponse(_message.Message):
    __slots__ = ("stored", "merged", "conflicting")
    STORED_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    CONFLICTING_FIELD_NUMBER: _ClassVar[int]
    stored: int
    merged: int
    conflicting: int
    def __init__(self, stored: _Optional[int] = ..., merged: _Optional[int] = ..., conflicting: _Optional[int] = ...) -> None: ...

class Video(_message.Message):
    __slots__ = ("video_id", "author_id", "upload_ts_ms", "duration_ms", "columns", "tags", "content", "eligible", "regions", "language", "min_age", "safety_level", "available_from_ms", "available_until_ms")
    class ColumnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_ID_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_TS_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    MIN_AGE_FIELD_NUMBER: _ClassVar[int]
    SAFETY_LEVEL_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FROM_MS_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_UNTIL_MS_FIELD_NUMBER: _ClassVar[int]
    video_id: int
    author_id: int
    upload_ts_ms: int
    duration_ms: int
    columns: _containers.ScalarMap[str, str]
    tags: _containers.RepeatedScalarFieldContainer[int]
    content: _containers.RepeatedScalarFieldContainer[float]
    eligible: bool
    regions: _containers.RepeatedScalarFieldContainer[str]
    language: str
    min_age: int
    safety_level: int
    available_from_ms: int
    available_until_ms: int
    def __init__(self, video_id: _Optional[int] = ..., author_id: _Optional[int] = ..., upload_ts_ms: _Optional[int] = ..., duration_ms: _Optional[int] = ..., columns: _Optional[_Mapping[str, str]] = ..., tags: _Optional[_Iterable[int]] = ..., content: _Optional[_Iterable[float]] = ..., eligible: _Optional[bool] = ..., regions: _Optional[_Iterable[str]] = ..., language: _Optional[str] = ..., min_age: _Optional[int] = ..., safety_level: _Optional[int] = ..., available_from_ms: _Optional[int] = ..., available_until_ms: _Optional[int] = ...) -> None: ...

class UpsertVideosRequest(_message.Message):
    __slots__ = ("videos",)
    VIDEOS_FIELD_NUMBER: _ClassVar[int]
    videos: _containers.RepeatedCompositeFieldContainer[Video]
    def __init__(self, videos: _Optional[_Iterable[_Union[Video, _Mapping]]] = ...) -> None: ...

class UpsertVideosResponse(_message.Message):
    __slots__ = ("added", "replaced")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    added: int
    replaced: int
    def __init__(self, added: _Optional[int] = ..., replaced: _Optional[int] = ...) -> None: ...

class RemoveVideosRequest(_message.Message):
    __slots__ = ("video_ids",)
    VIDEO_IDS_FIELD_NUMBER: _ClassVar[int]
    video_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, video_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RemoveVideosResponse(_message.Message):
    __slots__ = ("removed", "unknown")
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    removed: int
    unknown: int
    def __init__(self, removed: _Optional[int] = ..., unknown: _Optional[int] = ...) -> None: ...
