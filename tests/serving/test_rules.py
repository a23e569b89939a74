"""The rules of a feed over whole sessions: nothing filtered, nothing twice, K items or the reason."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranking.arrange import ArrangeConfig
from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.config import DislikeConfig
from serving.feed import Feed
from serving.hydrate import hydrate
from serving.limits import InvalidRequestError
from serving.messages import FeedRequest, Level
from serving.session import MAX_SHOWN, Session
from serving.store import NOTHING_KNOWN, NoStore, UserState

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from servers import running
from test_ladder import LEVELS, lower

HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def bundle(world) -> FeedBundle:
    return world.bundle()


class Remembered(NoStore):
    """Live events of one user, given."""

    def __init__(self, state: UserState) -> None:
        self._state = state

    def user(self, user_id: int) -> UserState:
        return self._state

    at_hand = user


def arranged(bundle: FeedBundle, *, dislikes: DislikeConfig | None = None, **rules) -> FeedBundle:
    config = replace(bundle.config, arrange=ArrangeConfig(**rules), topic_feature="tags")
    return replace(bundle, config=replace(config, dislikes=dislikes or DislikeConfig()))


def hated(bundle: FeedBundle, video_id: int, ts_ms: int) -> UserState:
    ids = np.array([video_id])
    hate = np.array([1 << 7], np.uint8)
    return UserState(ids, np.array([ts_ms]), hate, np.ones(1, np.float32), ids, np.zeros(0, np.int64))


def check_sessions(world, bundle: FeedBundle, pages: int, seed: int) -> dict[str, int]:
    """Random sessions under random rules, blocks and broken parts; counts pages, items and levels."""
    rng, levels, items = np.random.default_rng(seed), defaultdict(int), 0
    videos = {video["video_id"]: video for video in world.tables["videos"].to_pylist()}
    authors = np.unique([video["author_id"] for video in videos.values()])
    seen, follows = defaultdict(set), defaultdict(set)
    for row in world.tables["events"].to_pylist():
        seen[row["user_id"]].add((row["ts_ms"], row["video_id"]))
    for row in world.tables["follows"].to_pylist():
        follows[row["user_id"]].add(row["author_id"])
    done = 0
    while done < pages:
        kind = str(rng.choice([*LEVELS, *["whole"] * 8]))
        changed, store = (bundle, NoStore()) if kind == "whole" else lower(bundle, kind)
        cap = int(rng.integers(1, 4))
        feed = Feed(
            arranged(
                changed,
                author_cap=cap,
                topic_decay=float(rng.uniform(0.2, 1)),
                diversity_by=str(rng.choice(["mmr", "ssd"])),
                duplicate_cosine=float(rng.choice([0.9, 0.99, 1.0])),
                fresh_slots=(2,) if rng.random() < 0.5 else (),
                uniform_slots=(4,) if rng.random() < 0.5 else (),
            ),
            store,
        )
        user, token, shown = int(rng.choice([*bundle.users.ids, 77])), b"", set()
        now_ms = world.now_ms - int(rng.integers(0, 72 * HOUR_MS))
        past = {video_id for ts_ms, video_id in seen[user] if ts_ms < now_ms}
        blocked = set(rng.choice(authors, rng.choice([0, 3]), replace=False).tolist())
        excluded = set(rng.choice(list(videos), rng.choice([0, 40]), replace=False).tolist())
        for _ in range(int(rng.integers(1, 8))):
            k = int(rng.choice([1, 10, 30]))
            request = FeedRequest(user_id=user, k=k, now_ms=now_ms, page_token=token)
            page = feed.get_feed(replace(request, excluded_video_ids=list(excluded), blocked_author_ids=list(blocked)))
            ids = [item.video_id for item in page.items]
            assert page.level == LEVELS.get(kind, Level.FULL) or not ids
            assert len(ids) == k or page.shortfall_reason
            assert len(set(ids)) == len(ids)
            assert not set(ids) & (shown | past | excluded)
            of_author: dict[int, int] = defaultdict(int)
            for item in page.items:
                video = videos[item.video_id]
                assert video["eligible"]
                assert video["upload_ts_ms"] <= now_ms
                assert item.author_id == video["author_id"]
                assert item.author_id not in blocked | {user}
                assert item.connected == (item.author_id in follows[user])
                assert 0 < item.propensity <= 1
                of_author[item.author_id] += 1
            assert max(of_author.values(), default=0) <= cap
            shown |= set(ids)
            token, done, items = page.next_page_token, done + 1, items + len(ids)
            levels[page.level.name] += 1
    return {"pages": done, "items": items, **levels}


def test_random_sessions_keep_every_rule_at_every_level(world, bundle):
    found = check_sessions(world, bundle, pages=300, seed=1)
    assert found["items"] > 1_500
    assert set(found) == {"pages", "items", *(level.name for level in Level)}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_hundred_thousand_pages_keep_every_rule(world, bundle):
    keep("rules", check_sessions(world, bundle, pages=100_000, seed=2))


def test_paging_through_everything_shows_each_video_once(world, tmp_path):
    user, token, shown = int(world.dataset.users.ids[0]), b"", []
    with (
        running(world.registry, tmp_path / "s.sqlite") as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client,
    ):
        allowed = client.retrieve(user, k=2_000, now_ms=world.now_ms).video_id_K
        while True:
            page = client.get_feed(user, k=17, now_ms=world.now_ms, page_token=token)
            if not page.items:
                break
            shown += [item.video_id for item in page.items]
            token = page.next_page_token
    assert page.shortfall_reason.startswith("0 candidates passed the filters")
    assert len(shown) == len(set(shown))
    assert set(allowed.tolist()) <= set(shown)


def test_a_token_that_no_page_gave_is_refused_and_a_session_has_an_end(bundle):
    good = Session.read(b"").token([1, -(2**63), 2**63 - 1])
    assert Session.read(good).video_id_N.tolist() == [1, -(2**63), 2**63 - 1]
    for bad in (b"x", good[:-1], good + b"x" * 8, b"\x02" + good[1:], bytes([*good[:-1], good[-1] ^ 1])):
        with pytest.raises(InvalidRequestError, match="page_token: not one that a page gave"):
            Feed(bundle, NoStore()).get_feed(FeedRequest(user_id=1, page_token=bad))
    assert len(Session.read(Session.read(b"").token(range(MAX_SHOWN))).video_id_N) == MAX_SHOWN
    with pytest.raises(InvalidRequestError, match="begin anew"):
        Session.read(Session.read(b"").token(range(MAX_SHOWN + 1)))


def test_a_dislike_takes_from_its_author_and_topic_and_fades(world, bundle):
    dislikes = DislikeConfig(author=1.0, topic=0.5, half_life_h=24.0)
    changed = arranged(bundle, dislikes=dislikes, explore=False, diversity=0.0, author_decay=1.0)
    by_id = {video["video_id"]: video for video in world.tables["videos"].to_pylist()}
    tag = {video_id: (video["tags"] or [None])[0] for video_id, video in by_id.items()}
    of_author = Counter(video["author_id"] for video in by_id.values())
    disliked = next(v["video_id"] for v in by_id.values() if v["tags"] and of_author[v["author_id"]] > 5)
    request = FeedRequest(user_id=-3, k=100, now_ms=world.now_ms)
    before = {item.video_id: item.value for item in _all(Feed(changed, NoStore()), request)}
    for age_h, left in ((1, 0.5 ** (1 / 24)), (24, 0.5), (48, 0.25)):
        live = hated(bundle, disliked, world.now_ms - age_h * HOUR_MS)
        quiet = replace(changed, config=replace(changed.config, dislikes=DislikeConfig()))
        plain = {item.video_id: item.value for item in _all(Feed(quiet, Remembered(live)), request)}
        touched = 0
        for item in _all(Feed(changed, Remembered(live)), request):
            author = 1.0 if by_id[item.video_id]["author_id"] == by_id[disliked]["author_id"] else 0.0
            topic = 0.5 if tag[item.video_id] is not None and tag[item.video_id] == tag[disliked] else 0.0
            kept = (1 - author * left) * (1 - topic * left)
            value = plain[item.video_id]
            assert item.value == pytest.approx(value - (1 - kept) * abs(value), abs=1e-9)
            assert item.value == pytest.approx(sum(item.value_terms.values()))
            touched += kept < 1
        assert touched > 3
    assert len(before) > 100


def _all(feed: Feed, request: FeedRequest) -> list:
    items, token = [], b""
    while page := feed.get_feed(replace(request, page_token=token)).items:
        items += page
        token = Session.read(token).token([item.video_id for item in page])
    return items


def test_a_dislike_of_the_bundles_own_history_counts_and_one_of_the_future_does_not(world, bundle):
    history = world.tables["events"].to_pylist()
    user = max({row["user_id"] for row in history}, key=lambda u: sum(r["hate"] for r in history if r["user_id"] == u))
    now_ms = sorted(row["ts_ms"] for row in history if row["user_id"] == user and row["hate"])[-1]
    expected = {
        (row["video_id"], row["ts_ms"])
        for row in history
        if row["user_id"] == user and row["hate"] and row["ts_ms"] < now_ms
    }
    query = hydrate(bundle, NOTHING_KNOWN, user_id=user, now_ms=now_ms, surface="main")
    found = set(zip(bundle.videos.ids_of(query.disliked_rows).tolist(), query.disliked_ts_ms.tolist(), strict=True))
    assert found == expected
    assert len(found) > 3


def test_the_session_tires_of_its_topics_and_never_repeats_a_near_copy(world, bundle):
    changed = arranged(bundle, explore=False, diversity=0.0, author_decay=1.0, author_cap=10, topic_decay=0.3)
    plain = arranged(bundle, explore=False, diversity=0.0, author_decay=1.0, author_cap=10)
    request = FeedRequest(user_id=int(bundle.users.ids[2]), k=10, now_ms=world.now_ms)
    tags = {video["video_id"]: (video["tags"] or [None])[0] for video in world.tables["videos"].to_pylist()}

    def most_common(feed: Feed) -> int:
        counts: dict = defaultdict(int)
        for item in _pages(feed, request, 3):
            counts[tags[item.video_id]] += tags[item.video_id] is not None
        return max(counts.values())

    assert most_common(Feed(changed, NoStore())) < most_common(Feed(plain, NoStore()))
    strict = Feed(arranged(bundle, diversity=0.0, duplicate_cosine=0.97, author_cap=10), NoStore())
    rows = bundle.videos.rows_of(np.array([item.video_id for item in _pages(strict, request, 2)]))
    cosine = bundle.vectors[rows].astype(np.float64) @ bundle.vectors[rows].astype(np.float64).T
    assert len(rows) > 3
    assert (cosine - 2 * np.eye(len(rows))).max() < 0.97 + 1e-3


def _pages(feed: Feed, request: FeedRequest, number: int) -> list:
    items, token = [], b""
    for _ in range(number):
        page = feed.get_feed(replace(request, page_token=token))
        items, token = [*items, *page.items], page.next_page_token
    return items


def test_fresh_and_uniform_slots_are_drawn_as_they_say(world, bundle):
    hours = 40.0
    changed = arranged(bundle, fresh_slots=(1, 3), fresh_h=hours, uniform_slots=(0,), top_m=50)
    upload = {video["video_id"]: video["upload_ts_ms"] for video in world.tables["videos"].to_pylist()}
    now_ms = world.now_ms - 24 * HOUR_MS
    for number in range(20):
        request = FeedRequest(user_id=int(bundle.users.ids[number]), now_ms=now_ms, request_id=str(number))
        page = Feed(changed, NoStore()).get_feed(request)
        for slot in (1, 3):
            assert upload[page.items[slot].video_id] > now_ms - hours * HOUR_MS
        assert page.items[0].propensity == pytest.approx(1 / 50)
