"""The event log as canonical `events`: each impression joined with the propensity of the slate that showed it.

What was served is tomorrow's training and replay data. An event whose slate is not in the log (shown by somebody
else, or logged with another video) keeps its feedback and has no source, policy or propensity.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import EVENTS
from serving.store import Write, connect, insert
from serving.stores import is_redis

DAY_MS = 86_400_000
_FROM_SERVED = ("surface", "source", "connected", "policy_id", "propensity", "bundle_version")
_QUERY = (
    "SELECT "  # noqa: S608
    + ", ".join(f'{"s" if name in _FROM_SERVED else "e"}."{name}"' for name in EVENTS.names)
    + " FROM events e LEFT JOIN served s ON s.request_id = e.request_id AND s.slot = e.slot"
    " AND s.video_id = e.video_id AND s.user_id = e.user_id"
    " WHERE e.ts_ms >= ? AND e.ts_ms < ? ORDER BY e.ts_ms, e.rowid"
)


def export_events(store: Path | str, out: Path) -> int:
    """Write `out/events/date=YYYY-MM-DD/log.parquet` (UTC days) from a store, also while a server writes to it.

    `store` is an SQLite file or an address of Redis. Returns the number of rows. A day's file is replaced whole.
    """
    if is_redis(store):
        with tempfile.TemporaryDirectory() as folder:
            return export_events(_copied(str(store), Path(folder) / "log.sqlite"), out)
    database = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    try:
        days = [row[0] for row in database.execute("SELECT DISTINCT ts_ms / ? FROM events ORDER BY 1", (DAY_MS,))]
        return sum(_export_day(database, day, out) for day in days)
    finally:
        database.close()


def _copied(url: str, path: Path) -> Path:
    """Redis' event log as an SQLite file: one definition of what an impression joins with."""
    from serving.redis_store import read_log

    with closing(connect(path)) as database, database:
        for events, served in read_log(url):
            insert(database, Write(served=tuple(served), events=tuple(events)))
    return path


def _export_day(database: sqlite3.Connection, day: int, out: Path) -> int:
    rows = database.execute(_QUERY, (day * DAY_MS, (day + 1) * DAY_MS)).fetchall()
    columns = list(zip(*rows, strict=True))
    connected = EVENTS.get_field_index("connected")
    columns[connected] = tuple(None if value is None else bool(value) for value in columns[connected])
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, EVENTS, strict=True)], schema=EVENTS
    )
    date = datetime.fromtimestamp(day * DAY_MS / 1000, UTC).strftime("%Y-%m-%d")
    folder = out / "events" / f"date={date}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / ".log.parquet.part", compression="zstd", write_page_checksum=True)
    (folder / ".log.parquet.part").replace(folder / "log.parquet")
    return table.num_rows
