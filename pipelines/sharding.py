"""From a plain module to TorchRec's DistributedModelParallel: who holds which table, and the optimizers.

The same recipe must mean the same training on any number of workers, which decides the kinds of sharding allowed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

ALLOWED_SHARDING = {
    "cpu": [ShardingType.TABLE_WISE.value],
    "cuda": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value],
}
"""Kinds that keep a row whole. Column-wise would give each part of a row its own Adagrad accumulator and
data-parallel tables would leave the fused optimizer, so both would change what is learnt with the number of workers.
Row-wise sharding needs CUDA in TorchRec 1.8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """One embedding table's place."""

    table: str
    sharding: str
    ranks: tuple[int, ...]
    rows: int
    dim: int
    mib: float


def shard(
    module: nn.Module, *, lr_sparse: float, batch_size: int, device: torch.device
) -> tuple[DistributedModelParallel, tuple[TablePlan, ...]]:
    """Attach row-wise Adagrad to the tables, let the planner place them, wrap; called by all workers together."""
    for noisy in ("torchrec", "torch.fx._symbolic_trace"):  # the plan is shown as `plan_table` instead
        logging.getLogger(noisy).setLevel(logging.ERROR)
    collections = {name: m for name, m in module.named_modules() if isinstance(m, EmbeddingBagCollection)}
    tables = {config.name: config for m in collections.values() for config in m.embedding_bag_configs()}
    for collection in collections.values():
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": lr_sparse, "eps": 1e-8})
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("sharding needs a process group: call torch.distributed.init_process_group first")
    world = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
            compute_device=device.type,
        ),
        batch_size=batch_size,
        constraints={name: ParameterConstraints(sharding_types=ALLOWED_SHARDING[device.type]) for name in tables},
    )
    sharders = [cast("ModuleSharder[nn.Module]", EmbeddingBagCollectionSharder())]
    plan = planner.collective_plan(module, sharders, group)
    whole = module.state_dict()
    model = DistributedModelParallel(
        module, env=ShardingEnv.from_process_group(group), device=device, plan=plan, sharders=sharders
    )
    _copy_in(model, whole)
    return model, _placement(plan, collections)


@torch.no_grad()
def _copy_in(model: DistributedModelParallel, whole: dict[str, torch.Tensor]) -> None:
    """Sharded tables begin with the module's own values; TorchRec draws new ones, another set on each worker."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, ShardedTensor):
            for part in tensor.local_shards():
                spans = zip(part.metadata.shard_offsets, part.metadata.shard_sizes, strict=True)
                part.tensor.copy_(whole[name][tuple(slice(start, start + size) for start, size in spans)])


def dense_parameters(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Parameters outside the sharded tables, under their unsharded names."""
    return dict(in_backward_optimizer_filter(model.named_parameters()))


def plan_table(plan: tuple[TablePlan, ...]) -> str:
    """The plan for reading, one table a line."""
    head = ("table", "sharding", "ranks", "rows", "dim", "MiB")
    lines = [head] + [
        (t.table, t.sharding, ",".join(map(str, t.ranks)), f"{t.rows:,}", str(t.dim), f"{t.mib:.1f}") for t in plan
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _placement(plan: ShardingPlan, collections: dict[str, EmbeddingBagCollection]) -> tuple[TablePlan, ...]:
    placed = []
    for path, collection in collections.items():
        by_name = cast("dict", plan.get_plan_for_module(path))
        for config in collection.embedding_bag_configs():
            where = by_name[config.name]
            size = config.num_embeddings * config.embedding_dim * 4
            placed.append(
                TablePlan(
                    table=f"{path}.{config.name}",
                    sharding=where.sharding_type,
                    ranks=tuple(where.ranks or ()),
                    rows=config.num_embeddings,
                    dim=config.embedding_dim,
                    mib=size / 2**20,
                )
            )
    return tuple(placed)
