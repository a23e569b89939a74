"""Which calls to begin: what could not be answered in time is refused at the door, where that costs microseconds.

The server's own departures say how long its queue is: while it is busy, one call leaves every so many milliseconds,
whatever calls cost, however many threads compute and whoever shares the cores. A newcomer waits for all before it.
Used from the event loop alone; the clock is the monotonic one.
"""

from __future__ import annotations

import time

from serving.trace import Deadline


class OverloadError(Exception):
    """The server has more to do than it can; the same call may be sent again later, to another replica at once."""


class Admission:
    """Calls in flight and what the next one may expect."""

    SHARE = 0.6
    """A call is begun when it is expected to end within this share of its time: the rest is for what varies."""
    SMOOTHING = 0.1
    """Weight of the newest interval between departures."""
    UNMEASURED = 4
    """Times `at_once` that may be in flight before anything has left: nothing is known of the pace yet."""
    STALL_S = 0.25
    """A busy server that nothing leaves for this long, and for 20 of its usual intervals, hangs in a dependency."""

    def __init__(self, at_once: int, most_in_flight: int) -> None:
        """`at_once` calls are computed beside each other: as many are begun whatever is expected."""
        self._at_once, self._most = at_once, most_in_flight
        self._interval_s = 0.0
        self._since_s = time.monotonic()
        """Of the last departure, or of the arrival that ended the last idle time."""
        self.in_flight = 0

    def enter(self, deadline: Deadline) -> None:
        """Count a call in; raises OverloadError for one that would end too late."""
        if self.in_flight >= self._most:
            raise OverloadError(f"{self._most} calls are in flight")
        if self._interval_s == 0.0 and self.in_flight >= self.UNMEASURED * self._at_once:
            raise OverloadError("the server has just begun")
        expected_ms = (self.in_flight + 1) * self._interval_s * 1000.0
        if self.in_flight >= self._at_once and expected_ms > self.SHARE * deadline.remaining_ms:
            raise OverloadError(
                f"an answer would take some {expected_ms:.0f} ms, the caller waits {deadline.remaining_ms:.0f} ms"
            )
        if self.in_flight == 0:
            self._since_s = time.monotonic()
        self.in_flight += 1

    def leave(self, computed: bool) -> None:
        """Count a call out, once nothing is computed for it any more; what cost nothing says nothing of the queue."""
        now_s = time.monotonic()
        interval_s, self._since_s = now_s - self._since_s, now_s
        if computed:
            known_s = self._interval_s or interval_s
            self._interval_s = known_s + self.SMOOTHING * (interval_s - known_s)
        self.in_flight -= 1

    @property
    def stalled(self) -> bool:
        """Every thread is taken and none has come back for long: new calls must not wait for them."""
        if self.in_flight < self._at_once:
            return False
        return time.monotonic() - self._since_s > max(self.STALL_S, 20 * self._interval_s)
