"""The feed on Ray Serve: the plain server's answers, a swap and a killed replica that no caller has to notice."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
import yaml

from features.artifacts import Registry
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.security import SecurityError

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from ray_serve import AUTHORIZED, CONFIG, RETRIED, Deployed, deployed
from redis_server import needs_redis, redis_server
from servers import CONFIG as PLAIN
from servers import running

pytest.importorskip("ray.serve", reason="pip install --no-deps -r requirements/serve.txt")
REPLICAS = 2
RETRIES = 2


@dataclass
class Outcomes:
    """What callers met, from any thread."""

    attempts: Counter = field(default_factory=Counter)
    """Answered calls by how often they were sent."""
    failed: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def registry(world, tmp_path_factory) -> Path:
    """Of this module alone: it goes from v1 to v2."""
    return shutil.copytree(world.registry, tmp_path_factory.mktemp("registry") / "registry", symlinks=True)


@pytest.fixture(scope="module")
def cluster(registry, tmp_path_factory) -> Iterator[Deployed]:
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        deployed(tmp_path_factory.mktemp("serve"), registry, redis.url, REPLICAS) as cluster,
    ):
        yield cluster


class Callers:
    """Threads that ask for pages, one after another and with a pause, until the block ends."""

    def __init__(self, cluster: Deployed, users: list[int], now_ms: int, callers: int, pause_s: float) -> None:
        self.outcomes = Outcomes()
        self._cluster, self._users, self._now_ms, self._pause_s = cluster, users, now_ms, pause_s
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(callers)]

    def _ask(self, number: int) -> None:
        with self._cluster.channel() as channel:
            stub = self._cluster.stub(channel)
            while not self._ending.wait(self._pause_s):
                number += 1
                request = pb.GetFeedRequest(user_id=self._users[number % len(self._users)], k=5, now_ms=self._now_ms)
                self._one(stub, request)

    def _one(self, stub, request) -> None:
        for attempt in range(1, RETRIES + 2):
            try:
                page = stub.GetFeed(request, timeout=20, metadata=AUTHORIZED)
            except grpc.RpcError as error:
                if attempt <= RETRIES and error.code() in RETRIED:
                    time.sleep(0.05 * attempt)
                    continue
                self.outcomes.failed.append(f"{error.code().name}: {error.details()}")
                return
            assert len(page.items) == 5
            self.outcomes.attempts[attempt] += 1
            self.outcomes.versions.add(page.bundle_version)
            return

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


@needs_redis
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_answer_as_the_plain_server_does(world, cluster, tmp_path):
    users = [int(user) for user in world.dataset.users.ids[:8]] + [-1]
    with (
        running(world.registry, tmp_path / "s.sqlite", replace(PLAIN, default_deadline_ms=20_000)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain,
        cluster.channel() as replicas,
    ):
        for user in users:
            request = pb.GetFeedRequest(user_id=user, k=10, request_id=f"r{user}", now_ms=world.now_ms)
            expected = cluster.stub(plain).GetFeed(request, timeout=20)
            found = cluster.stub(replicas).GetFeed(request, timeout=20, metadata=AUTHORIZED)
            assert list(found.items) == list(expected.items)
            assert (found.policy_id, found.level) == (expected.policy_id, expected.level)
        ids = [item.video_id for item in expected.items]
        ranked = pb.RankRequest(user_id=users[0], video_ids=ids, now_ms=world.now_ms)
        expected = cluster.stub(plain).Rank(ranked, timeout=20)
        found = cluster.stub(replicas).Rank(ranked, timeout=20, metadata=AUTHORIZED)
        assert list(found.scores) == list(expected.scores)


@needs_redis
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_one_replica_acknowledged_every_replica_knows_and_mistakes_keep_their_status(world, cluster):
    user = int(world.dataset.users.ids[9])
    with cluster.channel() as channel:
        stub = cluster.stub(channel)
        page = stub.GetFeed(pb.GetFeedRequest(user_id=user, k=10, now_ms=world.now_ms), metadata=AUTHORIZED, timeout=20)
        events = [
            pb.Event(request_id=page.request_id, slot=i.slot, user_id=user, video_id=i.video_id, ts_ms=world.now_ms)
            for i in page.items
        ]
        assert stub.LogEvents(pb.LogEventsRequest(events=events), metadata=AUTHORIZED, timeout=20).stored == 10
        for _ in range(20):
            request = pb.GetFeedRequest(user_id=user, k=10, now_ms=world.now_ms + 1)
            again = stub.GetFeed(request, metadata=AUTHORIZED, timeout=20)
            assert not {i.video_id for i in again.items} & {i.video_id for i in page.items}
        for bad, metadata, code, details in (
            (pb.GetFeedRequest(k=0), AUTHORIZED, grpc.StatusCode.INVALID_ARGUMENT, "k: 0 is outside 1 .. 100"),
            (pb.GetFeedRequest(k=5), (), grpc.StatusCode.UNAUTHENTICATED, "no known token"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetFeed(bad, metadata=metadata, timeout=20)
            assert caught.value.code() == code
            assert details in caught.value.details()


@needs_redis
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_change_over_to_a_new_bundle_and_no_call_fails(world, registry, cluster):
    users = [int(user) for user in world.dataset.users.ids]
    with Callers(cluster, users, world.now_ms, callers=2, pause_s=0.1) as callers:
        while not callers.outcomes.attempts:
            time.sleep(0.05)
        Registry(registry).set_live("v2")
        callers.outcomes.versions.clear()
        while callers.outcomes.versions != {"v2"}:  # ended by the test's time limit
            callers.outcomes.versions.clear()
            time.sleep(2)
    assert callers.outcomes.failed == []
    assert set(callers.outcomes.attempts) == {1}, "not even a retry"


@needs_redis
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica_fails_no_call_after_two_retries_and_is_replaced_within_30_s(world, cluster):
    users = [int(user) for user in world.dataset.users.ids]
    cluster.wait_for(REPLICAS)
    killed = min(cluster.running())
    with Callers(cluster, users, world.now_ms, callers=4, pause_s=0.02) as callers:
        while callers.outcomes.attempts.total() < 50:
            time.sleep(0.05)
        os.kill(killed, signal.SIGKILL)
        back_s = cluster.wait_for(REPLICAS, without=killed)
        calls = callers.outcomes.attempts.total()
        while callers.outcomes.attempts.total() < calls + 50:
            time.sleep(0.05)
    attempts = callers.outcomes.attempts
    keep("ray_serve_kill", {"answered_by_attempts": dict(attempts), "capacity_back_s": round(back_s, 1)})
    assert callers.outcomes.failed == []
    assert back_s <= 30


def test_the_file_in_deploy_is_one_that_serve_reads_and_its_arguments_are_ours():
    from ray.serve.schema import ServeDeploySchema

    from serving.protos.reelrank.v1.feed_pb2_grpc import add_FeedServiceServicer_to_server
    from serving.ray_app import ReplicaConfig

    said = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = said.applications
    config = ReplicaConfig.read(application.args)
    assert (config.threads, config.scorer) == (1, "auto")
    (function,) = said.grpc_options.grpc_servicer_functions
    assert function == f"{add_FeedServiceServicer_to_server.__module__}.{add_FeedServiceServicer_to_server.__name__}"


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"store": "live.sqlite"}, ValueError, "one server's own; give redis://"),
        ({"registri": "x"}, ValueError, "registri"),
        ({"insecure_public": False}, SecurityError, "--insecure-public"),
        ({"scorer": "fast"}, ValueError, "fast"),
    ],
)
def test_arguments_that_cannot_serve_are_refused_before_anything_starts(changed, error, says):
    from serving.ray_app import app

    args = {"registry": "r", "store": "redis://127.0.0.1/0", "insecure_public": True} | changed
    with pytest.raises(error, match=says):
        app(args)


def test_the_manifest_for_kubernetes_holds_the_same_deployment():
    service, *_ = yaml.safe_load_all((CONFIG.parent / "kuberay.yaml").read_text())
    there, here = yaml.safe_load(service["spec"]["serveConfigV2"]), yaml.safe_load(CONFIG.read_text())
    for config in (there, here):
        config.pop("http_options")
        del config["applications"][0]["args"]
    assert there == here
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
