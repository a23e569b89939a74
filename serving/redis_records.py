"""How events, users and changes lie in Redis: one fixed record an impression, which scripts read by position."""

from __future__ import annotations

import base64
import json

import numpy as np

from features.history import watch_fraction
from features.schema import SIGNALS
from serving.messages import Event
from serving.records import NOTHING_KNOWN, Shortlist, UserState
from serving.sqlite_log import packed, unpacked
from serving.upload_store import Change, from_json

RECORD = np.dtype(
    [
        ("user_id", "<i8"),
        ("video_id", "<i8"),
        ("author_id", "<i8"),  # 0: not known
        ("ts_ms", "<f8"),  # whole numbers far below 2^53
        ("watch_ms", "<f8"),  # -1: not logged
        ("duration_ms", "<f8"),  # -1: not known
        ("number", "<f8"),  # in the order of acknowledgement
        ("signals", "u1", (len(SIGNALS),)),
    ]
)
UNKNOWN, FALSE, TRUE = 0, 1, 2
"""Of a signal; the larger one wins when feedback is merged."""


def record_of(event: Event) -> bytes:
    """The script gives it its number."""
    record = np.zeros(1, RECORD)
    record["user_id"], record["video_id"], record["author_id"] = event.user_id, event.video_id, event.author_id or 0
    record["ts_ms"] = event.ts_ms
    record["watch_ms"] = -1 if event.watch_ms is None else event.watch_ms
    record["duration_ms"] = -1 if event.duration_ms is None else event.duration_ms
    codes = {None: UNKNOWN, False: FALSE, True: TRUE}
    record["signals"] = [codes[event.signals.get(signal)] for signal in SIGNALS]
    return record.tobytes()


def event_of(request_id: str, slot: int, raw: bytes) -> Event:
    """Inverse of `record_of`."""
    record = np.frombuffer(raw, RECORD)[0]
    codes = zip(SIGNALS, record["signals"].tolist(), strict=True)
    return Event(
        request_id=request_id,
        slot=slot,
        user_id=int(record["user_id"]),
        video_id=int(record["video_id"]),
        ts_ms=int(record["ts_ms"]),
        author_id=int(record["author_id"]) or None,
        watch_ms=None if record["watch_ms"] < 0 else int(record["watch_ms"]),
        duration_ms=None if record["duration_ms"] < 0 else int(record["duration_ms"]),
        signals={signal: code == TRUE for signal, code in codes if code != UNKNOWN},
    )


def state_of(records: list[bytes], seen: bytes | None, followed: bytes | None) -> UserState:
    """Of a user's recent records, and the packed ids of videos seen and authors followed."""
    if not records:
        return NOTHING_KNOWN
    events = np.frombuffer(b"".join(records), RECORD)
    events = events[np.lexsort((events["number"], events["ts_ms"]))]
    watch_ms, duration_ms = (np.where(events[c] < 0, np.nan, events[c]) for c in ("watch_ms", "duration_ms"))
    return UserState(
        video_id_E=events["video_id"].astype(np.int64),
        ts_ms_E=events["ts_ms"].astype(np.int64),
        signals_E=np.packbits(events["signals"] == TRUE, axis=1, bitorder="little")[:, 0],
        watch_fraction_E=watch_fraction(watch_ms, duration_ms),
        seen_ids=np.unique(np.frombuffer(seen or b"", "<i8")).astype(np.int64),
        followed_authors=np.unique(np.frombuffer(followed or b"", "<i8")).astype(np.int64),
    )


def shortlist_json(kept: Shortlist) -> str:
    """All but request and user, which the key and the script's prefix say."""
    ids = [base64.b64encode(packed(ids)).decode() for ids in (kept.video_id_K, kept.session_id_N)]
    return json.dumps([kept.ts_ms, kept.surface, *ids])


def shortlist_of(request_id: str, user: bytes, said: bytes) -> Shortlist:
    """Inverse of `shortlist_json`, under the user it is kept for."""
    ts_ms, surface, *ids = json.loads(said)
    video_id_K, session_id_N = (unpacked(base64.b64decode(text)) for text in ids)
    return Shortlist(request_id, int(user), ts_ms, surface, video_id_K, session_id_N)


def change_of(number: int, video_id: int, state: bytes, described: bytes | None) -> Change:
    """Of what `KEEP` wrote."""
    acknowledged_ms, said = state.decode().split(" ")
    video = None
    if described is not None:
        text, content = json.loads(described)
        video = from_json(video_id, text, None if content is None else base64.b64decode(content))
    return Change(number, int(acknowledged_ms), said == "removed", video_id, video)
