"""The server over real gRPC: clear refusals, deadlines, durable events, hot swap, drain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pyarrow.parquet as pq
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from features.artifacts import Registry
from serving.client import FeedClient
from serving.export import export_events
from serving.handlers import SERVICE
from serving.limits import MAX_MESSAGE_BYTES
from serving.messages import Event, Level, LogOutcome
from serving.protos.reelrank.v1 import feed_pb2, feed_pb2_grpc
from serving.security import SecurityError, ServerSecurity
from serving.server import FeedServer, serve

sys.path.insert(0, str(Path(__file__).parent))
from servers import CONFIG, refused, running, subprocess_server


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[FeedServer]:
    with running(world.registry, tmp_path_factory.mktemp("server") / "events.sqlite") as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[FeedClient]:
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
        yield client


def answer(item, response, user_id: int, ts_ms: int, **signals: bool) -> Event:
    return Event(
        request_id=response.request_id,
        slot=item.slot,
        user_id=user_id,
        video_id=item.video_id,
        ts_ms=ts_ms,
        watch_ms=2_000,
        signals=signals,
    )


def test_a_feed_of_ten_for_a_known_and_for_an_unknown_user(world, client):
    known = client.get_feed(int(world.dataset.users.ids[0]), k=10, now_ms=world.now_ms)
    assert (len(known.items), known.cold, known.level, known.bundle_version) == (10, False, Level.FULL, "v1")
    assert [stage.name for stage in known.stages] == ["hydrate", "filter", "retrieve", "rank", "arrange", "respond"]
    stranger = client.get_feed(-1)
    assert (len(stranger.items), stranger.cold) == (10, True)


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({"k": 0}, "k: 0 is outside 1 .. 100"),
        ({"k": 10_000}, "k: 10000 is outside 1 .. 100"),
        ({"surface": "nowhere"}, "surface: 'nowhere' is not known to this bundle; it knows 'main', 'search'"),
    ],
)
def test_a_bad_page_is_an_invalid_argument_that_names_the_field(client, fields, details):
    assert refused(client.get_feed, 1, **fields) == (grpc.StatusCode.INVALID_ARGUMENT, details)


def test_candidates_and_events_have_limits_with_a_field_path(world, client):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert refused(client.rank, 1, range(2_001)) == (invalid, "video_ids: 2001 entries, allowed are 1 .. 2000")
    assert refused(client.retrieve, 1, k=2_001) == (invalid, "k: 2001 is outside 1 .. 2000")
    assert refused(client.log_events, [])[0] == invalid
    good = Event(request_id="limits", slot=0, user_id=1, video_id=2, ts_ms=world.now_ms)
    bad = Event(request_id="limits", slot=-1, user_id=1, video_id=2, ts_ms=world.now_ms)
    assert refused(client.log_events, [good, bad]) == (invalid, "events[1].slot: -1 is outside 0 .. 9999")
    assert client.log_events([good]) == LogOutcome(1, 0, 0), "a refused list stores nothing"


def test_a_message_too_large_is_refused_before_it_is_read(client):
    too_many = range(MAX_MESSAGE_BYTES // 8 + 1)
    code, details = refused(client.get_feed, 1, excluded_video_ids=too_many)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details


def test_retrieve_and_rank_travel_as_packed_arrays_that_agree_with_the_feed(world, client):
    user, k = int(world.dataset.users.ids[2]), world.bundle().config.blend.k
    pool = client.retrieve(user, k=k, now_ms=world.now_ms)
    assert 50 < len(pool.video_id_K) == len(set(pool.video_id_K.tolist())) <= k
    assert len(pool.reasons) == len(pool.connected_K) == len(pool.score_K) == len(pool.video_id_K)
    ranked = client.rank(user, [*pool.video_id_K.tolist(), 3], now_ms=world.now_ms)
    assert ranked.unknown.tolist() == [len(pool.video_id_K)]
    page = client.get_feed(user, now_ms=world.now_ms)
    by_id = dict(zip(pool.video_id_K.tolist(), ranked.value_N.tolist(), strict=False))
    assert len(page.items) == 10, "a page is sampled: any ten of the pool"
    for item in page.items:
        assert item.value == pytest.approx(by_id[item.video_id], abs=1e-6)


def test_a_page_excludes_the_page_before_and_an_event_excludes_for_good(world, client):
    user = int(world.dataset.users.ids[6])
    first = client.get_feed(user, now_ms=world.now_ms)
    shown = [item.video_id for item in first.items]
    second = client.get_feed(user, excluded_video_ids=shown, now_ms=world.now_ms)
    assert not set(shown) & {item.video_id for item in second.items}
    events = [answer(item, first, user, world.now_ms + 1, like=True) for item in first.items]
    assert client.log_events(events) == LogOutcome(10, 0, 0)
    assert client.log_events(events) == LogOutcome(0, 10, 0)
    third = client.get_feed(user, now_ms=world.now_ms + 2)
    assert not set(shown) & {item.video_id for item in third.items}


def test_a_deadline_is_kept_or_named(server, world, client):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        for timeout_s in (0.000_1, 0.002, 0.02, 0.1):
            call = stub.GetFeed.future(feed_pb2.GetFeedRequest(user_id=1, k=10, now_ms=world.now_ms), timeout=timeout_s)
            assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
            if call.code() == grpc.StatusCode.OK:
                response = call.result()
                assert len(response.items) == 10
                assert response.level == feed_pb2.LEVEL_FULL or response.degraded_reason
    code, _ = refused(client.get_feed, 1, timeout_s=1e-9)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_reflection_answer(server, client):
    assert client.serving()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=20
        )
        names = [service.name for service in next(listing).list_services_response.service]
    assert SERVICE == "reelrank.v1.FeedService"
    assert SERVICE in names


def test_a_live_pointer_moves_the_feed_and_a_bad_bundle_moves_nothing(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    with running(registry.root, tmp_path / "s.sqlite") as server, FeedClient(f"127.0.0.1:{server.port}") as client:

        def version() -> str:
            return client.get_feed(1, now_ms=world.now_ms, timeout_s=20).bundle_version

        assert version() == "v1"
        registry.set_live("v2")
        assert server.live.poll()
        assert version() == "v2"

        damaged = registry.root / "bundles" / "v1" / "ranker" / "ranker.safetensors"
        raw = bytearray(damaged.read_bytes())
        raw[-1] ^= 1
        damaged.write_bytes(raw)
        (registry.root / "LIVE").write_text("v1\n")
        assert not server.live.poll()
        assert not server.live.poll()
        assert (version(), server.live.refusals, server.live.swaps) == ("v2", 1, 1)

        (registry.root / "LIVE").write_text("no such version\n")
        assert not server.live.poll()
        assert (version(), server.live.refusals) == ("v2", 2)


def test_no_request_fails_or_mixes_versions_while_bundles_swap(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    policies = {version: world.bundle(version).config.policy_id for version in ("v1", "v2")}
    users, answers, stop = world.dataset.users.ids.tolist(), [], threading.Event()

    def ask(address: str) -> None:
        with FeedClient(address, timeout_s=20) as client:
            while not stop.is_set():
                answers.append(client.get_feed(users[len(answers) % len(users)], now_ms=world.now_ms))

    with running(registry.root, tmp_path / "s.sqlite") as server, ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask, f"127.0.0.1:{server.port}") for _ in range(2)]
        for version in ("v2", "v1", "v2", "v1"):
            registry.set_live(version)
            assert server.live.poll()
        stop.set()
        for one in asking:
            one.result(timeout=30)
    assert {answer.bundle_version for answer in answers} == {"v1", "v2"}
    for answer in answers:
        assert (answer.policy_id, len(answer.items)) == (policies[answer.bundle_version], 10)


def test_a_bundle_that_answers_otherwise_than_when_published_is_refused(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    with running(registry.root, tmp_path / "s.sqlite") as server:
        staged = registry.stage()
        shutil.copytree(registry.open("v2").folder, staged, dirs_exist_ok=True)
        for name in ("manifest.json", "manifest.sha256"):
            (staged / name).unlink()
        golden = json.loads((staged / "golden.json").read_text())
        golden[0]["answer"]["values"][0] += 0.001
        (staged / "golden.json").write_text(json.dumps(golden))
        registry.set_live(registry.publish(staged, version="v3", meta={}))
        assert not server.live.poll()
        assert (server.live.feed.bundle.version, server.live.refusals) == ("v1", 1)


def test_draining_says_so_lets_calls_end_and_writes_the_log_out(world, tmp_path):
    store = tmp_path / "s.sqlite"
    with running(world.registry, store) as server, FeedClient(f"127.0.0.1:{server.port}") as client:
        page = client.get_feed(5, now_ms=world.now_ms, timeout_s=20)
        client.log_events([answer(page.items[0], page, 5, world.now_ms)])
    assert export_events(store, tmp_path / "out") == 1
    with pytest.raises(grpc.RpcError), FeedClient(f"127.0.0.1:{server.port}") as client:
        client.get_feed(5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com", "10.0.0.7"])  # noqa: S104 - refused addresses
def test_an_address_others_can_reach_needs_an_explicit_word(host):
    with pytest.raises(SecurityError, match="--insecure-public"):
        ServerSecurity().check_address(host)
    ServerSecurity(insecure_public=True).check_address(host)
    ServerSecurity().check_address("127.0.0.1")


def test_acknowledged_events_survive_kill_9_once_and_change_the_next_page(world, tmp_path):
    store, user = tmp_path / "events.sqlite", int(world.dataset.users.ids[8])
    with subprocess_server(world.registry, store) as (process, address), FeedClient(address, timeout_s=30) as client:
        page = client.get_feed(user, now_ms=world.now_ms)
        events = [answer(item, page, user, world.now_ms + 1, click=True) for item in page.items]
        for event in events:
            assert client.log_events([event]) == LogOutcome(1, 0, 0)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=20)
    with running(world.registry, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        assert client.log_events(events) == LogOutcome(0, 10, 0), "every acknowledged event is there, once"
        after = client.get_feed(user, now_ms=world.now_ms + 2)
        assert not {item.video_id for item in after.items} & {item.video_id for item in page.items}
    assert export_events(store, tmp_path / "out") == 10
    rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
    logged = {(row["slot"], row["video_id"], row["propensity"], row["bundle_version"]) for row in rows}
    assert logged == {(item.slot, item.video_id, item.propensity, "v1") for item in page.items}


def test_sigterm_ends_the_server_and_a_ready_server_names_its_address_and_its_page(world, tmp_path):
    answered, pages = [], []

    def on_ready(address: str, version: str) -> None:
        def ask_and_stop() -> None:
            with FeedClient(address) as client, urllib.request.urlopen(pages[0], timeout=20) as page:  # noqa: S310
                answered.append((client.get_feed(5, now_ms=world.now_ms, timeout_s=20).bundle_version, version))
                answered.append("feed.js" in page.read().decode())
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=ask_and_stop).start()

    serve(world.registry, tmp_path / "s.sqlite", replace(CONFIG, web_port=0), on_ready, pages.append)
    assert answered == [("v1", "v1"), True]


def test_calls_beyond_the_limit_are_refused_at_once(server, world):
    """More calls than may be in flight, sent together: each is answered or refused, none is lost."""
    request = feed_pb2.GetFeedRequest(user_id=1, k=10, now_ms=world.now_ms)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        calls = [stub.GetFeed.future(request, timeout=30) for _ in range(CONFIG.max_in_flight + 40)]
        codes = [call.code() for call in calls]
    assert codes.count(grpc.StatusCode.OK) >= CONFIG.max_in_flight
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
