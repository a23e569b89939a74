"""A table larger than one worker's memory, split by ranges of rows into several tables that the planner places apart.

    rows 0 .. 9, two parts of 5       bag of a sample [1 7 8]  ->  part 0: [1]   part 1: [2 3]
                                      pooled = (sum of part 0 + sum of part 1) / 3

On a CPU TorchRec 1.8 splits a table by columns only. Row-wise Adagrad keeps one accumulator a row, the mean square of
the row's gradient: cut by columns, each piece would keep its own, and what is learnt would depend on how many workers
there are. Cut by rows every row stays whole, so the parts learn what the one table would have learnt, to the rounding
of a sum of P terms. The price: each part answers with a vector for every bag, P - 1 of them more on the wire and in the
sum. B bags, P parts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import PoolingType


@dataclass(frozen=True, slots=True)
class RowRange:
    """Where the rows of a (part of a) table lie in the whole one."""

    table: str
    """State name of the whole table in the unsplit module."""
    start: int
    end: int


def parts_of(rows: int, rows_a_part: int | None) -> list[tuple[int, int]]:
    """Row ranges of the parts: equal, but for the last."""
    size = rows if rows_a_part is None else min(rows, rows_a_part)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def split_tables(module: nn.Module, rows_a_part: int | None) -> dict[str, RowRange]:
    """Replace each collection that holds a table of more rows by `RowParts`, in place. Returns, for every table of the
    module, the state name it has now and where its rows lie in the unsplit module."""
    where: dict[str, RowRange] = {}
    for path, collection in _collections(module):
        configs = collection.embedding_bag_configs()
        is_split = rows_a_part is not None and any(c.num_embeddings > rows_a_part for c in configs)
        prefix = f"{path}.parts" if is_split else path
        for config in configs:
            whole = f"{path}.embedding_bags.{config.name}.weight"
            ranges = parts_of(config.num_embeddings, rows_a_part)
            for number, (start, end) in enumerate(ranges):
                name = config.name if len(ranges) == 1 else _part(config.name, number)
                where[f"{prefix}.embedding_bags.{name}.weight"] = RowRange(whole, start, end)
        if is_split:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, RowParts(configs, cast("int", rows_a_part)))
    return where


class RowParts(nn.Module):
    """Stands in for an EmbeddingBagCollection, the same features in and out; its tables are on the meta device, for
    sharding makes the real ones."""

    def __init__(self, tables: list[EmbeddingBagConfig], rows_a_part: int) -> None:
        super().__init__()
        self.tables, self.rows_a_part = tables, rows_a_part
        self.n_parts = {
            t.feature_names[0]: len(parts_of(t.num_embeddings, rows_a_part))
            for t in tables
            if t.num_embeddings > rows_a_part
        }
        shared = [t.name for t in tables if t.num_embeddings > rows_a_part and len(t.feature_names) != 1]
        if shared:
            raise ValueError(f"tables {shared} serve several features each and cannot be split by rows")
        self.parts = EmbeddingBagCollection(
            tables=[part for table in tables for part in self._configs(table)], device=torch.device("meta")
        )

    def forward(self, bags: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedTensor of the unsplit features, in the order of the tables."""
        pooled = self.parts(self._spread(bags)).to_dict()
        names, values = [], []
        for table in self.tables:
            for feature in table.feature_names:
                names.append(feature)
                values.append(self._joined(feature, table, pooled, bags))
        return KeyedTensor(names, [v.shape[1] for v in values], torch.cat(values, dim=1))

    def _configs(self, table: EmbeddingBagConfig) -> Iterator[EmbeddingBagConfig]:
        if table.num_embeddings <= self.rows_a_part:
            yield table
            return
        for number, (start, end) in enumerate(parts_of(table.num_embeddings, self.rows_a_part)):
            name, feature = _part(table.name, number), _part(table.feature_names[0], number)
            yield replace(
                table, name=name, feature_names=[feature], num_embeddings=end - start, pooling=PoolingType.SUM
            )

    def _spread(self, bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Each id to the part that holds its row, as a row of that part."""
        keys, values, lengths = [], [], []
        for feature in bags.keys():  # noqa: SIM118 (a method of KeyedJaggedTensor, which is no mapping)
            bag = bags[feature]
            if feature not in self.n_parts:
                keys.append(feature)
                values.append(bag.values())
                lengths.append(bag.lengths())
                continue
            n_parts = self.n_parts[feature]
            lengths_PB, rows, *_ = torch.ops.fbgemm.block_bucketize_sparse_features(
                lengths=bag.lengths(),
                indices=bag.values(),
                bucketize_pos=False,
                sequence=False,
                block_sizes=torch.tensor([self.rows_a_part], dtype=bag.values().dtype, device=bag.values().device),
                my_size=n_parts,
            )
            keys += [_part(feature, number) for number in range(n_parts)]
            values.append(rows)
            lengths.append(lengths_PB)
        return KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))

    def _joined(
        self, feature: str, table: EmbeddingBagConfig, pooled: dict[str, torch.Tensor], bags: KeyedJaggedTensor
    ) -> torch.Tensor:
        if feature not in self.n_parts:
            return pooled[feature]
        total_BD = torch.stack([pooled[_part(feature, p)] for p in range(self.n_parts[feature])]).sum(0)
        if table.pooling == PoolingType.MEAN:
            total_BD = total_BD / bags[feature].lengths().clamp(min=1)[:, None]
        return total_BD


def _part(name: str, number: int) -> str:
    return f"{name}@{number}"


def _collections(module: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    return [(path, m) for path, m in module.named_modules() if isinstance(m, EmbeddingBagCollection)]
