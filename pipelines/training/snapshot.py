"""A copy of one worker's training state in ordinary memory, so that it can be written while training goes on.

torch's own stager (`torch.distributed.checkpoint.async_save`) does not copy ShardedTensor, which is what TorchRec's
tables are. Buffers are kept from one copy to the next: fresh pages cost as much as the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard

Tensors = Mapping[str, torch.Tensor]


class Snapshot:
    """Takes copies into the same buffers each time: a copy ends where the next begins."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The same names and shards, on the CPU."""
        return {name: self._copy_of(name, tensor) for name, tensor in tensors.items()}

    def _copy_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, ShardedTensor):
            return self._into_buffer((name, 0), tensor.detach())
        whole = tensor.metadata()
        shards = [
            Shard(self._into_buffer((name, n), shard.tensor.detach()), _on_cpu(shard.metadata))
            for n, shard in enumerate(tensor.local_shards())
        ]
        metadata = ShardedTensorMetadata(
            [_on_cpu(shard) for shard in whole.shards_metadata], whole.size, whole.tensor_properties
        )
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)

    def _into_buffer(self, key: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._buffers[key].copy_(tensor)


def held(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """What this worker holds of each tensor."""
    for name, tensor in tensors.items():
        if isinstance(tensor, ShardedTensor):
            for shard in tensor.local_shards():
                yield name, shard.tensor
        else:
            yield name, tensor


def held_bytes(tensors: Tensors) -> int:
    """Bytes that this worker holds."""
    return sum(tensor.nbytes for _, tensor in held(tensors))


def _on_cpu(shard: ShardMetadata) -> ShardMetadata:
    rank = shard.placement.rank() if shard.placement is not None else 0
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{rank}/cpu")
