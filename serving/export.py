"""The event log as canonical tables: each impression with the propensity of the slate that showed it (`events`), and
what each slate was drawn from (`candidates`).

What was served is tomorrow's training and replay data. An event whose slate is not in the log (shown by somebody
else, or logged with another video) keeps its feedback and has no source, policy or propensity; its request is in
`not_judged` then, not in `candidates`.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import EVENTS, NOT_JUDGED, SESSION_CANDIDATES
from serving.sqlite_log import Write, connect, insert, unpacked
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
_REQUESTS = """
SELECT e.request_id, e.user_id, l.ts_ms, l.surface, l.video_ids, l.session_ids,
  CASE WHEN count(*) > count(s.slot) OR min(e.user_id) < max(e.user_id) THEN 'not of a served slate'
    WHEN max(s.policy_id) LIKE '%/greedy' THEN 'served without exploration'
    WHEN l.request_id IS NULL THEN 'no candidate set kept' END
FROM events e
LEFT JOIN served s ON s.request_id = e.request_id AND s.slot = e.slot AND s.video_id = e.video_id
  AND s.user_id = e.user_id
LEFT JOIN shortlists l ON l.request_id = e.request_id AND l.user_id = e.user_id
GROUP BY e.request_id ORDER BY min(e.rowid)
"""
_ROWS_AT_ONCE = 10_000


def export_events(store: Path | str, out: Path) -> int:
    """Write `out/events/date=YYYY-MM-DD/log.parquet` (UTC days) and `out/candidates.parquet` (with
    `not_judged.parquet`, the other requests) from a store, also while a server writes to it.

    `store` is an SQLite file or an address of Redis. Returns the number of events. Files are replaced whole.
    """
    if is_redis(store):
        with tempfile.TemporaryDirectory() as folder:
            return export_events(_copied(str(store), Path(folder) / "log.sqlite"), out)
    database = sqlite3.connect(f"file:{store}?mode=ro", uri=True)
    try:
        _know_shortlists(database)
        database.execute("BEGIN")  # both tables as of one instant
        days = [row[0] for row in database.execute("SELECT DISTINCT ts_ms / ? FROM events ORDER BY 1", (DAY_MS,))]
        rows = sum(_export_day(database, day, out) for day in days)
        _export_requests(database, out)
        return rows
    finally:
        database.close()


def _copied(url: str, path: Path) -> Path:
    """Redis' event log as an SQLite file: one definition of what an impression joins with."""
    from serving.redis_store import read_log

    with closing(connect(path)) as database, database:
        for events, served, shortlist in read_log(url):
            insert(database, Write(served=tuple(served), shortlist=shortlist, events=tuple(events)))
    return path


def _export_day(database: sqlite3.Connection, day: int, out: Path) -> int:
    rows = database.execute(_QUERY, (day * DAY_MS, (day + 1) * DAY_MS)).fetchall()
    date = datetime.fromtimestamp(day * DAY_MS / 1000, UTC).strftime("%Y-%m-%d")
    folder = out / "events" / f"date={date}"
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / "log.parquet", EVENTS) as log:
        log.write_table(_table(rows, EVENTS))
    return len(rows)


def _know_shortlists(database: sqlite3.Connection) -> None:
    """A store from before shortlists were kept has none."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'shortlists'").fetchall():
        columns = "request_id, user_id, ts_ms, surface, video_ids, session_ids"
        database.execute(f"CREATE TEMP TABLE shortlists ({columns})")


def _export_requests(database: sqlite3.Connection, out: Path) -> None:
    """One row a request: what it chose from, or why it cannot be judged."""
    out.mkdir(parents=True, exist_ok=True)
    cursor = database.execute(_REQUESTS)
    with (
        _replacing(out / "candidates.parquet", SESSION_CANDIDATES) as sets,
        _replacing(out / "not_judged.parquet", NOT_JUDGED) as others,
    ):
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            judged = [(*row[:-3], *map(unpacked, row[-3:-1])) for row in rows if row[-1] is None]
            sets.write_table(_table(judged, SESSION_CANDIDATES))
            others.write_table(_table([(row[0], row[-1]) for row in rows if row[-1] is not None], NOT_JUDGED))


def _table(rows: list[tuple], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [_array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _array(column: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_boolean(kind):  # SQLite has integers for them
        return pa.array(column, pa.int8()).cast(kind)
    return pa.array(column, kind)


@contextmanager
def _replacing(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file that is there only once it is whole."""
    part = path.with_name(f".{path.name}.part")
    with pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True) as writer:
        yield writer
    part.replace(path)
