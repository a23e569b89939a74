"""From a plain module to TorchRec's DistributedModelParallel: who holds which table, and the optimizers.

The same recipe must mean the same training on any number of workers, which decides the kinds of sharding allowed.
Tables may come on the meta device; then each worker draws the rows it holds, and no process ever holds them all.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import data_type_to_dtype
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from pipelines.training.batches import derived_seed
from pipelines.training.row_parts import RowRange, split_tables

ALLOWED_SHARDING = {
    "cpu": [ShardingType.TABLE_WISE.value],
    "cuda": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value],
}
"""Kinds that keep a row whole. Column-wise would give each part of a row its own Adagrad accumulator and
data-parallel tables would leave the fused optimizer, so both would change what is learnt with the number of workers.
Row-wise sharding needs CUDA in TorchRec 1.8; on a CPU `pipelines.training.row_parts` does it with table-wise parts."""

SPREAD_ABOVE = 1 / 16
"""Share of a GPU's memory above which a table must lie on all of them, row by row. Left to itself the planner puts a
table where it fits: of a billion rows on eight GPUs it filled one to 61 of 80 GiB and left five empty, which leaves no
room for growth, and one GPU answers every lookup of the largest table."""
MEMORY_FOR_TABLES = 0.75
"""Share of a worker's memory that the planner may fill: the rest is the dense part, activations and input."""
DRAWN_ROWS = 1 << 16
"""Rows that are drawn from one seed: a row's first value depends on its table and number, not on who holds it."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one step asks of a feature's table, a worker."""

    bags: int
    ids_a_bag: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TablePlan:
    """One embedding table's place."""

    table: str
    sharding: str
    ranks: tuple[int, ...]
    rows: int
    dim: int
    mib: float
    """Weights and row-wise accumulators together, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharded:
    """A model over all workers."""

    model: DistributedModelParallel
    plan: tuple[TablePlan, ...]
    rows: Mapping[str, RowRange]
    """For each table, under the name it has in the model's state: where its rows lie in the unsharded module."""


def shard(
    module: nn.Module,
    *,
    lr_sparse: float,
    batch_size: int,
    traffic: Mapping[str, Traffic],
    device: torch.device,
    seed: int,
    rows_a_part: int | None = None,
) -> Sharded:
    """Attach row-wise Adagrad to the tables, let the planner place them, wrap; called by all workers together.
    `traffic` by feature, as one batch shows it; `rows_a_part`: tables of more rows are split into such parts."""
    for noisy in ("torchrec", "torch.fx._symbolic_trace"):  # the plan is shown as `plan_table` instead
        logging.getLogger(noisy).setLevel(logging.ERROR)
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("sharding needs a process group: call torch.distributed.init_process_group first")
    world = dist.get_world_size()
    whole = module.state_dict()
    rows = split_tables(module, rows_a_part)
    collections = _collections(module)
    for collection in collections.values():
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": lr_sparse, "eps": 1e-8})
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    topology = Topology(
        world_size=world,
        local_world_size=local,
        compute_device=device.type,
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        ddr_cap=int(MEMORY_FOR_TABLES * psutil.virtual_memory().total / local),
    )
    planner = table_planner(module, topology, batch_size=batch_size, traffic=traffic)
    plan = planner.collective_plan(module, _sharders(), group)
    placed, ranges = placement(plan, module), _ranges(collections)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan,
        sharders=_sharders(),
        init_data_parallel=False,  # the trainer adds up the dense gradients itself, in one piece
    )
    _fill(model, whole, rows, ranges, seed)
    return Sharded(model=model, plan=placed, rows=rows)


def table_planner(
    module: nn.Module, topology: Topology, *, batch_size: int, traffic: Mapping[str, Traffic]
) -> EmbeddingShardingPlanner:
    """TorchRec's planner with our figures: memory, bags a step and ids a bag of each table."""
    constraints = {}
    for collection in _collections(module).values():
        for table in collection.embedding_bag_configs():
            asked = [traffic.get(_unsplit(feature), Traffic(batch_size, 1.0)) for feature in table.feature_names]
            kinds = ALLOWED_SHARDING[topology.compute_device]
            if len(topology.devices) > 1 and _bytes(table) > SPREAD_ABOVE * topology.devices[0].storage.hbm > 0:
                kinds = [ShardingType.ROW_WISE.value]
            constraints[table.name] = ParameterConstraints(
                sharding_types=kinds,
                pooling_factors=[max(t.ids_a_bag, 1.0) for t in asked],
                batch_sizes=[t.bags for t in asked],
            )
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(1 - MEMORY_FOR_TABLES),
    )


