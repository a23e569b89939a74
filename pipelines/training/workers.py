"""The workers of a training run: the processes of torch.distributed's default group, and what they agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """The default group, or one of this process alone (in memory: no port, no file)."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mean_of_workers(scalar: torch.Tensor) -> float:
    """Of one number a worker, in float64."""
    value = scalar.detach().to(torch.float64).reshape(1)
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def largest_of_workers(count: int, device: torch.device) -> int:
    """Of one count a worker."""
    if dist.get_world_size() == 1:
        return count
    largest = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def told_by_workers(what: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every worker's object, by rank."""
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, what, group=group)
    return shares
