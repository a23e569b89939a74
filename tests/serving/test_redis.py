"""The shared store against a real redis-server: the same answers as the embedded one, durable, and missed politely."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest

from features.schema import SIGNALS
from serving.client import FeedClient
from serving.export import export_events
from serving.feed import Feed
from serving.messages import Event, FeedRequest, Level, LogOutcome, Video
from serving.records import NOTHING_KNOWN, ServedRow, Shortlist, UserState
from serving.redis_store import RedisConfig, RedisStore
from serving.store import SqliteStore, StoreConfig, StoreUnavailableError
from serving.stores import open_store
from serving.upload_store import Said

sys.path.insert(0, str(Path(__file__).parent))
from redis_server import RedisServer, Wire, needs_redis, redis_server
from servers import CONFIG, refused, running

pytestmark = needs_redis
T_MS = 1_700_000_000_000
QUICK = RedisConfig(retry_s=0.05, read_timeout_ms=200.0)
"""Longer than the default: other tests may hold the cores."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared) -> RedisServer:
    shared.client().flushall()
    return shared


@pytest.fixture
def store(server) -> Iterator[RedisStore]:
    store = RedisStore(server.url, QUICK)
    yield store
    store.close()


def event(rng: np.random.Generator) -> Event:
    """Few requests, slots, users and times: most events meet an earlier one."""
    optional = (None, 0, 4_000, 9_000)
    return Event(
        request_id=f"r{rng.integers(0, 6)}",
        slot=int(rng.integers(0, 4)),
        user_id=int(rng.choice([2**62 + 1, 2**62 + 2, -5])),
        video_id=2**58 + int(rng.integers(0, 3)),
        ts_ms=T_MS + int(rng.integers(0, 50)),
        author_id=None if rng.random() < 0.2 else -(2**61) + int(rng.integers(0, 3)),
        watch_ms=optional[rng.integers(0, 4)],
        duration_ms=optional[rng.integers(0, 4)],
        signals={signal: bool(rng.random() < 0.5) for signal in SIGNALS if rng.random() < 0.4},
    )


def described(state: UserState) -> list[list]:
    return [getattr(state, name).tolist() for name in UserState.__slots__]


def served(slot: int, propensity: float, request_id: str = "r1", user_id: int = 1) -> ServedRow:
    return ServedRow(request_id, slot, user_id, slot + 2, T_MS, "main", "ann", False, "p1", propensity, "v1")


def shortlist(user_id: int, videos: list[int]) -> Shortlist:
    return Shortlist("r1", user_id, T_MS - 3, "main", np.array(videos, np.int64), np.array([-4], np.int64))


def sure(call):
    """Once Redis is back, each kind of access is tried again after a moment; ended by the test's time limit."""
    while True:
        try:
            return call()
        except (StoreUnavailableError, grpc.RpcError):
            time.sleep(0.01)


def test_any_history_of_events_gives_what_the_embedded_store_gives(server, tmp_path):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        server.client().flushall()
        embedded = SqliteStore(tmp_path / f"{seed}.sqlite", StoreConfig(recent_events=10_000))
        redis_store = RedisStore(server.url, replace(QUICK, recent_events=10_000))
        for _ in range(25):
            events = [event(rng) for _ in range(rng.integers(1, 6))]
            outcomes = [one.log_events(events).result(timeout=20) for one in (embedded, redis_store)]
            assert outcomes[0] == outcomes[1]
        for user_id in (2**62 + 1, 2**62 + 2, -5, 7):
            assert described(embedded.user(user_id)) == described(redis_store.user(user_id))
        embedded.close()
        redis_store.close()
        rows = []
        for name, address in (("embedded", tmp_path / f"{seed}.sqlite"), ("redis", server.url)):
            export_events(address, tmp_path / name / str(seed))
            found = pq.read_table(tmp_path / name / str(seed) / "events").to_pylist()
            rows.append(sorted(found, key=lambda row: (row["request_id"], row["slot"])))
        assert rows[0] == rows[1]


def test_recent_events_are_bounded_while_every_video_stays_seen(server):
    store = RedisStore(server.url, replace(QUICK, recent_events=3))
    events = [Event(request_id="r", slot=s, user_id=1, video_id=s, ts_ms=T_MS - s) for s in range(1, 6)]
    assert store.log_events(events).result(timeout=20) == LogOutcome(5, 0, 0)
    late = replace(events[4], watch_ms=5)
    assert store.log_events([late]).result(timeout=20) == LogOutcome(0, 1, 0)
    state = store.user(1)
    assert state.video_id_E.tolist() == [3, 2, 1]
    assert state.seen_ids.tolist() == [1, 2, 3, 4, 5]
    store.close()


