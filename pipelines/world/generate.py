"""Runs the world day by day and writes the canonical tables, so that nothing downstream knows it is not real.

Memory holds one day of events at a time. B requests, S slots.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.schema import CANDIDATES, EVENTS, SIGNALS
from pipelines.world.config import DAY_MS, START_MS, WorldConfig, described
from pipelines.world.day import Pages, run_day
from pipelines.world.ids import opaque_ids
from pipelines.world.life import Returning
from pipelines.world.logger import Logger
from pipelines.world.population import Population, populate
from pipelines.world.responses import examination
from pipelines.world.tables import follows_table, list_column, users_table, videos_table

SURFACE = "feed"

_PARQUET = {"compression": "zstd", "write_page_checksum": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSummary:
    out_dir: Path
    n_users: int
    n_videos: int
    n_follows: int
    n_requests: int
    n_events: int
    rates: dict[str, float]
    """Share of the impressions with each signal."""
    mean_watch_ms: float


def generate(
    config: WorldConfig, out_dir: Path, on_progress: Callable[[int, int, int], None] | None = None
) -> WorldSummary:
    """Write users, videos, follows, events, candidates and world.json under `out_dir`.

    `on_progress(days_done, n_days, events_so_far)` is called after each day.
    """
    out_dir = Path(out_dir)
    if (out_dir / "events").exists():
        raise FileExistsError(f"{out_dir / 'events'} exists: a world is written to a folder without events; remove it")
    out_dir.mkdir(parents=True, exist_ok=True)
    world = populate(config)
    pq.write_table(users_table(world.users), out_dir / "users.parquet", **_PARQUET)
    pq.write_table(videos_table(config, world), out_dir / "videos.parquet", **_PARQUET)
    logger = Logger(config, world)
    returning = Returning(config.n_users, config.life)
    totals, n_requests, n_events = dict.fromkeys((*SIGNALS, "watch_ms"), 0), 0, 0
    followed: list[np.ndarray] = []
    with pq.ParquetWriter(out_dir / "candidates.parquet", CANDIDATES, **_PARQUET) as candidates_file:
        for day in range(config.n_days):
            logger.start_day(day)
            rounds = run_day(config, world, logger, day, returning.pull_U)
            request_ids = _request_ids(config, n_requests, rounds)
            events = _events_table(config, world, logger, rounds, request_ids)
            _write_day(events, out_dir, day)
            if day >= config.n_days - config.candidate_days:
                candidates_file.write_table(_candidates_table(world, rounds, request_ids))
            followed.append(_day_follows(config, world, rounds))
            _learn(logger, returning, rounds, followed[-1][0])
            n_requests, n_events = n_requests + sum(len(p.user_B) for p in rounds), n_events + events.num_rows
            for name in totals:
                totals[name] += sum(int(p.outcome_BS[name][p.reached_BS].sum()) for p in rounds)
            if on_progress is not None:
                on_progress(day + 1, config.n_days, n_events)
    follows = follows_table(config, world, np.concatenate(followed, axis=1))
    pq.write_table(follows, out_dir / "follows.parquet", **_PARQUET)
    summary = WorldSummary(
        out_dir=out_dir,
        n_users=config.n_users,
        n_videos=config.n_videos,
        n_follows=follows.num_rows,
        n_requests=n_requests,
        n_events=n_events,
        rates={name: totals[name] / max(n_events, 1) for name in SIGNALS},
        mean_watch_ms=totals["watch_ms"] / max(n_events, 1),
    )
    _write_truth(config, summary)
    return summary


def _request_ids(config: WorldConfig, n_before: int, rounds: list[Pages]) -> list[pa.Array]:
    """A string array a round; opaque, so that no order can be read from them."""
    ids: list[pa.Array] = []
    for pages in rounds:
        numbers = opaque_ids(len(pages.user_B), config.seed * 3 + 4, start=n_before)
        ids.append(pa.array(np.char.mod("w%016x", numbers)))
        n_before += len(pages.user_B)
    return ids


def _events_table(
    config: WorldConfig, world: Population, logger: Logger, rounds: list[Pages], request_ids: list[pa.Array]
) -> pa.Table:
    """A day's events in order of time."""
    S = config.page_size
    video = _flat([p.video_BS for p in rounds])
    user = _flat([np.repeat(p.user_B, S) for p in rounds])
    ts_ms = _flat([p.ts_ms_BS for p in rounds])
    order = np.lexsort((user, ts_ms))
    order = order[_flat([p.reached_BS for p in rounds]).astype(bool)[order]]
    videos, n = world.videos, len(order)
    request = pa.chunked_array(request_ids, pa.string()).take(pa.array(order // S))
    source = pa.DictionaryArray.from_arrays(_flat([p.source_BS for p in rounds])[order], list(logger.source_names))
    columns = {
        "request_id": request,
        "user_id": world.users.ids[user[order]],
        "video_id": videos.ids[video[order]],
        "author_id": world.authors.ids[videos.author_V[video[order]]],
        "ts_ms": ts_ms[order],
        "surface": pa.repeat(SURFACE, n),
        "slot": (order % S).astype(np.int32),
        "source": source.cast(pa.string()),
        "connected": _flat([p.connected_BS for p in rounds])[order],
        "policy_id": pa.repeat(config.logger.policy_id, n),
        "propensity": _flat([p.propensity_BS for p in rounds])[order],
        "bundle_version": pa.nulls(n, pa.string()),
        "duration_ms": videos.duration_ms_V[video[order]],
    }
    for name in ("watch_ms", *SIGNALS):
        columns[name] = _flat([p.outcome_BS[name] for p in rounds])[order]
    return pa.table({field.name: columns[field.name] for field in EVENTS}, schema=EVENTS)


def _candidates_table(world: Population, rounds: list[Pages], request_ids: list[pa.Array]) -> pa.Table:
    parts = [
        pa.table(
            {
                "request_id": ids,
                "user_id": world.users.ids[p.user_B],
                "ts_ms": p.ts_ms_B,
                "surface": pa.repeat(SURFACE, len(ids)),
                "video_ids": list_column(
                    world.videos.ids[p.candidates.video_BC[p.candidates.valid_BC]], p.candidates.valid_BC.sum(axis=1)
                ),
            },
            schema=CANDIDATES,
        )
        for p, ids in zip(rounds, request_ids, strict=True)
    ]
    return pa.concat_tables(parts) if parts else CANDIDATES.empty_table()


def _day_follows(config: WorldConfig, world: Population, rounds: list[Pages]) -> np.ndarray:
    """(2, F): user_row * n_authors + author_row, and the time, of the day's follow events in order of time."""
    hit = _flat([p.outcome_BS["follow"] * p.reached_BS for p in rounds]).astype(bool)
    user = _flat([np.repeat(p.user_B, config.page_size) for p in rounds])[hit]
    author = world.videos.author_V[_flat([p.video_BS for p in rounds])[hit]]
    ts_ms = _flat([p.ts_ms_BS for p in rounds])[hit]
    order = np.argsort(ts_ms, kind="stable")
    return np.stack([user * config.n_authors + author, ts_ms])[:, order]


def _learn(logger: Logger, returning: Returning, rounds: list[Pages], follow_keys: np.ndarray) -> None:
    def shown(of_pages: list[np.ndarray]) -> np.ndarray:
        return _flat([array[pages.reached_BS] for array, pages in zip(of_pages, rounds, strict=True)])

    outcome = {name: shown([p.outcome_BS[name] for p in rounds]) for name in ("long_view", "click", "hate")}
    logger.learn(shown([p.video_BS for p in rounds]), outcome["long_view"], follow_keys)
    user = shown([np.broadcast_to(p.user_B[:, None], p.video_BS.shape) for p in rounds])
    returning.learn(user, outcome["click"], outcome["hate"])


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0, dtype=np.int64)


def _write_day(events: pa.Table, out_dir: Path, day: int) -> None:
    date = datetime.fromtimestamp((START_MS + day * DAY_MS) / 1000, UTC).strftime("%Y-%m-%d")
    folder = out_dir / "events" / f"date={date}"
    folder.mkdir(parents=True)
    pq.write_table(events, folder / "part-0.parquet", **_PARQUET)


def _write_truth(config: WorldConfig, summary: WorldSummary) -> None:
    """world.json: what only the maker of a world can know."""
    truth = {
        "seed": config.seed,
        "config": described(config),
        "start_ts_ms": START_MS,
        "examination_by_slot": examination(np.arange(config.page_size), config.response).tolist(),
        "policy": described(config.logger),
        "counts": {
            "users": summary.n_users,
            "videos": summary.n_videos,
            "follows": summary.n_follows,
            "requests": summary.n_requests,
            "events": summary.n_events,
        },
        "rates": summary.rates,
        "mean_watch_ms": summary.mean_watch_ms,
    }
    (summary.out_dir / "world.json").write_text(json.dumps(truth, indent=2) + "\n")
