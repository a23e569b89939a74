"""Which units a worker trains on at each step, and their collation ahead of time in a background thread.

Everything is a function of (seed, epoch, step, rank), so a resumed run sees what the uninterrupted one saw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Made = TypeVar("Made")

VALIDATION = 2**31
"""In the place of the epoch: validation draws (negatives, say) are the same after every epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One worker's share of one step."""

    number: int
    units: np.ndarray
    units_of_all: int
    """Units that all workers take in this step."""
    share: float = 1.0
    """Of the units of a full step: what this step's mean loss counts, so that a unit weighs the same in every step."""
    seed: int
    """This worker's own, for what it draws while collating."""
    seed_of_all: int
    """The same for all workers, for what the model draws by row."""


def derived_seed(*key: int) -> int:
    """A 63-bit seed for this key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def training_steps(
    units: np.ndarray, *, seed: int, epoch: int, batch_size: int, rank: int, world: int, units_done: int = 0
) -> list[Step]:
    """Shuffled steps of this epoch from `units_done` on. All workers take equally many units in a step, fewer in the
    last one; of all units fewer than `world` are left out, others each epoch."""
    order = np.random.default_rng(derived_seed(seed, epoch)).permutation(units)
    per_worker = min(batch_size, len(units) // world)
    if per_worker == 0:
        raise ValueError(f"{len(units)} training units are too few for {world} workers: give the task more data")
    together, steps = per_worker * world, []
    for start in range(units_done, len(order), together):
        taken = min(per_worker, (len(order) - start) // world)
        if taken:
            number = start // together
            steps.append(
                Step(
                    number=number,
                    units=order[start + rank * taken : start + (rank + 1) * taken],
                    units_of_all=taken * world,
                    share=taken / per_worker,
                    seed=derived_seed(seed, epoch, number, rank),
                    seed_of_all=derived_seed(seed, epoch, number),
                )
            )
    return steps


def validation_steps(units: np.ndarray, *, seed: int, batch_size: int, rank: int, world: int) -> list[Step]:
    """All units in order, the last step smaller; fewer than `world` units may be left out at the very end."""
    steps = []
    for start in range(0, len(units), batch_size * world):
        chunk = units[start : start + batch_size * world]
        share = len(chunk) // world
        if share:
            steps.append(
                Step(
                    number=len(steps),
                    units=chunk[rank * share : (rank + 1) * share],
                    units_of_all=share * world,
                    seed=derived_seed(seed, VALIDATION, len(steps), rank),
                    seed_of_all=derived_seed(seed, VALIDATION, len(steps)),
                )
            )
    return steps


def ahead(make: Callable[[Item], Made], items: Iterable[Item], *, depth: int) -> Iterator[tuple[Item, Made]]:
    """(item, make(item)) in order, up to `depth` of them made ahead in one background thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="collate")
    pending: deque[tuple[Item, Future[Made]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(make, item)))
            if len(pending) > depth:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
