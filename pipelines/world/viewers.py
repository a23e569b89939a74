"""The world's people in front of a served feed: they open it, are shown a page over gRPC, respond, and come back.

What the world's own logger is in `day.py`, a server is here: everything it logs is its own. A viewer's chances are the
viewer's own, so neither threads nor the order of answers change what anybody does. S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from features.schema import SIGNALS
from pipelines.world.config import DAY_MS, START_MS
from pipelines.world.day import SWIPE_MS
from pipelines.world.generate import SURFACE
from pipelines.world.life import leaving, satiation
from pipelines.world.oracle import World
from pipelines.world.responses import draw, engagement
from serving.client import FeedClient
from serving.messages import Event, FeedResponse

_PAUSE_MS = 600_000
"""Least time between two visits of a viewer, far more than a page takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visits:
    """Who comes, how often, and what they see."""

    viewers: int
    """The first so many users of the world."""
    each: int
    """Visits a viewer, spread over the day after the log."""
    page_size: int = 6
    seed: int = 0
    """Another one: other visits, other slates, other responses."""


def visit(world: World, client: FeedClient, visits: Visits, threads: int = 2) -> list[FeedResponse]:
    """Everybody's visits, each answered and responded to before the viewer's next; pages by viewer, then visit."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(_one_viewer, world, client, visits), range(visits.viewers))
        return [page for pages in found for page in pages]


def _one_viewer(world: World, client: FeedClient, visits: Visits, user: int) -> list[FeedResponse]:
    user_id, pages = int(world.population.users.ids[user]), []
    rng = np.random.default_rng([world.config.seed, 9, visits.seed, user])
    end_ms = START_MS + world.config.n_days * DAY_MS
    opens_ms = end_ms + np.sort(rng.integers(0, DAY_MS, visits.each))
    free_from_ms = 0
    for number, open_ms in enumerate(opens_ms.tolist()):
        now_ms = max(open_ms, free_from_ms)
        page = client.get_feed(
            user_id,
            k=visits.page_size,
            surface=SURFACE,
            request_id=f"visit-{visits.seed}-{user}-{number}",
            now_ms=now_ms,
        )
        video_ids = [item.video_id for item in page.items]
        events = respond(world, user_id, video_ids, page.request_id, now_ms, rng)
        if events:
            client.log_events(events)
            free_from_ms = events[-1].ts_ms + _PAUSE_MS
        pages.append(page)
    return pages


def respond(
    world: World, user_id: int, video_ids: Sequence[int], request_id: str, now_ms: int, rng: np.random.Generator
) -> list[Event]:
    """One viewer's response to a page from the top down, one event a slot."""
    population, config = world.population, world.config
    user_S = world.user_rows(np.full(len(video_ids), user_id))
    video_S = world.video_rows(np.array(video_ids, np.int64))
    tired_S = satiation(population.videos.topic_V[video_S][None], config.life)[0]
    events = []
    for slot, video_id in enumerate(video_ids):
        here = slice(slot, slot + 1)
        instant, place = np.array([now_ms]), np.array([slot])
        e = engagement(population, config, user_S[here], video_S[here], instant, place, tired_S[here])
        outcome = {name: int(value[0]) for name, value in draw(e, config.response, rng).items()}
        events.append(
            Event(
                request_id=request_id,
                slot=slot,
                user_id=user_id,
                video_id=video_id,
                ts_ms=now_ms,
                watch_ms=outcome["watch_ms"],
                duration_ms=int(population.videos.duration_ms_V[video_S[slot]]),
                signals={name: bool(outcome[name]) for name in SIGNALS},
            )
        )
        now_ms += outcome["watch_ms"] + SWIPE_MS
        if config.life.leaves and rng.random() < leaving(np.array(outcome["click"]), config.life):
            break
    return events
