"""What a feed costs beside the live bundle's: processor time in one process, request by request in turn.

Processor time, not the clock's: on a machine with other work the clock tells of that. Frequency and caches change for
both halves of a pair alike, and the median over pairs leaves out what did not.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.gate.config import GateConfig
from pipelines.gate.verdict import Verdict
from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.messages import FeedRequest
from serving.store import NoStore

WARM_UP = 5


def speed_rule(candidate: FeedBundle, live: FeedBundle, config: GateConfig) -> Verdict:
    """Users that both bundles know, each at the instant after the bundle's newest event, on its first surface."""
    known = np.intersect1d(candidate.users.ids, live.users.ids)
    asked = config.timed_requests + WARM_UP
    users = np.random.default_rng(config.seed).choice(known, asked) if len(known) else np.full(asked, -1)
    feeds = [Feed(bundle, NoStore()) for bundle in (candidate, live)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the server
    taken_s = np.empty((asked, 2))
    try:
        for number, user in enumerate(users):
            for side in (1, 0) if number % 2 else (0, 1):  # the second one finds warmer caches
                taken_s[number, side] = _seconds(feeds[side], int(user))
    finally:
        torch.set_num_threads(threads)
    taken_s = taken_s[WARM_UP:]
    ratio = float(np.median(taken_s[:, 0] / taken_s[:, 1]))
    ours_ms, theirs_ms = 1000 * np.median(taken_s, axis=0)
    return Verdict(
        "processor time of a feed over the live bundle's",
        ratio,
        config.max_slowdown,
        1.0,
        ratio <= config.max_slowdown,
        f"median {ours_ms:.1f} ms against {theirs_ms:.1f} ms, {len(taken_s)} requests in turn",
        "the pool's size (feed.blend.k), the ranker's widths and the index's probes",
    )  # fmt: skip


def _seconds(feed: Feed, user_id: int) -> float:
    bundle = feed.bundle
    request = FeedRequest(
        user_id=user_id, k=10, surface=bundle.config.surfaces[0], now_ms=bundle.newest_event_ms + 1,
        request_id="gate", explore=False,
    )  # fmt: skip
    start = time.process_time()
    feed.get_feed(request)
    return time.process_time() - start
