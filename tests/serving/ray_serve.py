"""A Ray Serve of a test's own: `serve run` on the file in deploy/, with a small registry and few replicas."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml

from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "serve.yaml"
TOKEN = "a-long-enough-secret"  # noqa: S105
"""Of Ray's own interface and, for brevity, of the feed."""
AUTHORIZED = (("authorization", f"Bearer {TOKEN}"),)
RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
"""How a call ends whose replica is gone: Serve says INTERNAL of one that died with it."""
COMMAND = "from ray.serve.scripts import cli; cli()"


@dataclass
class Deployed:
    """One that answers."""

    process: subprocess.Popen
    log: Path
    port: int

    def stub(self, channel: grpc.Channel) -> feed_pb2_grpc.FeedServiceStub:
        return feed_pb2_grpc.FeedServiceStub(channel)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def running(self) -> set[int]:
        """Process ids of the replicas that take calls, as Serve's own interface says."""
        found = re.search(r"dashboard at.*?(127\.0\.0\.1:\d+)", self.log.read_text())
        assert found is not None, self.log.read_text()[-3000:]
        url = f"http://{found.group(1)}/api/serve/applications/"
        request = urllib.request.Request(url, headers=dict(AUTHORIZED))
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            said = json.load(answer)
        replicas = said["applications"]["reelrank"]["deployments"]["FeedReplica"]["replicas"]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def wait_for(self, replicas: int, without: int = 0) -> float:
        """Seconds until so many take calls; ended by the test's time limit."""
        began_s = time.monotonic()
        while True:
            with suppress(KeyError):  # not deployed yet
                running = self.running()
                if len(running) >= replicas and without not in running:
                    return time.monotonic() - began_s
            time.sleep(0.25)


def config(registry: Path, store: str, tokens: Path, port: int, http_port: int, replicas: int) -> dict[str, Any]:
    """The file's, with what a test changes."""
    said = yaml.safe_load(CONFIG.read_text())
    said["grpc_options"]["port"], said["http_options"]["port"] = port, http_port
    (application,) = said["applications"]
    application["args"] |= {
        "registry": str(registry),
        "store": store,
        "tokens": str(tokens),
        "scorer": "plain",
        "default_deadline_ms": 20_000,
        "poll_s": 0.2,
    }
    (deployment,) = application["deployments"]
    deployment["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    return said


@contextmanager
def deployed(folder: Path, registry: Path, store: str, replicas: int) -> Iterator[Deployed]:
    """`serve run` in a process of its own; everything it started is ended."""
    tokens, path, log = folder / "tokens", folder / "serve.yaml", folder / "log"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    port, http_port = _free_port(), _free_port()
    path.write_text(yaml.safe_dump(config(registry, store, tokens, port, http_port, replicas)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-c", COMMAND, "run", "--address", "local", str(path)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder)
    started = Deployed(process, log, port)
    try:
        while process.poll() is None:
            with started.channel() as channel, suppress(grpc.RpcError):
                request = pb.GetFeedRequest(user_id=1, k=1)
                started.stub(channel).GetFeed(request, timeout=5, metadata=AUTHORIZED)
                break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        started.wait_for(replicas)
        yield started
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