def test_a_slate_meets_its_event_with_its_propensity_and_nobody_overwrites_anothers(store, server, tmp_path):
    store.log_served([served(0, 0.25), served(1, 0.5)])
    store.log_served([served(0, 0.75)], shortlist(1, videos=[2, 3, 2**62]))
    store.log_served([served(1, 0.9, user_id=2)], shortlist(2, videos=[9]))
    store.log_served([served(0, 0.3, request_id="unanswered")])
    events = [Event(request_id="r1", slot=s, user_id=1, video_id=s + 2, ts_ms=T_MS) for s in (0, 1)]
    store.log_events(events).result(timeout=20)
    assert export_events(server.url, tmp_path / "out") == 2
    rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
    assert [(row["slot"], row["propensity"]) for row in rows] == [(0, 0.75), (1, None)]
    assert pq.read_table(tmp_path / "out" / "candidates.parquet").num_rows == 0, "slot 1 is not of the slate"
    ttl = server.client().ttl
    assert ttl("reelrank:v:r1") == -1, "what an event has answered stays"
    assert 0 < ttl("reelrank:v:unanswered") <= QUICK.slate_kept_s


def test_what_a_slate_was_drawn_from_comes_back_with_it(store, server, tmp_path):
    store.log_served([served(0, 0.75)], shortlist(1, videos=[2, 3, 2**62]))
    store.log_served([served(0, 0.9, user_id=2)], shortlist(2, videos=[9]))
    store.log_events([Event(request_id="r1", slot=0, user_id=1, video_id=2, ts_ms=T_MS)]).result(timeout=20)
    assert export_events(server.url, tmp_path / "out") == 1
    (row,) = pq.read_table(tmp_path / "out" / "candidates.parquet").to_pylist()
    assert (row["user_id"], row["video_ids"], row["session_ids"]) == (1, [2, 3, 2**62], [-4])
    assert (row["ts_ms"], row["surface"]) == (T_MS - 3, "main")


def test_uploads_and_removals_keep_their_order_and_what_was_known(store):
    said = Video(video_id=7, tags=(2**62 + 1, 3), content=np.array([0.5, -1], np.float32), regions=("DE",))
    assert store.keep(Said(10, videos=(said, Video(video_id=8)))).result(timeout=20) == 2
    assert store.keep(Said(11, removed_ids=(7, 9))).result(timeout=20) == 4
    changes = list(store.changes(after=0))
    assert [(c.number, c.video_id, c.removed, c.acknowledged_ms) for c in changes] == [
        (2, 8, False, 10),
        (3, 7, True, 11),
        (4, 9, True, 11),
    ]
    known = changes[1].video
    assert known is not None
    assert (known.tags, known.regions, known.content.tolist()) == ((2**62 + 1, 3), ("DE",), [0.5, -1.0])
    assert changes[2].video is None
    store.forget([3, 1]).result(timeout=20)
    assert [c.number for c in store.changes(after=0)] == [2, 4]
    assert [c.number for c in store.changes(after=2)] == [4]


def test_more_changes_than_one_read_takes_come_each_once(store):
    store.keep(Said(1, removed_ids=tuple(range(1, 2_502)))).result(timeout=20)
    assert [c.video_id for c in store.changes(after=1)] == list(range(2, 2_502))


def test_a_request_makes_one_grouped_read(server):
    wire = Wire(server.port)
    store = RedisStore(wire.url, QUICK)
    store.log_events([Event(request_id="r", slot=0, user_id=1, video_id=5, ts_ms=T_MS)]).result(timeout=20)
    store.user(1)
    before = wire.asked
    for _ in range(10):
        assert store.user(1).seen_ids.tolist() == [5]
    assert wire.asked - before == 10
    store.close()
    wire.close()


def test_two_servers_see_each_others_events_and_uploads(world, server, tmp_path):
    user = int(world.dataset.users.ids[3])
    with ExitStack() as stack:
        one, two = (stack.enter_context(running(world.registry, server.url)) for _ in range(2))
        first, second = (stack.enter_context(FeedClient(f"127.0.0.1:{s.port}", timeout_s=20)) for s in (one, two))
        page = first.get_feed(user, now_ms=world.now_ms)
        shown = {item.video_id for item in page.items}
        events = [
            Event(request_id=page.request_id, slot=i.slot, user_id=user, video_id=i.video_id, ts_ms=world.now_ms + 1)
            for i in page.items
        ]
        assert second.log_events(events) == LogOutcome(10, 0, 0)
        assert first.log_events(events) == LogOutcome(0, 10, 0)
        for client in (first, second):
            assert not shown & {item.video_id for item in client.get_feed(user, now_ms=world.now_ms + 2).items}
        gone = [item.video_id for item in first.get_feed(user, k=50, now_ms=world.now_ms).items]
        assert first.remove_videos(gone).removed == len(gone)
        two.live.poll()
        again = second.get_feed(-77, k=100, now_ms=world.now_ms)
        assert not set(gone) & {item.video_id for item in again.items}
        second.upsert_videos([Video(video_id=5, author_id=6, upload_ts_ms=world.now_ms - 10)])
        one.live.poll()
        assert 5 in first.retrieve(-77, k=2_000, now_ms=world.now_ms).video_id_K
    assert export_events(server.url, tmp_path / "out") == 10
    rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
    assert {(row["video_id"], row["propensity"]) for row in rows} == {(i.video_id, i.propensity) for i in page.items}


