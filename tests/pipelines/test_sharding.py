"""Plans for topologies that are not here, and a table split by rows against the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import PoolingType

from pipelines.training.row_parts import RowParts, parts_of, split_tables
from pipelines.training.sharding import SPREAD_ABOVE, Traffic, placement, plan_alone, table_planner

GIB = 2**30


def collection(rows: dict[str, int], device: str = "meta", pooling: PoolingType = PoolingType.MEAN):
    return EmbeddingBagCollection(
        device=torch.device(device),
        tables=[
            EmbeddingBagConfig(name=n, feature_names=[n], num_embeddings=r, embedding_dim=8, pooling=pooling)
            for n, r in rows.items()
        ],
    )


def test_large_tables_lie_on_all_gpus_row_by_row():
    row_bytes, large = 8 * 4 + 4, int(1.5 * SPREAD_ABOVE * 10 * GIB / (8 * 4 + 4))
    module = nn.ModuleDict({"ebc": collection({"large": large, "small": 1000})})
    topology = Topology(world_size=4, local_world_size=4, compute_device="cuda", hbm_cap=10 * GIB)
    planner = table_planner(module, topology, batch_size=64, traffic={"large": Traffic(64, 3.0)})
    plan = {t.table: t for t in placement(plan_alone(planner, module), module)}
    assert plan["ebc.large"].sharding == "row_wise"
    assert plan["ebc.large"].ranks == (0, 1, 2, 3)
    assert plan["ebc.large"].mib == pytest.approx(large * row_bytes / 2**20)


def test_on_a_cpu_tables_larger_than_a_worker_fit_in_parts_alone():
    rows = int(6 * GIB / 36)
    topology = Topology(world_size=2, local_world_size=2, compute_device="cpu", ddr_cap=5 * GIB)

    def plan(rows_a_part: int | None):
        module = nn.ModuleDict({"ebc": collection({"large": rows})})
        split_tables(module, rows_a_part)
        planner = table_planner(module, topology, batch_size=64, traffic={})
        return placement(plan_alone(planner, module), module)

    with pytest.raises(Exception, match=r"[Ii]nsufficient|storage|partition"):
        plan(None)
    assert {rank for part in plan(rows // 2 + 1) for rank in part.ranks} == {0, 1}


@pytest.mark.parametrize("pooling", [PoolingType.MEAN, PoolingType.SUM])
def test_parts_answer_as_the_whole_table(pooling):
    torch.manual_seed(0)
    whole = collection({"big": 23, "little": 5}, "cpu", pooling)
    split = RowParts(whole.embedding_bag_configs(), rows_a_part=10)
    real = EmbeddingBagCollection(tables=split.parts.embedding_bag_configs())
    weight = whole.embedding_bags["big"].weight
    with torch.no_grad():
        for number, (start, end) in enumerate(parts_of(23, 10)):
            real.embedding_bags[f"big@{number}"].weight.copy_(weight[start:end])
        real.embedding_bags["little"].weight.copy_(whole.embedding_bags["little"].weight)
    split.parts = real
    lengths = torch.tensor([3, 0, 1, 6, 1, 2, 0, 1], dtype=torch.int32)
    values = torch.cat([torch.randint(0, 23, (10,)), torch.randint(0, 5, (4,))])
    bags = KeyedJaggedTensor(keys=["big", "little"], values=values, lengths=lengths)
    expected, found = whole(bags), split(bags)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found.values(), expected.values())
    expected.values().square().sum().backward()
    found.values().square().sum().backward()
    for number, (start, end) in enumerate(parts_of(23, 10)):
        torch.testing.assert_close(real.embedding_bags[f"big@{number}"].weight.grad, weight.grad[start:end])


def test_a_split_table_of_two_features_is_refused_by_name():
    shared = EmbeddingBagConfig(name="shared", feature_names=["a", "b"], num_embeddings=20, embedding_dim=8)
    with pytest.raises(ValueError, match="shared"):
        RowParts([shared], rows_a_part=10)
