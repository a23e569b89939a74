"""Canonical videos sent to a running server, in calls of a thousand; an interrupted upload is sent again whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.validate import validate
from pipelines.console import Stages
from serving.client import PLAIN, FeedClient
from serving.limits import MAX_MESSAGE_BYTES, MAX_REMOVALS, MAX_UPLOADS, VIDEO_COLUMNS
from serving.messages import RemoveOutcome, UpsertOutcome, Video
from serving.security import ClientSecurity

TIMEOUT_S = 60.0
_READ_ROWS = 10_000


def upload(
    path: Path, address: str, shown: Stages, security: ClientSecurity = PLAIN
) -> tuple[UpsertOutcome, Counter[str]]:
    """Send every row of a Parquet file that keeps the schema's rules; also counts, by reason, of those that do not.

    Raises ValueError, naming rows and field, for what the server refuses: the rows before are stored then.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: give a Parquet file of canonical videos")
    added = replaced = 0
    left_out: Counter[str] = Counter()
    with FeedClient(address, timeout_s=TIMEOUT_S, security=security) as client, shown.stage("upload") as stage:
        file = pq.ParquetFile(path)
        total, read = file.metadata.num_rows, 0
        for rows in file.iter_batches(_READ_ROWS):
            split = validate("videos", pa.Table.from_batches([rows]), file=str(path))
            left_out.update(split.counts)
            for call in _calls([_video(row) for row in split.good.to_pylist()]):
                outcome = _send(client, call, f"{path}, rows {read:,} to {read + len(rows):,}")
                added, replaced = added + outcome.added, replaced + outcome.replaced
                stage.progress(f"{added + replaced:,} of {total:,} videos")
            read += len(rows)
        stage.rows, stage.note = added + replaced, f"{added:,} new, {replaced:,} known before"
        stage.details.extend(f"left out: {count:,} rows, {reason}" for reason, count in left_out.items())
    return UpsertOutcome(added, replaced), left_out


def remove(ids: Sequence[int], address: str, security: ClientSecurity = PLAIN) -> RemoveOutcome:
    """Remove videos by id, however many."""
    removed = unknown = 0
    with FeedClient(address, timeout_s=TIMEOUT_S, security=security) as client:
        for start in range(0, len(ids), MAX_REMOVALS):
            outcome = client.remove_videos(ids[start : start + MAX_REMOVALS])
            removed, unknown = removed + outcome.removed, unknown + outcome.unknown
    return RemoveOutcome(removed, unknown)


def _video(row: dict) -> Video:
    columns = {name: str(row[name]) for name in VIDEO_COLUMNS if row[name] is not None}
    row = {name: value for name, value in row.items() if name not in VIDEO_COLUMNS}
    content = None if row["content"] is None else np.array(row["content"], np.float32)
    lists = {name: tuple(row[name] or ()) for name in ("tags", "regions")}
    return Video(**{**row, **lists, "content": content}, columns=columns)


def _calls(videos: Sequence[Video]) -> Iterator[list[Video]]:
    """As many at once as a call takes, of videos and of bytes."""
    call: list[Video] = []
    free = most = MAX_MESSAGE_BYTES * 3 // 4
    for video in videos:
        size = _most_bytes(video)
        if call and (len(call) == MAX_UPLOADS or size > free):
            yield call
            call, free = [], most
        call.append(video)
        free -= size
    if call:
        yield call


def _most_bytes(video: Video) -> int:
    text = sum(8 + 4 * (len(name) + len(value)) for name, value in video.columns.items())
    text += sum(4 + 4 * len(region) for region in video.regions)
    return 256 + text + 10 * len(video.tags) + (0 if video.content is None else 4 * len(video.content))


def _send(client: FeedClient, videos: list[Video], where: str) -> UpsertOutcome:
    try:
        return client.upsert_videos(videos)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
        if code != grpc.StatusCode.INVALID_ARGUMENT:
            raise
        first, last = videos[0].video_id, videos[-1].video_id
        raise ValueError(
            f"{where}: the server refuses the {len(videos):,} videos from {first} to {last}: {details}. Those before "
            "are served; mend the row and send the file again"
        ) from error
