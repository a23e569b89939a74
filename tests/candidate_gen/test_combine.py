"""Calls that meet are answered together, each with its own answer or error, and no caller is forgotten."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from candidate_gen.combine import Combiner

PATIENCE_S = 30.0
"""A caller that was forgotten fails its test after so long."""


@pytest.fixture(autouse=True)
def threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Gate:
    """Squares numbers once it is opened; keeps the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, numbers: list[int]) -> list[int]:
        self.batches.append(numbers)
        self.entered.release()
        assert self.opened.wait(PATIENCE_S)
        if any(number < 0 for number in numbers):
            raise ValueError(f"negative among {numbers}")
        return [number**2 for number in numbers]


def queued(pool: ThreadPoolExecutor, combiner: Combiner, *calls: tuple) -> list:
    """Futures of calls that are in the queue, in this order."""
    futures = []
    for call in calls:
        before = len(combiner._waiting)
        futures.append(pool.submit(combiner, *call))
        wait_until(lambda before=before: len(combiner._waiting) == before + 1)
    return futures


def wait_until(true: Callable[[], bool]) -> None:
    patience = threading.Event()
    for _ in range(int(PATIENCE_S / 0.001)):
        if true():
            return
        patience.wait(0.001)
    raise AssertionError("nobody queued")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def test_a_lone_call_runs_at_once_and_alone() -> None:
    gate = Gate()
    gate.opened.set()
    combiner = Combiner(gate, slots=1)
    assert [combiner("a", n) for n in (3, 4)] == [9, 16]
    assert gate.batches == [[3], [4]]


def test_what_waits_with_one_key_goes_together_oldest_first_and_bounded(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    combiner = Combiner(gate, slots=1, at_most=3)
    first = pool.submit(combiner, "a", 1)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    later = queued(pool, combiner, ("a", 2), ("b", 3), ("a", 4), ("b", 5), ("a", 6), ("a", 7))
    gate.opened.set()
    assert [future.result(PATIENCE_S) for future in (first, *later)] == [1, 4, 9, 16, 25, 36, 49]
    assert gate.batches == [[1], [2, 4, 6], [3, 5], [7]]


def test_an_error_reaches_its_own_caller_and_no_other(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    combiner = Combiner(gate, slots=1)
    first = pool.submit(combiner, "a", 1)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    good, bad, other = queued(pool, combiner, ("a", 2), ("a", -3), ("a", 4))
    gate.opened.set()
    assert [future.result(PATIENCE_S) for future in (first, good, other)] == [1, 4, 16]
    with pytest.raises(ValueError, match=r"negative among \[-3\]"):
        bad.result(PATIENCE_S)
    assert combiner("a", 5) == 25


def test_a_batch_function_that_forgets_an_answer_fails_the_call() -> None:
    combiner: Combiner[int, int] = Combiner(lambda _: [], slots=1)
    with pytest.raises(ValueError, match="shorter"):
        combiner("a", 1)


def test_a_call_that_cannot_wait_leaves_the_queue_and_takes_no_slot_with_it(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    combiner = Combiner(gate, slots=1)
    first = pool.submit(combiner, "a", 1)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        combiner("a", 2, timeout_s=0.01)
    (patient,) = queued(pool, combiner, ("a", 3))
    gate.opened.set()
    assert [first.result(PATIENCE_S), patient.result(PATIENCE_S), combiner("a", 4)] == [1, 9, 16]
    assert [2] not in gate.batches


def test_an_interrupted_leader_leaves_its_followers_to_others(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    interrupt = [True]

    def run(numbers: list[int]) -> list[int]:
        if len(numbers) > 1 and interrupt:
            interrupt.clear()
            raise KeyboardInterrupt
        return gate(numbers)

    combiner = Combiner(run, slots=1)
    first = pool.submit(combiner, "a", 1)
    assert gate.entered.acquire(timeout=PATIENCE_S)
    leader, follower, last = queued(pool, combiner, ("a", 2), ("a", 3), ("a", 4))
    gate.opened.set()
    with pytest.raises(KeyboardInterrupt):
        leader.result(PATIENCE_S)
    assert [future.result(PATIENCE_S) for future in (first, follower, last)] == [1, 9, 16]
    assert combiner("a", 5) == 25


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_many_threads_get_their_own_answers_whoever_fails_or_gives_up(slots: int, pool: ThreadPoolExecutor) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def run(numbers: list[int]) -> list[int]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            assert 1 <= len(numbers) <= 8
            assert len({number % 3 for number in numbers}) == 1, "keys were mixed"
            if any(number % 17 == 0 for number in numbers):
                raise ValueError(str(numbers))
            return [number**2 for number in numbers]
        finally:
            with lock:
                running[0] -= 1

    combiner = Combiner(run, slots=slots, at_most=8)

    def ask(number: int) -> bool:
        try:
            answer = combiner(number % 3, number, timeout_s=0.0005 if number % 5 == 0 else None)
        except ValueError as error:
            return str(error) == f"[{number}]" and number % 17 == 0
        except TimeoutError:
            return number % 5 == 0
        return answer == number**2

    futures = [pool.submit(ask, number) for number in range(4000)]
    assert all(future.result(PATIENCE_S) for future in futures)
    assert most[0] <= slots
    assert combiner._free == slots
