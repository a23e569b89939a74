"""More calls than a server can answer: it answers what it can in time, and tells the others at once."""

from __future__ import annotations

import heapq
import sys
from pathlib import Path

import numpy as np
import pytest

from serving import admission, trace
from serving.admission import Admission, OverloadError
from serving.trace import Deadline

sys.path.insert(0, str(Path(__file__).parent))
from figures import keep
from load import Load, quantile
from servers import subprocess_server


class Clock:
    """Stands in for the module `time`: it moves when the simulation says so."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    monkeypatch.setattr(trace, "time", clock)
    return clock


def simulate(
    clock: Clock,
    gate: Admission,
    *,
    per_s: float,
    service_s: float,
    deadline_s: float,
    seconds: float,
    threads: int = 2,
) -> tuple[int, int, int]:
    """Two threads, evenly spaced arrivals, services of +-50%, first come first served: (in time, late, refused)."""
    rng, free_s = np.random.default_rng(1), [clock.now_s] * 2
    departures: list[tuple[float, float]] = []
    in_time = late = refused = 0
    begin_s = clock.now_s
    for number in range(round(per_s * seconds)):
        arrival_s = begin_s + number / per_s
        while departures and departures[0][0] <= arrival_s:
            clock.now_s = heapq.heappop(departures)[0]
            gate.leave(computed=True)
        clock.now_s = arrival_s
        try:
            gate.enter(Deadline.after(deadline_s))
        except OverloadError:
            refused += 1
            continue
        start_s = max(arrival_s, heapq.heappop(free_s))
        end_s = start_s + service_s * rng.uniform(0.5, 1.5)
        heapq.heappush(free_s, end_s)
        heapq.heappush(departures, (end_s, arrival_s))
        in_time, late = (in_time + 1, late) if end_s - arrival_s <= deadline_s else (in_time, late + 1)
    return in_time, late, refused


@pytest.mark.parametrize("times", [1.5, 3.0, 10.0])
@pytest.mark.parametrize(("service_s", "deadline_s"), [(0.01, 0.1), (0.01, 1.0), (0.2, 1.0)])
def test_whatever_the_overload_what_is_begun_ends_in_time_and_the_server_stays_busy(
    clock, times, service_s, deadline_s
):
    capacity = 2 / service_s
    gate = Admission(at_once=2, most_in_flight=10_000)
    in_time, late, refused = simulate(
        clock, gate, per_s=times * capacity, service_s=service_s, deadline_s=deadline_s, seconds=60
    )
    assert late <= 0.01 * (in_time + late)
    assert in_time >= 0.95 * capacity * 60
    assert refused > 0


def test_below_capacity_nobody_is_refused_and_after_an_overload_neither(clock):
    gate = Admission(at_once=2, most_in_flight=64)
    quiet = {"service_s": 0.01, "deadline_s": 0.2, "seconds": 20}
    assert simulate(clock, gate, per_s=120, **quiet)[2] == 0
    gate = Admission(at_once=2, most_in_flight=64)
    assert simulate(clock, gate, per_s=600, **quiet)[2] > 0
    while gate.in_flight:
        clock.now_s += 0.005
        gate.leave(computed=True)
    assert simulate(clock, gate, per_s=120, **quiet)[2] == 0


def test_a_hiccup_does_not_shut_the_door_for_long(clock):
    gate = Admission(at_once=2, most_in_flight=64)
    simulate(clock, gate, per_s=100, service_s=0.01, deadline_s=0.2, seconds=5)
    while gate.in_flight:
        gate.leave(computed=True)
    for _ in range(2):
        gate.enter(Deadline.after(60))
    clock.now_s += 30  # a pause of the whole machine
    for _ in range(2):
        gate.leave(computed=True)
    refused = simulate(clock, gate, per_s=100, service_s=0.01, deadline_s=0.2, seconds=5)[2]
    assert refused < 50, "half a second's worth at the most"


def test_a_server_that_nothing_leaves_is_stalled_until_something_does(clock):
    gate = Admission(at_once=2, most_in_flight=64)
    gate.enter(Deadline.after(10))
    clock.now_s += 5
    assert not gate.stalled, "one thread is free"
    gate.enter(Deadline.after(10))
    assert gate.stalled
    gate.leave(computed=True)
    assert not gate.stalled


@pytest.mark.slow
def test_three_times_the_capacity_for_a_minute(world, tmp_path):
    """The callers share the machine with the server, before the overload, in it and after it."""
    users, deadline_s = world.dataset.users.ids.tolist(), 0.5
    with subprocess_server(world.registry, tmp_path / "s.sqlite") as (_, address):
        load = Load(address, users, world.now_ms, deadline_s)
        load.closed(callers=4, seconds=3)
        alone = load.closed(callers=1, seconds=5)
        capacity = load.closed(callers=8, seconds=10)
        over = load.open(per_s=3 * capacity.per_s, seconds=60)
        after = load.open(per_s=0.3 * capacity.per_s, seconds=5)
        normal = load.closed(callers=1, seconds=5)
    refused_ms, accepted_ms = over.of("RESOURCE_EXHAUSTED"), over.of("OK")
    figures = {
        "deadline_ms": 1000 * deadline_s,
        "capacity_per_s": round(capacity.per_s, 1),
        "offered_per_s": round(3 * capacity.per_s, 1),
        "goodput_per_s": round(over.per_s, 1),
        "goodput_share_of_capacity": round(over.per_s / capacity.per_s, 3),
        "levels": dict(over.levels),
        "accepted_p50_ms": quantile(accepted_ms, 0.5),
        "accepted_p99_ms": quantile(accepted_ms, 0.99),
        "refused_p50_ms": quantile(refused_ms, 0.5),
        "refused_p99_ms": quantile(refused_ms, 0.99),
        "codes": {code: over.codes.count(code) for code in sorted(set(over.codes))},
        "refused_in_the_5_s_after": len(after.codes) - after.codes.count("OK"),
        "p50_alone_before_ms": quantile(alone.of("OK"), 0.5),
        "p50_alone_after_ms": quantile(normal.of("OK"), 0.5),
    }
    keep("overload", figures)
    assert set(over.items) == {10}
    assert set(over.codes) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert over.codes.count("DEADLINE_EXCEEDED") <= 0.01 * len(accepted_ms)
    assert over.per_s >= 0.9 * capacity.per_s
    assert figures["refused_in_the_5_s_after"] == 0
