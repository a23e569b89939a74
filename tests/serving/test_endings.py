"""How servers and callers end: killed, drained, cancelled; what was promised before is kept."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pyarrow.parquet as pq
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.client import FeedClient
from serving.export import export_events
from serving.feed import Feed
from serving.messages import Event
from serving.protos.reelrank.v1 import feed_pb2, feed_pb2_grpc
from serving.server import FeedServer

sys.path.insert(0, str(Path(__file__).parent))
from servers import CONFIG, running, subprocess_server
from test_ladder import Gate

SERVING = health_pb2.HealthCheckResponse.SERVING


def test_a_server_killed_while_events_pour_in_has_every_acknowledged_one_once(world, tmp_path):
    store, acknowledged, users = tmp_path / "s.sqlite", [], world.dataset.users.ids.tolist()
    with subprocess_server(world.registry, store) as (process, address):

        def pour(user: int) -> None:
            with FeedClient(address, timeout_s=20) as client:
                for _ in range(200):
                    try:
                        page = client.get_feed(user, now_ms=world.now_ms)
                        for item in page.items:
                            event = Event(
                                request_id=page.request_id,
                                slot=item.slot,
                                user_id=user,
                                video_id=item.video_id,
                                ts_ms=world.now_ms,
                            )
                            client.log_events([event])
                            acknowledged.append((event, item.propensity))
                    except grpc.RpcError:
                        return

        with ThreadPoolExecutor(3) as callers:
            pouring = [callers.submit(pour, user) for user in users[:3]]
            while len(acknowledged) < 60:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=20)
            for one in pouring:
                one.result()
    with running(world.registry, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
        outcome = client.log_events([event for event, _ in acknowledged[:1_000]])
        assert (outcome.stored, outcome.conflicting) == (0, 0)
    export_events(store, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "events").to_pylist()
    logged = {(row["request_id"], row["slot"]): (row["video_id"], row["propensity"]) for row in rows}
    assert len(logged) == len(rows), "each impression once"
    for event, propensity in acknowledged:
        assert logged[event.request_id, event.slot] == (event.video_id, propensity)


def test_a_drained_server_says_so_first_and_fails_nobody_who_listens(world, tmp_path):
    """Callers stop when health says NOT_SERVING, as a balancer would; none of their calls may fail, without retries."""
    loop, answers, failures = asyncio.new_event_loop(), [], []
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def on_loop(step):
        return asyncio.run_coroutine_threadsafe(step, loop).result(timeout=60)

    async def started() -> FeedServer:
        server = FeedServer(world.registry, tmp_path / "s.sqlite", replace(CONFIG, drain_notice_s=0.5))
        await server.start()
        return server

    server = on_loop(started())
    address, listening = f"127.0.0.1:{server.port}", threading.Event()

    def call() -> None:
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())  # pyright: ignore
            healthy = threading.Event()

            def follow() -> None:
                try:
                    for said in watch:
                        healthy.set() if said.status == SERVING else healthy.clear()
                        if said.status == SERVING:
                            listening.set()
                except grpc.RpcError:
                    healthy.clear()

            threading.Thread(target=follow, daemon=True).start()
            listening.wait(timeout=20)
            stub = feed_pb2_grpc.FeedServiceStub(channel)
            request = feed_pb2.GetFeedRequest(user_id=1, k=10, now_ms=world.now_ms)
            healthy.wait(timeout=20)
            while healthy.is_set():
                try:
                    answers.append(len(stub.GetFeed(request, timeout=20).items))
                except grpc.RpcError as error:
                    failures.append(error.code())
            watch.cancel()

    with ThreadPoolExecutor(3) as callers:
        calling = [callers.submit(call) for _ in range(3)]
        while len(answers) < 30:
            time.sleep(0.002)
        on_loop(server.drain())
        for one in calling:
            one.result(timeout=30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()
    assert failures == []
    assert set(answers) == {10}


def test_a_caller_that_goes_away_leaves_nothing_behind(world, tmp_path):
    with running(world.registry, tmp_path / "s.sqlite") as server:
        whole = server.live.feed
        gate = Gate(whole.bundle.ranker)
        server.live.feed = Feed(replace(whole.bundle, ranker=gate), server.store)
        request = feed_pb2.GetFeedRequest(user_id=1, k=10, now_ms=world.now_ms)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = feed_pb2_grpc.FeedServiceStub(channel)
            calls = [stub.GetFeed.future(request, timeout=20) for _ in range(6)]
            while gate.waiting < CONFIG.threads:
                time.sleep(0.002)
            for one in calls:
                one.cancel()
            admission = server._servicer.admission
            while admission.in_flight > CONFIG.threads:  # those that waited are gone; ended by the test's time limit
                time.sleep(0.002)
            gate.open.set()
            while admission.in_flight:
                time.sleep(0.002)
            server.live.feed = whole
            assert len(stub.GetFeed(request, timeout=20).items) == 10
