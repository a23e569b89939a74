"""Uploads and removals in the store's database: one row a video, its last state, under a number that only grows.

Run by the store's one writer inside its transactions; `changes` reads from a connection of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from serving.messages import Video

SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads (
  video_id INTEGER PRIMARY KEY, number INTEGER NOT NULL UNIQUE, acknowledged_ms INTEGER NOT NULL,
  removed INTEGER NOT NULL, video TEXT, content BLOB);
"""
_UPSERT = (
    "INSERT INTO uploads VALUES (?, ?, ?, 0, ?, ?) ON CONFLICT (video_id) DO UPDATE SET number = excluded.number, "
    "acknowledged_ms = excluded.acknowledged_ms, removed = 0, video = excluded.video, content = excluded.content"
)
_REMOVE = (  # what was known of a video stays: it is in histories
    "INSERT INTO uploads VALUES (?, ?, ?, 1, NULL, NULL) ON CONFLICT (video_id) DO UPDATE SET "
    "number = excluded.number, acknowledged_ms = excluded.acknowledged_ms, removed = 1"
)
_READ = (
    "SELECT number, acknowledged_ms, removed, video_id, video, content FROM uploads WHERE number > ? ORDER BY number"
)
_ELSEWHERE, _CONTENT = ("video_id", "content"), "<f4"


@dataclass(frozen=True, slots=True)
class Change:
    """The last that was said of a video."""

    number: int
    """In the order of acknowledgement."""
    acknowledged_ms: int
    """By the server's clock."""
    removed: bool
    video_id: int
    video: Video | None
    """Also of a removed one, where an upload has described it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one call said of videos: uploads, or ids of removed ones."""

    acknowledged_ms: int
    videos: tuple[Video, ...] = ()
    removed_ids: tuple[int, ...] = ()


def last_number(database: sqlite3.Connection) -> int:
    """Of the newest change; 0 without any."""
    return database.execute("SELECT coalesce(max(number), 0) FROM uploads").fetchone()[0]


def insert(database: sqlite3.Connection, said: Said, number: int) -> int:
    """Keep the changes under the numbers after `number`; returns the last."""
    rows = []
    for video in said.videos:
        number += 1
        content = None if video.content is None else video.content.astype(_CONTENT).tobytes()
        rows.append((video.video_id, number, said.acknowledged_ms, to_json(video), content))
    database.executemany(_UPSERT, rows)
    first, number = number + 1, number + len(said.removed_ids)
    numbers = range(first, number + 1)
    database.executemany(
        _REMOVE, [(v, n, said.acknowledged_ms) for v, n in zip(said.removed_ids, numbers, strict=True)]
    )
    return number


def changes(path: Path, after: int) -> Iterator[Change]:
    """The last state of every video that changed after a number, in order; also while a server writes."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        for number, acknowledged_ms, removed, video_id, text, content in database.execute(_READ, (after,)):
            video = None if text is None else from_json(video_id, text, content)
            yield Change(number, acknowledged_ms, bool(removed), video_id, video)


def forget(database: sqlite3.Connection, numbers: Sequence[int]) -> None:
    """Drop changes, those of them that no later one replaced."""
    database.executemany("DELETE FROM uploads WHERE number = ?", [(number,) for number in numbers])


def to_json(video: Video) -> str:
    """All but id and content."""
    described = {field.name: getattr(video, field.name) for field in fields(Video)}
    return json.dumps({name: value for name, value in described.items() if name not in _ELSEWHERE})


def from_json(video_id: int, text: str, content: bytes | None) -> Video:
    """Inverse of `to_json`; `content` are its numbers as they were stored."""
    described = json.loads(text)
    described |= {name: tuple(described[name]) for name in ("tags", "regions")}
    return Video(
        video_id=video_id,
        content=None if content is None else np.frombuffer(content, _CONTENT).astype(np.float32),
        **described,
    )
