"""One day of the feed: who opens it when, what the logger shows, and how they respond.

A day is a few rounds: in round r every user who opens the feed an r-th time that day gets a page. U users,
R rounds, B requests, C candidates, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.world.config import DAY_MS, HOUR_MS, START_MS, WorldConfig
from pipelines.world.life import leaving, satiation
from pipelines.world.logger import Candidates, Logger, draw_page
from pipelines.world.population import Population, stream
from pipelines.world.responses import draw, engagement

_CHUNK = 20_000
"""Requests at a time: bounds the memory of a round."""

SWIPE_MS = 300
"""Between one video's end and the next one's start."""

_PAUSE_MS = 5_000
"""Least pause between two pages of a user."""

_HOURLY = np.array([3, 2, 1, 1, 1, 2, 4, 6, 6, 5, 5, 6, 8, 8, 6, 5, 5, 6, 8, 10, 12, 12], dtype=np.float64)
"""How often the feed is opened by hour of the day; nobody wants it after 22:00, so that a day's pages end in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """A round's pages; shapes (B,), (B, S) and, for the candidates, (B, C)."""

    user_B: np.ndarray
    ts_ms_B: np.ndarray
    candidates: Candidates
    video_BS: np.ndarray
    source_BS: np.ndarray
    connected_BS: np.ndarray
    propensity_BS: np.ndarray
    ts_ms_BS: np.ndarray
    outcome_BS: dict[str, np.ndarray]
    reached_BS: np.ndarray
    """False below the slot where the viewer left: what was not reached was not shown."""


def run_day(config: WorldConfig, world: Population, logger: Logger, day: int, pull_U: np.ndarray) -> list[Pages]:
    """`pull_U`: factor of each user's visits, by how gladly they come back."""
    rng = stream(config, 7, day)
    opens_ms_UR = _open_times(config, world.users.requests_per_day_U * pull_U, rng)
    # A page that could run past midnight is not opened: its events would belong to two days.
    last_start_ms = DAY_MS - config.page_size * (2 * int(world.videos.duration_ms_V.max()) + SWIPE_MS)
    free_from_ms_U = np.zeros(config.n_users)
    rounds: list[Pages] = []
    for turn in range(opens_ms_UR.shape[1]):
        start_ms_U = np.maximum(opens_ms_UR[:, turn], free_from_ms_U)
        open_now = np.flatnonzero(start_ms_U <= last_start_ms)
        for start in range(0, len(open_now), _CHUNK):
            user_B = open_now[start : start + _CHUNK]
            ts_ms_B = (START_MS + day * DAY_MS + start_ms_U[user_B]).astype(np.int64)
            pages = _serve_pages(config, world, logger, user_B, ts_ms_B, rng)
            end_ms_B = pages.ts_ms_BS[:, -1] + pages.outcome_BS["watch_ms"][:, -1]
            free_from_ms_U[pages.user_B] = end_ms_B - START_MS - day * DAY_MS + _PAUSE_MS
            rounds.append(pages)
    return rounds


def _open_times(config: WorldConfig, rate_U: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(U, R) milliseconds into the day at which each user opens the feed, in order, infinite where not."""
    count_U = np.minimum(rng.poisson(rate_U), config.max_requests_per_day)
    reach = np.concatenate([[0.0], np.cumsum(_HOURLY)]) / _HOURLY.sum()
    draw_UR = rng.random((config.n_users, config.max_requests_per_day))
    opens_ms_UR = np.floor(np.interp(draw_UR, reach, np.arange(len(reach)) * HOUR_MS))
    opens_ms_UR[np.arange(config.max_requests_per_day) >= count_U[:, None]] = np.inf
    return np.sort(opens_ms_UR, axis=1)


def _serve_pages(
    config: WorldConfig,
    world: Population,
    logger: Logger,
    user_B: np.ndarray,
    ts_ms_B: np.ndarray,
    rng: np.random.Generator,
) -> Pages:
    c = logger.candidates(user_B, ts_ms_B, rng)
    enough_B = c.valid_BC.sum(axis=1) >= config.page_size  # a user who has seen nearly everything gets no page
    user_B, ts_ms_B = user_B[enough_B], ts_ms_B[enough_B]
    c = Candidates(video_BC=c.video_BC[enough_B], source_BC=c.source_BC[enough_B], valid_BC=c.valid_BC[enough_B])
    kind = config.logger.kind
    chosen_BS, propensity_BS = draw_page(
        logger.scores(user_B, c),
        c.valid_BC,
        config.page_size,
        0.0 if kind == "deterministic" else config.logger.epsilon,
        rng,
        greedy=kind in ("epsilon_slot", "deterministic"),
    )
    video_BS = np.take_along_axis(c.video_BC, chosen_BS, axis=1)
    user_BS = np.broadcast_to(user_B[:, None], video_BS.shape)
    logger.show(user_BS, video_BS)
    ts_ms_BS, outcomes, now_ms_B = np.empty_like(video_BS), [], ts_ms_B
    tired_BS = satiation(world.videos.topic_V[video_BS], config.life)
    reached_BS = np.ones(video_BS.shape, dtype=bool)
    for slot in range(config.page_size):
        ts_ms_BS[:, slot] = now_ms_B
        slot_B = np.full(len(user_B), slot)
        e = engagement(world, config, user_B, video_BS[:, slot], now_ms_B, slot_B, tired_BS[:, slot])
        outcomes.append(draw(e, config.response, rng))
        now_ms_B = now_ms_B + outcomes[-1]["watch_ms"] + SWIPE_MS
        if config.life.leaves and slot + 1 < config.page_size:
            gone_B = rng.random(len(user_B)) < leaving(outcomes[-1]["click"], config.life)
            reached_BS[gone_B, slot + 1 :] = False
    return Pages(
        user_B=user_B,
        ts_ms_B=ts_ms_B,
        candidates=c,
        video_BS=video_BS,
        source_BS=np.take_along_axis(c.source_BC, chosen_BS, axis=1),
        connected_BS=logger.is_connected(user_BS, video_BS),
        propensity_BS=propensity_BS,
        ts_ms_BS=ts_ms_BS,
        outcome_BS={name: np.stack([o[name] for o in outcomes], axis=1) for name in outcomes[0]},
        reached_BS=reached_BS,
    )
