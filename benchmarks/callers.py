"""Many callers of one server at a time: how many answers a second, how late they come, and who pays for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np

R = TypeVar("R")


async def together(
    ask: Callable[[R], Awaitable[Any]], requests: Sequence[R], *, callers: int, server_cpu_s: Callable[[], float]
) -> dict[str, float]:
    """Every request once; each caller asks for the next when it has its answer. `server_cpu_s`: spent up to now."""
    waiting, took = iter(requests), []

    async def caller() -> None:
        for request in waiting:
            begin_s = time.perf_counter()
            await ask(request)
            took.append((time.perf_counter() - begin_s) * 1000.0)

    before_s, own_s, begin_s = server_cpu_s(), time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    wall_s = time.perf_counter() - begin_s
    return {
        "per_s": len(requests) / wall_s,
        "p50_ms": float(np.median(took)),
        "p99_ms": float(np.percentile(took, 99)),
        "server_cpu_ms": 1000.0 * (server_cpu_s() - before_s) / len(requests),
        "callers_cpu_ms": 1000.0 * (time.process_time() - own_s) / len(requests),
    }


def middle(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each figure's median over the rounds."""
    return {name: float(np.median([found[name] for found in rounds])) for name in rounds[-1]}
