"""Training that gives the same bits whenever the same machine runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_deterministic: Any = torch.utils.deterministic


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums in a fixed order inside the block. By default torch's threads add the gradients of rows that were gathered
    several times (`x[rows]` backward) in the order in which they arrive, and two runs differ in the last bits."""
    before = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _deterministic.fill_uninitialized_memory = False  # costs a pass over memory that is written anyway
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _deterministic.fill_uninitialized_memory = before[1]