def plan_alone(planner: EmbeddingShardingPlanner, module: nn.Module) -> ShardingPlan:
    """The plan as one process alone makes it, for a topology that need not be here."""
    return planner.plan(module, _sharders())


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


def placement(plan: ShardingPlan, module: nn.Module) -> tuple[TablePlan, ...]:
    """Where the plan puts each table of the module."""
    placed = []
    for path, collection in _collections(module).items():
        by_name = cast("dict", plan.get_plan_for_module(path))
        for config in collection.embedding_bag_configs():
            where = by_name[config.name]
            placed.append(
                TablePlan(
                    table=f"{path}.{config.name}",
                    sharding=where.sharding_type,
                    ranks=tuple(where.ranks or ()),
                    rows=config.num_embeddings,
                    dim=config.embedding_dim,
                    mib=_bytes(config) / 2**20,
                )
            )
    return tuple(placed)


@torch.no_grad()
def _fill(
    model: DistributedModelParallel,
    whole: Mapping[str, torch.Tensor],
    rows: Mapping[str, RowRange],
    ranges: Mapping[str, tuple[float, float]],
    seed: int,
) -> None:
    """Sharded tables begin with the module's own values, or with drawn ones where it is on the meta device; TorchRec
    draws them too, another set on each worker."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, ShardedTensor):
            continue
        whole_table, offset = whole[rows[name].table], rows[name].start
        for part in tensor.local_shards():
            first, column = part.metadata.shard_offsets
            n_rows, width = part.metadata.shard_sizes
            start, columns = offset + first, slice(column, column + width)
            if whole_table.is_meta:
                key = zlib.crc32(rows[name].table.encode())
                _draw(part.tensor, start, columns, whole_table.shape[1], ranges[name], (seed, key))
            else:
                part.tensor.copy_(whole_table[start : start + n_rows, columns])


def _draw(
    out_RD: torch.Tensor,
    start: int,
    columns: slice,
    width: int,
    low_high: tuple[float, float],
    key: tuple[int, int],
) -> None:
    """Uniform rows start .. start+R of a table, some of its columns."""
    end = start + len(out_RD)
    for block in range(start // DRAWN_ROWS, -(-end // DRAWN_ROWS)):
        generator = torch.Generator().manual_seed(derived_seed(*key, block))
        drawn = torch.empty(DRAWN_ROWS, width).uniform_(*low_high, generator=generator)
        first, last = max(start, block * DRAWN_ROWS), min(end, (block + 1) * DRAWN_ROWS)
        inside = slice(first - block * DRAWN_ROWS, last - block * DRAWN_ROWS)
        out_RD[first - start : last - start].copy_(drawn[inside, columns])


def _ranges(collections: Mapping[str, EmbeddingBagCollection]) -> dict[str, tuple[float, float]]:
    """Bounds of the first values, by state name."""
    return {
        f"{path}.embedding_bags.{table.name}.weight": _bounds(table)
        for path, collection in collections.items()
        for table in collection.embedding_bag_configs()
    }


def _bounds(table: EmbeddingBagConfig) -> tuple[float, float]:
    return table.get_weight_init_min(), table.get_weight_init_max()


def _collections(module: nn.Module) -> dict[str, EmbeddingBagCollection]:
    return {name: m for name, m in module.named_modules() if isinstance(m, EmbeddingBagCollection)}


def _bytes(table: EmbeddingBagConfig) -> int:
    """Weights, and an fp32 accumulator a row."""
    return table.num_embeddings * (table.embedding_dim * data_type_to_dtype(table.data_type).itemsize + 4)


def _unsplit(feature: str) -> str:
    """The feature a part of a split table answers."""
    return feature.partition("@")[0]


def _sharders() -> list[ModuleSharder[nn.Module]]:
    return [cast("ModuleSharder[nn.Module]", EmbeddingBagCollectionSharder())]
