"""Every dependency hung, failing or wrong: the level that is promised, K items that keep the rules, and a way back."""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.feed import Feed
from serving.messages import FeedRequest, FeedResponse, Level
from serving.store import NoStore, StoreUnavailableError
from serving.trace import AnsweredElsewhereError, Deadline

sys.path.insert(0, str(Path(__file__).parent))
from servers import CONFIG, running


class Away(NoStore):
    """A store that does not answer."""

    def user(self, user_id: int):
        raise StoreUnavailableError("gone")


@dataclass
class Failing:
    """Stands in for a dependency: any call raises."""

    name: str = "popular"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        return fail


class Wrong:
    """A real ranker that says NaN, or less than it was asked."""

    def __init__(self, ranker: Any, how: str) -> None:
        self._ranker, self._how = ranker, how

    def score(self, inputs):
        scores = self._ranker.score(inputs)
        if self._how == "short":
            return replace(scores, probability_NT=scores.probability_NT[:-1], watch_ms_N=scores.watch_ms_N[:-1])
        return replace(scores, probability_NT=np.full_like(scores.probability_NT, np.nan))


class Gate:
    """A ranker, or towers, that hang while it is shut."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.open, self.waiting = inner, threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.waiting += 1
            self.open.wait()
            self.waiting -= 1
            return attribute(*arguments, **named)

        return call if callable(attribute) else attribute


@pytest.fixture(scope="module")
def bundle(world) -> FeedBundle:
    return world.bundle()


def lower(bundle: FeedBundle, kind: str) -> tuple[FeedBundle, Any]:
    """A bundle and a store with one thing broken."""
    changed: dict[str, Any] = {
        "ranker raises": {"ranker": Failing()},
        "ranker says NaN": {"ranker": Wrong(bundle.ranker, "nan")},
        "ranker says too little": {"ranker": Wrong(bundle.ranker, "short")},
        "towers raise": {"towers": Failing()},
        "index raises": {"sources": (Failing("ann"), *(s for s in bundle.sources if s.name == "popular"))},
        "every source raises": {"sources": (Failing(),)},
        "bitmaps raise": {"eligibility": Failing()},
        "store raises": {},
    }[kind]
    return replace(bundle, **changed), Away() if kind == "store raises" else NoStore()


LEVELS = {
    "store raises": Level.FEATURES_MISSING,
    "ranker raises": Level.RETRIEVAL_ORDER,
    "ranker says NaN": Level.RETRIEVAL_ORDER,
    "ranker says too little": Level.RETRIEVAL_ORDER,
    "towers raise": Level.POPULAR,
    "index raises": Level.POPULAR,
    "every source raises": Level.STATIC,
    "bitmaps raise": Level.STATIC,
}


@pytest.mark.parametrize(("kind", "level"), LEVELS.items())
def test_each_broken_dependency_gives_its_level_and_k_items_that_keep_the_rules(world, bundle, kind, level):
    feed, rng = Feed(*lower(bundle, kind)), np.random.default_rng(5)
    videos = {video["video_id"]: video for video in world.tables["videos"].to_pylist()}
    history = world.tables["events"].to_pylist()
    for _ in range(20):
        user = int(rng.choice([*bundle.users.ids, 77]))
        excluded = rng.choice(list(videos), 5, replace=False).tolist()
        blocked = [videos[video_id]["author_id"] for video_id in excluded[:2]]
        request = FeedRequest(
            user_id=user, now_ms=world.now_ms, excluded_video_ids=excluded, blocked_author_ids=blocked
        )
        answer = feed.get_feed(request)
        assert (answer.level, len(answer.items)) == (level, 10)
        assert answer.degraded_reason
        assert answer.policy_id.endswith(f"/{level.name.lower()}")
        shown = [item.video_id for item in answer.items]
        assert len(set(shown)) == 10
        assert not {row["video_id"] for row in history if row["user_id"] == user} & set(shown)
        assert not set(shown) & set(excluded)
        for item in answer.items:
            assert videos[item.video_id]["eligible"]
            assert item.author_id not in (*blocked, user)
            assert videos[item.video_id]["upload_ts_ms"] <= world.now_ms
            assert np.isfinite(item.value)
            assert 0 < item.propensity <= 1
        for stage in answer.stages:
            if stage.name not in ("filter", "retrieve", "popular"):  # they may have ended early
                assert stage.received - stage.kept == sum(stage.removed.values()), stage


def test_a_better_level_returns_with_its_dependency(world, bundle):
    store = Away()
    feed, request = Feed(bundle, store), FeedRequest(user_id=1, now_ms=world.now_ms)
    assert feed.get_feed(request).level == Level.FEATURES_MISSING
    assert feed.rank(1, [5], now_ms=world.now_ms).level == Level.FEATURES_MISSING
    store.user = NoStore().user
    assert feed.get_feed(request).level == Level.FULL


def test_only_one_answer_of_a_request_is_given_and_logged(world, bundle):
    class Keeping(NoStore):
        def __init__(self) -> None:
            self.policies: list[str] = []

        def log_served(self, rows, shortlist=None):
            self.policies.append(rows[0].policy_id)

    kept = Keeping()
    feed, deadline = Feed(bundle, kept), Deadline.after(60)
    request = FeedRequest(user_id=1, now_ms=world.now_ms)
    rescued = feed.rescue(request, deadline, "late")
    assert (rescued.level, len(rescued.items), rescued.degraded_reason) == (Level.POPULAR, 10, "late")
    with pytest.raises(AnsweredElsewhereError):
        feed.get_feed(request, deadline)
    assert kept.policies == [rescued.policy_id]


@pytest.mark.parametrize("part", ["ranker", "towers"])
def test_pages_are_answered_in_time_while_a_model_hangs_and_fully_once_it_does_not(world, part, tmp_path):
    store = tmp_path / "s.sqlite"
    with (
        running(world.registry, store, CONFIG) as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=1.0) as client,
        ThreadPoolExecutor(4) as callers,
    ):
        whole = server.live.feed
        gate = Gate(getattr(whole.bundle, part))
        server.live.feed = Feed(replace(whole.bundle, **{part: gate}), server.store)

        def page(_: int) -> FeedResponse:
            return client.get_feed(1, now_ms=world.now_ms)  # raises when the deadline of 1 s passes

        try:
            first = list(callers.map(page, range(2)))
            assert gate.waiting == CONFIG.threads
            later = list(callers.map(page, range(12)))
            assert gate.waiting == CONFIG.threads, "no call waits behind workers that hang"
        finally:
            gate.open.set()
        for answer in (*first, *later):
            assert (answer.level, len(answer.items)) == (Level.POPULAR, 10)
        assert {answer.degraded_reason for answer in first} == {"the full answer took too long"}
        assert {answer.degraded_reason for answer in later} == {"the workers hang"}
        while page(0).level != Level.FULL:  # ended by the test's time limit
            pass
    rows = sqlite3.connect(store).execute("SELECT request_id, policy_id, count(*) FROM served GROUP BY 1, 2").fetchall()
    logged = {request_id: (policy_id, count) for request_id, policy_id, count in rows}
    for answer in (*first, *later):
        assert logged[answer.request_id] == (answer.policy_id, 10), "what was logged is what was shown"
