"""A real redis-server of a test's own, and a wire in front of it that can be slow or dead."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

REDIS_SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(REDIS_SERVER is None, reason="no redis-server on this machine: apt-get install it")


class RedisServer:
    """Append-only with a sync for every write, as a store of events has to be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no"]
        log = (self.folder / "log").open("a")
        self.process = subprocess.Popen([str(REDIS_SERVER), *options], stdout=log, stderr=log)
        with redis.Redis.from_url(self.url) as client:
            while True:  # ended by the test's time limit
                with suppress(redis.ConnectionError):  # BusyLoadingError is one
                    client.ping()
                    return
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def hang(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.kill()


class Wire:
    """Forwards connections to a port; `delay_s` before each answer, and a count of what was asked."""

    def __init__(self, to_port: int) -> None:
        self.delay_s = 0.0
        self.asked = 0
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to_port))
                for ends, back in (((near, far), False), ((far, near), True)):
                    threading.Thread(target=self._pump, args=(*ends, back), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        with suppress(OSError), source, sink:
            while chunk := source.recv(1 << 20):
                if back:
                    time.sleep(self.delay_s)
                else:
                    self.asked += 1
                sink.sendall(chunk)
