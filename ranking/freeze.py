"""From what training exports to what a bundle carries: tables as rows of codes, one block a side, the rest as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ranking.config import RankerSizes, config_from
from ranking.infer import SIDES, exported_tables
from ranking.tables import Precision, Tables, row_bytes


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
    description = json.loads((source / "ranker.json").read_text())
    if "tables" in description:
        raise ValueError(f"{source} is frozen already ({description['tables']}); freeze what training exported")
    config, sizes = config_from(description["config"]), RankerSizes.from_json(description["sizes"])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with safe_open(source / "ranker.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "_ebc." not in name}  # noqa: SIM118
        for side in SIDES:
            floats = exported_tables(file, side, getattr(sizes, f"{side}_names"))
            tensors[f"tables.{side}"] = Tables.encode(floats, precision).block
        save_file(tensors, target / "ranker.safetensors")
    (target / "ranker.json").write_text(json.dumps({**description, "tables": precision}))
    shutil.copy2(source / "calibration.json", target / "calibration.json")
    rows, dim = sum(sizes.user_table_rows) + sum(sizes.video_table_rows), config.embedding_dim
    return FrozenSize(precision, rows, rows * row_bytes(dim, "fp32"), rows * row_bytes(dim, precision))
