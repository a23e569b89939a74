"""How a search is timed and judged: one query at a time, recall against exact answers, sweeps read off at one recall.

Q queries, K results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setting of an engine: what it finds and what it costs, a query."""

    setting: dict[str, Any]
    recall: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """CPU time of the whole process, so a hidden second thread shows; hardly disturbed by other work."""


def one_at_a_time(
    search: Callable[[np.ndarray], np.ndarray], query_QD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Found numbers (Q, k) padded with -1, wall milliseconds (Q,), CPU milliseconds a query.

    `search` takes one query (1, D) and answers at most k numbers.
    """
    found_QK, wall_ms = np.full((len(query_QD), k), -1, np.int64), np.empty(len(query_QD))
    answers = []
    cpu = time.process_time()
    for number in range(len(query_QD)):
        start = time.perf_counter()
        answers.append(search(query_QD[number : number + 1]))
        wall_ms[number] = 1000 * (time.perf_counter() - start)
    cpu_ms = 1000 * (time.process_time() - cpu) / len(query_QD)
    for row_K, answer in zip(found_QK, answers, strict=True):
        numbers = np.asarray(answer).reshape(-1)[:k]
        row_K[: len(numbers)] = numbers
    return found_QK, wall_ms, cpu_ms


def recall(found_QM: np.ndarray, exact_QK: np.ndarray) -> float:
    """Mean share of a query's exact answers (-1 pads) found, over the queries that have any; NaN where none has."""
    shares = [
        np.isin(exact[exact >= 0], found).mean()
        for found, exact in zip(found_QM, exact_QK, strict=True)
        if (exact >= 0).any()
    ]
    return float(np.mean(shares)) if shares else float("nan")


def point(
    setting: dict[str, Any], found_QM: np.ndarray, exact_QK: np.ndarray, wall_ms: np.ndarray, cpu_ms: float
) -> Point:
    """A measured pass over the queries."""
    return Point(
        setting=setting,
        recall=recall(found_QM, exact_QK),
        p50_ms=float(np.median(wall_ms)),
        p99_ms=float(np.percentile(wall_ms, 99)),
        cpu_ms=cpu_ms,
    )


def middle(passes: Sequence[Point]) -> Point:
    """Several passes at one setting as one point of medians."""
    return Point(
        setting=passes[0].setting,
        recall=float(np.median([p.recall for p in passes])),
        p50_ms=float(np.median([p.p50_ms for p in passes])),
        p99_ms=float(np.median([p.p99_ms for p in passes])),
        cpu_ms=float(np.median([p.cpu_ms for p in passes])),
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both recall and CPU time, by recall ascending."""
    best: list[Point] = []
    for candidate in sorted(points, key=lambda p: (p.cpu_ms, -p.recall)):
        if not best or candidate.recall > best[-1].recall:
            best.append(candidate)
    return best


def around(points: Sequence[Point], target: float) -> tuple[Point, ...]:
    """The frontier's two points that enclose a recall: one where the cheapest is already above, none if unreached."""
    best = frontier(points)
    above = next((number for number, p in enumerate(best) if p.recall >= target), None)
    if above is None:
        return ()
    return tuple(best[max(above - 1, 0) : above + 1])


def at_recall(points: Sequence[Point], target: float) -> Point | None:
    """Cost at exactly this recall, linear between the frontier's neighbours; None where no setting reaches it.

    Where even the cheapest setting finds more, that setting stands as it is: its recall says so.
    """
    neighbours = around(points, target)
    if not neighbours:
        return None
    low, high = neighbours[0], neighbours[-1]
    weight = 1.0 if high.recall == low.recall else (target - low.recall) / (high.recall - low.recall)
    between = {
        name: getattr(low, name) + weight * (getattr(high, name) - getattr(low, name))
        for name in ("recall", "p50_ms", "p99_ms", "cpu_ms")
    }
    return Point(setting=high.setting, **between)
