"""Golden requests: what a bundle answered when it was made, asked again before it serves.

A checksum says the bytes are the same; this says the answers are. Exploration is off and there are no live events,
so an answer depends on the bundle, the libraries and the machine alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.messages import FeedRequest, Level
from serving.store import NoStore

NAME = "golden.json"
TOLERANCE = 1e-5
"""Of values and probabilities; another CPU adds in another order."""
UNKNOWN_USER = -(2**62)


class GoldenError(RuntimeError):
    """The bundle does not answer as it did when it was published."""


def record(folder: Path, *, now_ms: int | None = None, n: int = 100, k: int = 10, seed: int = 1) -> int:
    """Ask a staged bundle n requests at an instant, write `golden.json` beside it, return how many.

    Users are drawn from the bundle's, one is unknown, surfaces take turns. The instant is by default the first after
    the bundle's newest event.
    """
    bundle = FeedBundle.open(folder, "staged")
    if now_ms is None:
        now_ms = bundle.newest_event_ms + 1
    rng = np.random.default_rng(seed)
    users = rng.choice(bundle.users.ids, min(n - 1, len(bundle.users)), replace=False).tolist()
    surfaces = bundle.config.surfaces
    requests = [
        {"user_id": int(user), "k": k, "surface": surfaces[i % len(surfaces)], "now_ms": now_ms}
        for i, user in enumerate([UNKNOWN_USER, *users])
    ]
    feed = Feed(bundle, NoStore())
    entries = [{"request": request, "answer": _answer(feed, request)} for request in requests]
    (folder / NAME).write_text(json.dumps(entries))
    return len(entries)


def check(bundle: FeedBundle, path: Path) -> int:
    """Ask again; raises GoldenError naming the first request whose ids, values or probabilities differ."""
    feed = Feed(bundle, NoStore())
    entries = json.loads(path.read_text())
    for number, entry in enumerate(entries):
        expected, found = entry["answer"], _answer(feed, entry["request"])
        where = (
            f"bundle {bundle.version}: golden request {number} of {len(entries)} (user {entry['request']['user_id']})"
        )
        if found["video_ids"] != expected["video_ids"]:
            raise GoldenError(f"{where} gives videos {found['video_ids']}, expected {expected['video_ids']}")
        for name in ("values", "scores"):
            difference = np.abs(np.array(found[name]) - np.array(expected[name])).max(initial=0.0)
            if not difference <= TOLERANCE:
                raise GoldenError(f"{where}: {name} differ by {difference:.3g}, allowed is {TOLERANCE}")
    return len(entries)


def _answer(feed: Feed, request: dict[str, Any]) -> dict[str, Any]:
    response = feed.get_feed(FeedRequest(**request, request_id="golden", explore=False))
    if response.level != Level.FULL:
        raise GoldenError(
            f"bundle {feed.bundle.version}: request {request} is answered at level {response.level.name}: "
            f"{response.degraded_reason}"
        )
    items = [asdict(item) for item in response.items]
    return {
        "video_ids": [item["video_id"] for item in items],
        "values": [item["value"] for item in items],
        "scores": [item["scores"] for item in items],
    }
