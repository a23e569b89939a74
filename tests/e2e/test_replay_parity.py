"""Replay judges the bundle that serves: the same requests get the same values from both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from pipelines.replay.bundle import factories
from pipelines.replay.judge import checked_values
from pipelines.replay.policies import History
from pipelines.replay.slates import LoggedRequests
from pipelines.show import served
from pipelines.workspace import Workspace
from serving.client import FeedClient


def test_replay_and_the_live_server_value_the_same_candidates_alike(demo: Path):
    ws = Workspace.open(demo)
    sets = pl.read_parquet(ws.canonical / "candidates.parquet").head(20)
    events = pl.scan_parquet(sorted((ws.canonical / "events").glob("**/*.parquet")), hive_partitioning=False)
    ts_ms = int(events.select(pl.col("ts_ms").max()).collect().item()) + 3_600_000  # after all that the bundle knows
    lengths = sets["video_ids"].list.len().to_numpy()
    requests = LoggedRequests(
        request_id=sets["request_id"].to_list(),
        user_id=sets["user_id"].to_numpy(),
        ts_ms=np.full(len(sets), ts_ms),
        surface=sets["surface"].to_list(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        video_ids=sets["video_ids"].explode().to_numpy(),
    )
    history = History(events=pl.LazyFrame(), videos=pl.DataFrame(), start_ms=ts_ms)
    policy = factories(ws.registry)["bundle"]("live", history)
    replayed = checked_values(policy, requests)
    live, chances = [], []
    with served(ws) as address, FeedClient(address, timeout_s=30) as client:
        for i, row in enumerate(sets.iter_rows(named=True)):
            ranked = client.rank(
                row["user_id"], row["video_ids"], surface=row["surface"], now_ms=int(requests.ts_ms[i])
            )
            live.append(ranked.value_N)
            chances.append(ranked.probability_NT[:, ranked.tasks.index("long_view")])
    assert np.ptp(replayed.values_C) > 0
    np.testing.assert_allclose(np.concatenate(live), replayed.values_C, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(chances), replayed.predicted["long_view"], rtol=1e-5)
