"""Load for the long tests: as many callers as answers, or so many calls a second whatever comes back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import numpy as np

from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc


@dataclass
class Outcomes:
    """What came back, call by call."""

    codes: list[str] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    levels: Counter = field(default_factory=Counter)
    items: Counter = field(default_factory=Counter)
    versions: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def of(self, code: str) -> np.ndarray:
        """Milliseconds of the calls with a status."""
        return np.array([ms for ms, found in zip(self.ms, self.codes, strict=True) if found == code])

    @property
    def per_s(self) -> float:
        return self.codes.count("OK") / self.seconds


class Load:
    """Calls of one server for users in turn."""

    def __init__(self, address: str, users: list[int], now_ms: int, deadline_s: float) -> None:
        self._address, self._users, self._now_ms, self._deadline_s = address, users, now_ms, deadline_s

    def closed(self, callers: int, seconds: float) -> Outcomes:
        """Each caller asks again once it is answered."""
        return asyncio.run(self._run(self._closed, callers, seconds))

    def open(self, per_s: float, seconds: float) -> Outcomes:
        """Evenly spaced, whatever comes back."""
        return asyncio.run(self._run(self._open, per_s, seconds))

    async def _run(self, kind, amount, seconds: float) -> Outcomes:
        outcomes = Outcomes()
        async with grpc.aio.insecure_channel(self._address) as channel:
            stub = feed_pb2_grpc.FeedServiceStub(channel)
            await channel.channel_ready()
            begin_s = time.monotonic()
            await kind(stub, amount, seconds, outcomes)
            outcomes.seconds = time.monotonic() - begin_s
        return outcomes

    async def _closed(self, stub, callers: int, seconds: float, outcomes: Outcomes) -> None:
        until_s = time.monotonic() + seconds

        async def caller() -> None:
            while time.monotonic() < until_s:
                await self._ask(stub, outcomes)

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def _open(self, stub, per_s: float, seconds: float, outcomes: Outcomes) -> None:
        begin_s, calls = time.monotonic(), []
        for number in range(round(per_s * seconds)):
            await asyncio.sleep(max(0.0, begin_s + number / per_s - time.monotonic()))
            calls.append(asyncio.create_task(self._ask(stub, outcomes)))
        await asyncio.gather(*calls)

    async def _ask(self, stub, outcomes: Outcomes) -> None:
        user = self._users[len(outcomes.codes) % len(self._users)]
        request = pb.GetFeedRequest(user_id=user, k=10, now_ms=self._now_ms)
        start_s = time.monotonic()
        try:
            page = await stub.GetFeed(request, timeout=self._deadline_s)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        else:
            code = "OK"
            outcomes.levels[pb.Level.Name(page.level)] += 1
            outcomes.items[len(page.items)] += 1
            outcomes.versions[page.bundle_version, page.policy_id] += 1
        outcomes.codes.append(code)
        outcomes.ms.append((time.monotonic() - start_s) * 1000.0)


def quantile(ms: np.ndarray, share: float) -> float:
    return round(float(np.quantile(ms, share)), 1) if len(ms) else float("nan")