def test_an_address_that_names_no_store_or_does_not_answer_is_a_clear_error():
    with pytest.raises(ValueError, match=r"--store http://x: give a path of an SQLite file"):
        open_store("http://x")
    with pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:9/0 does not answer"):
        open_store("redis://user:secret@127.0.0.1:9/0")
    with pytest.raises(StoreUnavailableError) as caught:
        open_store("redis://user:secret@127.0.0.1:9/0")
    assert "secret" not in str(caught.value)


def test_acknowledged_events_survive_kill_9_of_redis_once(tmp_path):
    with redis_server(tmp_path / "own") as own:
        store = RedisStore(own.url, QUICK)
        acknowledged, unknown = [], []

        def send(number: int) -> None:
            one = Event(request_id=f"q{number}", slot=0, user_id=number % 5, video_id=number + 1, ts_ms=T_MS)
            try:
                store.log_events([one]).result(timeout=20)
                acknowledged.append(one)
            except StoreUnavailableError:
                unknown.append(one)

        with ThreadPoolExecutor(4) as senders:
            sent = [senders.submit(send, number) for number in range(300)]
            while len(acknowledged) < 100:
                time.sleep(0.001)
            own.kill()
            for one in sent:
                one.result()
        assert len(acknowledged) >= 100
        own.start()
        found = {video_id for user in range(5) for video_id in sure(lambda: store.user(user)).seen_ids.tolist()}  # noqa: B023
        assert {one.video_id for one in acknowledged} <= found
        again = (*acknowledged, *unknown)
        outcomes = [sure(lambda: store.log_events([one]).result(timeout=20)) for one in again]  # noqa: B023
        assert [outcome.conflicting for outcome in outcomes] == [0] * 300
        assert [outcome.stored for outcome in outcomes[: len(acknowledged)]] == [0] * len(acknowledged)
        assert export_events(own.url, tmp_path / "out") == 300
        store.close()


class TestAway:
    """Redis hung, down and slow: the level says so, K items come, nothing is acknowledged, and it ends by itself."""

    @pytest.fixture
    def own(self, tmp_path) -> Iterator[RedisServer]:
        with redis_server(tmp_path / "own") as own:
            yield own

    def feed_until(self, client: FeedClient, world, level: Level):
        while True:  # ended by the test's time limit
            page = client.get_feed(int(world.dataset.users.ids[1]), now_ms=world.now_ms + 5)
            assert len(page.items) == 10
            if page.level == level:
                return page

    @pytest.mark.parametrize("kind", ["down", "hung"])
    def test_a_server_outlives_its_redis(self, world, own, kind, tmp_path):
        user = int(world.dataset.users.ids[1])
        with (
            running(world.registry, own.url, replace(CONFIG, metrics_port=0)) as server,
            FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client,
        ):
            page = self.feed_until(client, world, Level.FULL)
            seen = page.items[0].video_id
            first = Event(request_id=page.request_id, slot=0, user_id=user, video_id=seen, ts_ms=world.now_ms)
            assert client.log_events([first]) == LogOutcome(1, 0, 0)
            self.feed_until(client, world, Level.FULL)
            own.kill() if kind == "down" else own.hang()
            away = self.feed_until(client, world, Level.FEATURES_MISSING)
            assert away.degraded_reason == "the store does not answer"
            assert seen not in {item.video_id for item in away.items}, "what was read last is still at hand"
            missed = replace(first, slot=1, video_id=page.items[1].video_id)
            code, details = refused(client.log_events, [missed])
            assert (code, details) == (
                grpc.StatusCode.UNAVAILABLE,
                "the store cannot be written; nothing was acknowledged",
            )
            own.start() if kind == "down" else own.resume()
            back = self.feed_until(client, world, Level.FULL)
            assert sure(lambda: client.log_events([first])) == LogOutcome(0, 1, 0)
            assert client.log_events([missed]).conflicting == 0
            shown = replace(first, request_id=away.request_id, video_id=away.items[0].video_id)
            assert client.log_events([shown]) == LogOutcome(1, 0, 0)
            assert back.level == Level.FULL
        export_events(own.url, tmp_path / "out")
        rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
        of_away = [row["propensity"] for row in rows if row["request_id"] == away.request_id]
        assert of_away == [away.items[0].propensity], "slates of the outage were kept for when it ended"

    def test_a_slow_redis_is_not_awaited(self, world, own):
        wire = Wire(own.port)
        store = RedisStore(wire.url, RedisConfig(read_timeout_ms=50.0, retry_s=0.05))
        feed, request = Feed(world.bundle(), store), FeedRequest(user_id=1, now_ms=world.now_ms)
        assert store.user(1) is NOTHING_KNOWN
        wire.delay_s = 5.0
        slow = feed.get_feed(request)
        assert (slow.level, len(slow.items)) == (Level.FEATURES_MISSING, 10)
        hydrate = next(stage for stage in slow.stages if stage.name == "hydrate")
        assert hydrate.ms < 5_000, "given up, not awaited"
        wire.delay_s = 0.0
        while feed.get_feed(request).level != Level.FULL:
            pass
        store.close()
        wire.close()
