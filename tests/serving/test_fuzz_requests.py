"""Whatever a caller sends, the answer is a page or a status that names the caller's mistake; the server lives on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from serving.client import FeedClient
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.server import FeedServer

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from servers import running

CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
}
KINDS = {
    "GetFeed": pb.GetFeedRequest,
    "Retrieve": pb.RetrieveRequest,
    "Rank": pb.RankRequest,
    "LogEvents": pb.LogEventsRequest,
    "UpsertVideos": pb.UpsertVideosRequest,
    "RemoveVideos": pb.RemoveVideosRequest,
}
INTEGERS = (0, 1, -1, 2, 7, 10, 100, 101, 2_000, 2_001, 2**31 - 1, -(2**31), 2**53 + 1, 2**63 - 1, -(2**63))
TEXTS = ("", "main", "search", "nowhere", "x" * 129, "a\nb", "\x00", "é" * 40, "DE", "pt-BR", "🎬", "../../etc/passwd")
FLOATS = (0.0, -0.0, 1.5, 3e38, float("nan"), float("inf"), float("-inf"))


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[FeedServer]:
    with running(world.registry, tmp_path_factory.mktemp("fuzz") / "s.sqlite") as server:
        yield server


class Fuzzer:
    """Random messages of the proto's own shape, and damaged bytes of them; the same for a seed."""

    def __init__(self, world, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._known = [*world.dataset.videos.ids[:50].tolist(), *world.dataset.users.ids[:20].tolist()]
        self._now_ms = world.now_ms

    def request(self) -> tuple[str, bytes]:
        name = str(self._rng.choice(list(KINDS)))
        message = KINDS[name]()
        self._fill(message, 0.6)
        raw = message.SerializeToString()
        return name, self._damage(raw) if self._rng.random() < 0.5 else raw

    def _fill(self, message, share: float) -> None:
        for field in message.DESCRIPTOR.fields:
            if self._rng.random() > share:
                continue
            if field.is_repeated and field.message_type and field.message_type.GetOptions().map_entry:
                getattr(message, field.name)[str(self._rng.choice(TEXTS))] = str(self._rng.choice(TEXTS))
            elif field.is_repeated:
                self._extend(getattr(message, field.name), field)
            elif field.message_type:
                self._fill(getattr(message, field.name), share)
            else:
                setattr(message, field.name, self._value(field))

    def _extend(self, values, field) -> None:
        for _ in range(int(self._rng.choice([0, 1, 3, 30, 1_001], p=[0.2, 0.4, 0.3, 0.08, 0.02]))):
            if field.message_type:
                self._fill(values.add(), 0.8)
            else:
                values.append(self._value(field))

    def _value(self, field):
        if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            return self._rng.choice(FLOATS)
        if field.cpp_type == field.CPPTYPE_BOOL:
            return bool(self._rng.random() < 0.5)
        if field.type == field.TYPE_BYTES:
            return self._rng.bytes(int(self._rng.choice([0, 1, 9, 17, 80, 4_000])))
        if field.cpp_type == field.CPPTYPE_STRING:
            plain = self._rng.random() < 0.7
            return ("main" if field.name == "surface" else "DE") if plain else str(self._rng.choice(TEXTS))
        if field.name.endswith("_ms") and self._rng.random() < 0.8:
            return self._now_ms
        if field.cpp_type == field.CPPTYPE_INT32 and self._rng.random() < 0.7:
            return int(self._rng.integers(1, 60))
        choice = int(self._rng.choice(self._known)) if self._rng.random() < 0.5 else INTEGERS[self._rng.integers(15)]
        return choice if field.cpp_type == field.CPPTYPE_INT64 else max(-(2**31), min(choice, 2**31 - 1))

    def _damage(self, raw: bytes) -> bytes:
        kind = self._rng.integers(4)
        if kind == 0:
            return self._rng.bytes(int(self._rng.integers(0, 200)))
        bad = bytearray(raw or b"\x08\x01")
        if kind == 1:
            for _ in range(int(self._rng.integers(1, 6))):
                bad[self._rng.integers(len(bad))] ^= 1 << int(self._rng.integers(8))
            return bytes(bad)
        if kind == 2:
            return bytes(bad[: self._rng.integers(len(bad))])
        at = int(self._rng.integers(len(bad)))
        return bytes(bad[:at] + self._rng.bytes(8) + bad[at:])


def fuzz(server: FeedServer, world, seed: int, number: int) -> Counter:
    fuzzer, codes = Fuzzer(world, seed), Counter()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        calls = {name: channel.unary_unary(f"/reelrank.v1.FeedService/{name}") for name in KINDS}
        for i in range(number):
            name, raw = fuzzer.request()
            call = calls[name].future(raw, timeout=20)
            code = call.code()
            assert code in CODES, (seed, i, name, code, call.details(), raw.hex()[:2_000])
            codes[code.name] += 1
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                assert ":" in call.details() or "the bytes sent are not a" in call.details()
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
        page = client.get_feed(int(world.dataset.users.ids[0]))
        assert (client.serving(), len(page.items)) == (True, 10)
    return codes


def test_two_thousand_random_requests(server, world):
    codes = fuzz(server, world, seed=1, number=2_000)
    assert codes["OK"] > 200
    assert codes["INVALID_ARGUMENT"] > 200


@pytest.mark.slow
def test_twenty_thousand_random_requests_and_flat_memory(server, world):
    fuzz(server, world, seed=2, number=2_000)
    before = psutil.Process().memory_info().rss
    codes = fuzz(server, world, seed=3, number=20_000)
    grown = psutil.Process().memory_info().rss / before - 1
    keep("fuzz", {"requests": 20_000, "codes": dict(codes), "memory_growth": round(grown, 4)})
    assert grown < 0.10
