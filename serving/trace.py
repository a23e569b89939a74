"""The course of one request: what each stage did, how long it took, and whether there is time for the next.

Every stage is reported the same way: candidates received, kept, removed by reason, milliseconds. Times are
monotonic; a stage that is not expected to end before the deadline is skipped, never awaited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.messages import Level, StageStats


class DeadlineExpiredError(Exception):
    """The caller had stopped waiting before any work began."""


class AnsweredElsewhereError(Exception):
    """The request was answered from lower down the ladder while this answer was computed."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of the monotonic clock by which one request is answered, once."""

    at_s: float = float("inf")
    arrived_s: float | None = None
    _unanswered: threading.Lock | None = None

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        now_s = time.monotonic()
        return cls(now_s + seconds, now_s, threading.Lock())

    def claim(self) -> None:
        """Say that the answer is ready; raises AnsweredElsewhereError for all but the first who says so."""
        if self._unanswered is not None and not self._unanswered.acquire(blocking=False):
            raise AnsweredElsewhereError

    @property
    def remaining_ms(self) -> float:
        return (self.at_s - time.monotonic()) * 1000.0


class StageCosts:
    """What each stage is expected to take: quick to rise, slow to fall, and falling while it is skipped.

    The last part matters: one slow call must not keep a stage skipped for ever.
    """

    RISE, FALL, SKIP = 0.5, 0.05, 0.95

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    def expected_ms(self, *names: str) -> float:
        """Sum over stages; a stage never seen is expected to be free, so that it gets its first measurement."""
        return sum(self._ms.get(name, 0.0) for name in names)

    def observe(self, name: str, ms: float) -> None:
        known = self._ms.get(name)
        if known is None:
            self._ms[name] = ms
        else:
            self._ms[name] = known + (self.RISE if ms > known else self.FALL) * (ms - known)

    def skipped(self, name: str) -> None:
        self._ms[name] = self._ms.get(name, 0.0) * self.SKIP


@dataclass(slots=True)
class Counts:
    """Filled in by a stage while it runs."""

    received: int = 0
    kept: int = 0
    removed: dict[str, int] = field(default_factory=dict)


class Trace:
    """One request's stages and its level."""

    def __init__(self, deadline: Deadline, costs: StageCosts) -> None:
        self.deadline = deadline
        self.costs = costs
        self.stages: list[StageStats] = []
        self.level = Level.FULL
        self.degraded_reason = ""
        self._began_s = time.monotonic() if deadline.arrived_s is None else deadline.arrived_s
        if deadline.remaining_ms <= 0:
            raise DeadlineExpiredError("the deadline had passed before any work began")

    @contextmanager
    def stage(self, name: str) -> Iterator[Counts]:
        """Time a stage; its counts are kept even when it fails."""
        counts, start_s = Counts(), time.monotonic()
        try:
            yield counts
        finally:
            ms, begin_ms = (time.monotonic() - start_s) * 1000.0, (start_s - self._began_s) * 1000.0
            self.costs.observe(name, ms)
            self.stages.append(StageStats(name, counts.received, counts.kept, counts.removed, ms, begin_ms))

    def affords(self, name: str, *then: str) -> bool:
        """Whether the stage, and those that must follow it, are expected to end in time."""
        if self.costs.expected_ms(name, *then) <= self.deadline.remaining_ms:
            return True
        self.costs.skipped(name)
        return False

    def degrade(self, level: Level, reason: str) -> None:
        """Go down the ladder; the deepest level and all reasons are kept."""
        self.level = max(self.level, level)
        self.degraded_reason = "; ".join(filter(None, (self.degraded_reason, reason)))
