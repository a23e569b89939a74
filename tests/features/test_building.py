"""Examples come out the same however they are built: in memory or in a folder, by any workers, in any parts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features import history
from features.arrays import shards
from features.dataset import Dataset
from features.examples import EventPart
from features.history import HistoryLog
from features.lookup import RowIndex
from features.schema import SIGNALS

sys.path.insert(0, str(Path(__file__).parent))
from feature_world import SPEC, tables


def parts(events: pa.Table, size: int) -> list[EventPart]:
    """The same rows, read `size` at a time."""
    slices = [events.slice(start, size) for start in range(0, len(events), size)]
    return [EventPart(len(rows), None, lambda rows=rows: rows) for rows in slices]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("ordered", [True, False])
def test_any_parts_any_workers_and_a_folder_give_the_bytes_that_one_worker_saves(
    tmp_path: Path, monkeypatch, ordered: bool
) -> None:
    monkeypatch.setattr(history, "SHARD_EVENTS", 50)
    t, rng = tables(8), np.random.default_rng(8)
    events = t["events"] if ordered else t["events"].take(pa.array(rng.permutation(len(t["events"]))))
    strange = pa.array(np.where(rng.random(len(events)) < 0.1, 5, events["user_id"].to_numpy()))
    events = events.set_column(events.column_names.index("user_id"), "user_id", strange)
    half_known = pa.array(events["like"].to_numpy(), mask=rng.random(len(events)) < 0.5, type=pa.int8())
    events = events.set_column(events.column_names.index("like"), "like", half_known)
    undated = pa.table(
        {"user_id": strange[:70], "video_id": events["video_id"][:70], "position": pa.array(range(70), pa.int32())}
        | {signal: events[signal][:70] for signal in SIGNALS}
    )

    def build(events: pa.Table | Sequence[EventPart], folder: Path | None, workers: int) -> Dataset:
        return Dataset.build(
            SPEC,
            users=t["users"],
            videos=t["videos"],
            events=events,
            undated=undated,
            train_dates=tuple(sorted(set(t["events"]["date"].to_pylist())))[:2],
            folder=folder,
            workers=workers,
        )

    build(events, None, 1).save(tmp_path / "saved")
    expected = files_of(tmp_path / "saved")
    for number, (size, workers) in enumerate([(900, 1), (37, 1), (37, 3), (250, 2)]):
        folder = tmp_path / str(number)
        build(parts(events, size), folder, workers)
        assert files_of(folder) == expected
    build(events, tmp_path / "saved", 2)
    assert files_of(tmp_path / "saved") == expected, "a folder that holds a dataset takes another"


def test_the_log_is_by_user_and_time_and_ends_are_what_a_search_finds(monkeypatch) -> None:
    monkeypatch.setattr(history, "SHARD_EVENTS", 40)
    rng = np.random.default_rng(3)
    for _ in range(5):
        user, ts_ms = rng.integers(0, 30, 400), rng.integers(-5, 60, 400) * 10
        columns = {"video_row": np.arange(400), "signals": np.zeros(400, np.uint8), "watch_fraction": np.zeros(400)}
        log, ends = HistoryLog.build(n_users=29, user_row=user, ts_ms=ts_ms, workers=2, **columns)
        order = np.lexsort((np.arange(400), ts_ms, user))
        assert log.video_row.tolist() == order[user[order] > 0].tolist()
        assert ends.tolist() == log.ends_at(user, ts_ms).tolist()


def test_shards_cover_every_owner_once_and_only_one_owner_may_be_too_many() -> None:
    counts = np.array([0, 3, 9, 0, 2, 2, 0])
    assert shards(np.cumsum(counts), 4) == [(0, 2), (2, 3), (3, 7)]
    assert shards(np.zeros(3, np.int64), 4) == [(0, 3)]


def test_a_part_that_is_not_as_long_as_announced_is_refused() -> None:
    t = tables(9)
    short = [EventPart(901, None, lambda: t["events"])]
    with pytest.raises(ValueError, match="900 rows, announced were 901"):
        Dataset.build(SPEC, users=t["users"], videos=t["videos"], events=short, undated=None, train_dates=())


def test_a_watch_of_ten_hours_keeps_its_fraction() -> None:
    t = tables(10)
    events = t["events"]
    for name, value in (("watch_ms", 36_000_001), ("duration_ms", 35_999_999)):
        values = pa.array([value] * len(events), pa.int64())
        events = events.set_column(events.column_names.index(name), name, values)
    dataset = Dataset.build(SPEC, users=t["users"], videos=t["videos"], events=events, undated=None, train_dates=())
    assert set(dataset.history.watch_fraction.tolist()) == {float(np.float32(36_000_001 / 35_999_999))}


def test_a_row_index_finds_what_a_search_finds() -> None:
    rng = np.random.default_rng(12)
    for size in (0, 1, 2, 3, 500, 3000):
        ids = np.unique(np.concatenate([rng.integers(-(2**63), 2**63, size), rng.integers(-5, 2 * size + 1, size)]))
        asked = np.concatenate([ids, ids + 1, rng.integers(-(2**63), 2**63, 300), [0, -(2**63), 2**63 - 1]])
        expected = [int(np.searchsorted(ids, i)) + 1 if i in set(ids.tolist()) else 0 for i in asked.tolist()]
        assert RowIndex(ids).rows(asked).tolist() == expected
