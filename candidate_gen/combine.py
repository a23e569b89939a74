"""Calls of many threads that meet are answered together: one of them runs the batch, the others wait for their part.

For work that costs less a question in a batch than alone. There is no timer and no thread: a call that finds a free
slot runs at once and alone, so that nothing waits while there is nothing to wait for. While all slots are taken, calls
queue; whoever leaves a slot hands it to the oldest of them, which takes along all that wait with the same key. Batches
thus grow with the load by themselves (flat combining: Hendler, Incze, Shavit and Tzafrir, SPAA 2010).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class _Call(Generic[Q, A]):
    """One caller's question, and what became of it."""

    __slots__ = ("answer", "done", "error", "gone", "key", "leads", "question", "woken")

    def __init__(self, key: Hashable, question: Q) -> None:
        self.key, self.question = key, question
        self.answer: A
        self.error: Exception | None = None
        self.done = self.gone = self.leads = False
        """It is answered; its caller waits no longer; it was handed a slot and must use it or hand it on."""
        self.woken = threading.Lock()  # released once, when it leads or is done: half the price of an Event
        self.woken.acquire()


class Combiner(Generic[Q, A]):
    """Call it with a question from any number of threads."""

    def __init__(self, run: Callable[[list[Q]], Sequence[A]], *, slots: int | None = None, at_most: int = 32) -> None:
        """`run` answers questions of one key, in their order, and is called by `slots` threads at a time (None: as many
        as this process has cores), with `at_most` questions. It must not call this combiner."""
        self._run, self._at_most = run, at_most
        self._free = len(os.sched_getaffinity(0)) if slots is None else slots
        self._waiting: list[_Call[Q, A]] = []  # empty while a slot is free
        self._lock = threading.Lock()

    def __call__(self, key: Hashable, question: Q, timeout_s: float | None = None) -> A:
        """The answer, or what `run` raised for this very question: a batch that fails is asked again one by one.

        Raises TimeoutError when neither an answer nor a slot came in time; a running batch is not cut short.
        """
        call: _Call[Q, A] = _Call(key, question)
        with self._lock:
            call.leads = self._free > 0
            if call.leads:
                self._free -= 1
            else:
                self._waiting.append(call)
        if not call.leads:
            call.woken.acquire(timeout=-1 if timeout_s is None else timeout_s)
        if call.leads:
            self._lead(call)
        elif not call.done:
            self._give_up(call, timeout_s)
        if call.error is not None:
            raise call.error
        return call.answer

    def _lead(self, call: _Call[Q, A]) -> None:
        """Use the slot for this call and for what waits with its key, then hand it on."""
        batch = [call]
        try:
            with self._lock:
                self._take(batch)
            self._answer(batch)
        finally:
            with self._lock:  # `run` was interrupted where a call is not done: others go on, as if it had never begun
                self._waiting[:0] = [one for one in batch[1:] if not (one.done or one.gone)]
                self._hand_on()
            for one in batch[1:]:
                if one.done:
                    one.woken.release()

    def _take(self, batch: list[_Call[Q, A]]) -> None:
        rest: list[_Call[Q, A]] = []
        for one in self._waiting:
            (batch if one.key == batch[0].key and len(batch) < self._at_most else rest).append(one)
        self._waiting = rest

    def _answer(self, batch: list[_Call[Q, A]]) -> None:
        try:
            pairs = list(zip(batch, self._run([one.question for one in batch]), strict=True))
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
            else:
                batch[0].error, batch[0].done = error, True
            return
        for one, answer in pairs:
            one.answer, one.done = answer, True

    def _hand_on(self) -> None:
        """The slot to the oldest that waits; the lock is held."""
        if not self._waiting:
            self._free += 1
            return
        oldest = self._waiting.pop(0)
        oldest.leads = True
        oldest.woken.release()

    def _give_up(self, call: _Call[Q, A], timeout_s: float | None) -> None:
        """Out of the queue; a slot or an answer may have come this instant."""
        with self._lock:
            call.gone = True
            if call in self._waiting:
                self._waiting.remove(call)
            if call.leads:
                self._hand_on()
        if not call.done:
            raise TimeoutError(f"no answer within {timeout_s} s: more calls than these slots can answer in time")
