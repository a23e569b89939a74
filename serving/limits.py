"""What a request may hold: checked before any work starts; the message names the field, the limit and what was sent."""

from __future__ import annotations

from collections.abc import Sequence

from features.eligibility import Viewer
from features.schema import MAX_AGE_YEARS, MAX_SAFETY_LEVEL
from serving.messages import Event, FeedRequest

MAX_K = 100
MAX_POOL = 2_000
"""Candidates a Retrieve may ask for and a Rank may bring."""
MAX_EXCLUSIONS = 10_000
MAX_EVENTS = 1_000
MAX_REQUEST_ID = 128
MAX_SLOT = 9_999
MAX_LANGUAGES = 16
MAX_CODE = 35
"""Characters of a language tag or region: RFC 5646 asks for room for 35."""
MAX_MESSAGE_BYTES = 1 << 20
"""Largest message the server reads; 10,000 exclusions and as many blocked authors are 160 kB."""
MAX_TS_MS = 253_402_300_799_000
"""The end of the year 9999: later instants have no calendar date to be stored under."""
MAX_AHEAD_MS = 300_000
"""An event may be this far ahead of the server's clock; later ones would lie in nobody's past for long."""


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
