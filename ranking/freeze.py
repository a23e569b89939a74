"""From what training exports to what a bundle carries: tables as rows of codes, one block a side, the rest as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ranking.infer import FILES, SIDES, Ranker
from ranking.tables import Precision, Tables, decode_rows, row_bytes


@dataclass(frozen=True, slots=True)
class FrozenSize:
    """What freezing did to the tables."""

    precision: Precision
    rows: int
    bytes_before: int
    """As float32."""
    bytes_after: int

    @property
    def times_smaller(self) -> float:
        """Before over after."""
        return self.bytes_before / self.bytes_after


def freeze(source: Path, target: Path, precision: Precision) -> FrozenSize:
    """Write the ranker of `source`, as training exported it, into `target` with its tables in `precision`.

    Raises ValueError where the width of the embeddings does not fit it, or the source is frozen already."""
    ranker, description = Ranker.load(source), json.loads((source / "ranker.json").read_text())
    if "tables" in description:
        raise ValueError(f"{source} is frozen already ({description['tables']}); freeze what training exported")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tensors, rows = dict(ranker.dense), 0
    for side in SIDES:
        tables = ranker.tables[side]
        rows += sum(tables.layout.rows)
        floats = [(name, decode_rows(part, "fp32")) for name, part in tables.parts()]
        tensors[f"tables.{side}"] = Tables.encode(floats, precision).block
    save_file(tensors, target / "ranker.safetensors")
    (target / "ranker.json").write_text(json.dumps({**description, "tables": precision}))
    for name in FILES:
        if not (target / name).exists():
            shutil.copy2(source / name, target / name)
    dim = ranker.config.embedding_dim
    return FrozenSize(precision, rows, rows * row_bytes(dim, "fp32"), rows * row_bytes(dim, precision))
