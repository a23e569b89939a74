"""Real servers for tests: one on an event loop of this process, one in a process of its own that may be killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from serving.server import FeedServer
from serving.server_config import ServerConfig

CONFIG = ServerConfig(port=0, poll_s=3600, drain_notice_s=0, drain_grace_s=2, longest_deadline_ms=30_000)


@contextmanager
def running(registry: Path, store: Path, config: ServerConfig = CONFIG) -> Iterator[FeedServer]:
    """A server on its own event loop in a thread; drained at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(step):
        return asyncio.run_coroutine_threadsafe(step, loop).result(timeout=60)

    async def build() -> FeedServer:
        server = FeedServer(registry, store, config)
        await server.start()
        return server

    server = run(build())
    try:
        yield server
    finally:
        run(server.drain())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


PROGRAM = """
import sys
from pathlib import Path
from serving.server import serve
from serving.server_config import ServerConfig
config = ServerConfig(port=0, drain_notice_s=0)
serve(Path(sys.argv[1]), Path(sys.argv[2]), config, lambda *ready: print(*ready, flush=True))
"""


@contextmanager
def subprocess_server(registry: Path, store: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-c", PROGRAM, str(registry), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address, version = process.stdout.readline().split()
            assert version == "v1"
            yield process, address
        finally:
            process.kill()


def refused(call, *args, **kwargs) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    return caught.value.code(), caught.value.details()
