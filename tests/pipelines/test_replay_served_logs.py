"""Logs that a server exports: users as the server knew them, and requests that the log itself cannot answer for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.schema import NOT_JUDGED, SIGNALS
from pipelines.replay import ReplayInputError, replay
from pipelines.replay.histories import Histories
from serving.export import export_events
from serving.messages import Event
from serving.records import NOTHING_KNOWN, UserState
from serving.store import SqliteStore, StoreConfig

sys.path.insert(0, str(Path(__file__).parent))
from test_replay import write_log

T_MS = 1_767_225_600_000
USERS = (2**60 + 1, -5, 77)


def event(rng: np.random.Generator, number: int) -> Event:
    optional = (None, 0, 900, 20_000)
    return Event(
        request_id=f"r{number}",
        slot=0,
        user_id=int(rng.choice(USERS)),
        video_id=2**58 + int(rng.integers(0, 40)),
        ts_ms=T_MS + number // 2,  # two at each instant
        author_id=None if rng.random() < 0.2 else int(rng.integers(1, 6)),
        watch_ms=optional[rng.integers(0, 4)],
        duration_ms=optional[rng.integers(0, 4)],
        signals={signal: bool(rng.random() < 0.4) for signal in SIGNALS if rng.random() < 0.7},
    )


def described(state: UserState) -> dict[str, list]:
    return {name: getattr(state, name).tolist() for name in UserState.__slots__}


def test_a_user_of_the_exported_log_is_the_user_that_the_server_knew_at_each_instant(tmp_path):
    rng, recent = np.random.default_rng(0), 5
    store, known = SqliteStore(tmp_path / "log.sqlite", StoreConfig(recent_events=recent)), {}
    for number in range(0, 80, 2):
        known[T_MS + number // 2] = {user: described(store.user(user)) for user in USERS}
        store.log_events([event(rng, number), event(rng, number + 1)]).result(timeout=10)
    store.close()
    export_events(tmp_path / "log.sqlite", tmp_path)
    histories = Histories(pl.scan_parquet(tmp_path / "events" / "**" / "*.parquet", hive_partitioning=False), recent)
    assert max(len(state["seen_ids"]) for state in known[T_MS + 39].values()) > recent
    for ts_ms, users in known.items():
        for user, state in users.items():
            assert described(histories.at(user, ts_ms)) == state, (user, ts_ms)
    assert histories.at(123, T_MS + 50) is NOTHING_KNOWN


def without_candidates(folder: Path, request_ids: list[str]) -> None:
    path = folder / "candidates.parquet"
    table = pl.read_parquet(path)
    table.filter(~pl.col("request_id").is_in(request_ids)).write_parquet(path)


def test_requests_that_are_known_to_have_no_candidates_are_set_aside_and_counted(tmp_path):
    whole = replay(write_log(tmp_path / "whole"), ["random"], metrics=["long_view"], resamples=20)
    folder = write_log(tmp_path / "some")
    unknown = ["r0500", "r0600", "r0700"]
    without_candidates(folder, unknown)
    others = {"request_id": [*unknown, "r0000"], "reason": ["greedy", "greedy", "sampled", "greedy"]}
    pq.write_table(pa.table(others, schema=NOT_JUDGED), folder / "not_judged.parquet")
    report = replay(folder, ["random"], metrics=["long_view"], resamples=20)
    assert report.not_judged == {"greedy": 2, "sampled": 1}, "r0000 lies before the window"
    assert (report.requests, report.rows) == (whole.requests - 3, whole.rows - 9)


def test_a_request_without_candidates_that_nothing_is_known_of_is_refused(tmp_path):
    folder = write_log(tmp_path / "log")
    without_candidates(folder, ["r0500"])
    with pytest.raises(ReplayInputError, match=r"request r0500, slot 0\): its request has no row"):
        replay(folder, ["random"], metrics=["long_view"], resamples=20)
