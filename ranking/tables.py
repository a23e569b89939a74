"""Frozen embedding tables: every table of one side of the ranker in one block of bytes, a row a vector.

N entities, W slots of all features together, D width of an embedding, R rows of all tables together. Rows are plain
float32 or float16, or codes with their own scale and bias in float16, in the layout of FBGEMM's inference tables:

    int8    scale bias | D codes of a byte            int4    scale bias | D codes of half a byte, the lower half first

A block may be mapped from a file: nothing is copied, and the processes of a machine share its pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch

from features.entities import SparseColumns

Precision = Literal["fp32", "fp16", "int8", "int4"]
FLOATS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
LEVELS: dict[Precision, int] = {"int8": 255, "int4": 15}
SCALE_BYTES = 4
"""Scale and bias of a row, float16 each."""
ENCODED_AT_ONCE = 1 << 18
"""Rows: encoding needs memory for so many at a time, however large the table."""


def row_bytes(dim: int, precision: Precision) -> int:
    """Bytes of one row; raises ValueError where a row would end in the middle of a byte or of a number."""
    if precision in FLOATS:
        return FLOATS[precision].itemsize * dim
    bits = 8 if precision == "int8" else 4
    if dim * bits % 16:
        raise ValueError(f"embedding_dim {dim} does not fit {precision} rows: choose a multiple of {16 // bits}")
    return SCALE_BYTES + dim * bits // 8


def encode_rows(rows_RD: torch.Tensor, precision: Precision) -> torch.Tensor:
    """(R, row_bytes) uint8. Codes spread evenly from each row's minimum to its maximum."""
    out = torch.empty(len(rows_RD), row_bytes(rows_RD.shape[1], precision), dtype=torch.uint8)
    _encode_into(out, rows_RD, precision)
    return out


def _encode_into(out_RB: torch.Tensor, rows_RD: torch.Tensor, precision: Precision) -> None:
    for start in range(0, len(rows_RD), ENCODED_AT_ONCE):
        part = slice(start, start + ENCODED_AT_ONCE)
        if precision in FLOATS:
            out_RB[part] = rows_RD[part].detach().to(FLOATS[precision]).contiguous().view(torch.uint8)
        else:
            out_RB[part] = _encode(rows_RD[part].detach().to(torch.float32), LEVELS[precision])


def _encode(rows_RD: torch.Tensor, levels: int) -> torch.Tensor:
    # The scale is rounded before the codes are made, so that its rounding does not add to theirs.
    bias_R1 = rows_RD.amin(1, keepdim=True).to(torch.float16)
    spread_R1 = rows_RD.amax(1, keepdim=True) - bias_R1.float()
    scale_R1 = (spread_R1 / levels).to(torch.float16)
    step_R1 = torch.where(scale_R1 > 0, scale_R1.float(), 1.0)
    codes_RD = ((rows_RD - bias_R1.float()) / step_R1).round().clamp(0, levels).to(torch.uint8)
    if levels == LEVELS["int4"]:
        codes_RD = codes_RD[:, 0::2] | (codes_RD[:, 1::2] << 4)
    return torch.cat([torch.cat([scale_R1, bias_R1], dim=1).view(torch.uint8), codes_RD], dim=1)


def decode_rows(rows_NB: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Inverse of `encode_rows`: (N, D) float32."""
    if precision in FLOATS:
        return rows_NB.view(FLOATS[precision]).float()
    scale_bias_N2 = rows_NB[:, :SCALE_BYTES].contiguous().view(torch.float16).to(torch.float32)
    codes_ND = rows_NB[:, SCALE_BYTES:]
    if precision == "int4":
        codes_ND = torch.stack([codes_ND & 15, codes_ND >> 4], dim=2).flatten(1)
    return torch.addcmul(scale_bias_N2[:, 1:], codes_ND.to(torch.float32), scale_bias_N2[:, :1])


@dataclass(frozen=True, slots=True)
class TableLayout:
    """Which tables a block holds, in order, and where their features' slots lie in the encoded entities."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    dim: int
    precision: Precision

    @property
    def n_bytes(self) -> int:
        """Of the whole block."""
        return sum(self.rows) * row_bytes(self.dim, self.precision)

    def pick(self, columns: SparseColumns) -> tuple[np.ndarray, tuple[int, ...]]:
        """Slot columns (W,) of these tables' features, and how many are each feature's; raises ValueError when the
        entities were encoded for other tables."""
        start_of = dict(zip(columns.names, np.cumsum((0, *columns.widths[:-1])).tolist(), strict=True))
        width_of = dict(zip(columns.names, columns.widths, strict=True))
        rows_of = dict(zip(columns.names, columns.table_rows, strict=True))
        for name, rows in zip(self.names, self.rows, strict=True):
            if rows_of.get(name) != rows:
                raise ValueError(
                    f"feature {name!r} was encoded for {rows_of.get(name)} rows, the ranker's table has {rows}: "
                    "encoder and ranker are of different runs"
                )
        slots = [np.arange(start_of[name], start_of[name] + width_of[name]) for name in self.names]
        return np.concatenate(slots), tuple(width_of[name] for name in self.names)


class Tables:
    """Mean of each feature's rows; absent slots count for nothing, and a feature without any is zero."""

    def __init__(self, layout: TableLayout, block: torch.Tensor, device: torch.device) -> None:
        """`block`: (n_bytes,) uint8; raises ValueError when its size is not the layout's."""
        if block.dtype != torch.uint8 or block.numel() != layout.n_bytes:
            raise ValueError(
                f"tables {', '.join(layout.names)} should be {layout.n_bytes:,} bytes of {layout.precision} rows, "
                f"found {block.numel():,} of {block.dtype}: freeze the ranker again"
            )
        self.layout, self.block = layout, block.to(device)
        self._parts = self.block.view(sum(layout.rows), -1).split(layout.rows)
        self._kernel = _Fbgemm(layout, self.block) if device.type == "cpu" and _has_fbgemm() else None

    @classmethod
    def encode(cls, tables: Sequence[tuple[str, torch.Tensor]], precision: Precision) -> Self:
        """From float tables (rows, D), in this order; they may be mapped, and are read a part at a time."""
        layout = _layout_of(tables, precision)
        block = torch.empty(layout.n_bytes, dtype=torch.uint8)
        encoded_RB = block.view(sum(layout.rows), -1)
        for (_, table), part_RB in zip(tables, encoded_RB.split(layout.rows), strict=True):
            _encode_into(part_RB, table, precision)
        return cls(layout, block, torch.device("cpu"))

    def pooled(self, slots_NW: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """(N, features * D) float32, features side by side in the layout's order; -1 is an absent slot.

        By FBGEMM's kernel where there is one for the device, otherwise by `pooled_plainly`; equal to a rounding.
        """
        if self._kernel is not None:
            return self._kernel.pooled(slots_NW, widths)
        return self.pooled_plainly(slots_NW, widths)

    def pooled_plainly(self, slots_NW: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """The same by gathers of torch alone: on any device, and inside a captured graph."""
        return torch.cat(list(_means(self._parts, slots_NW.split(widths, 1), self.layout.precision)), dim=1)


class ExportedTables:
    """Tables as training exports them, each where its file is mapped: nothing is copied, whatever their size."""

    def __init__(self, tables: Sequence[tuple[str, torch.Tensor]]) -> None:
        half = all(table.dtype == torch.float16 for _, table in tables)
        self.layout = _layout_of(tables, "fp16" if half else "fp32")
        kind = FLOATS[self.layout.precision]
        self._parts = [table.to(kind).view(torch.uint8) for _, table in tables]

    def pooled(self, slots_NW: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """As of `Tables`."""
        return torch.cat(list(_means(self._parts, slots_NW.split(widths, 1), self.layout.precision)), dim=1)


def _layout_of(tables: Sequence[tuple[str, torch.Tensor]], precision: Precision) -> TableLayout:
    names, rows = tuple(name for name, _ in tables), tuple(len(table) for _, table in tables)
    return TableLayout(names, rows, tables[0][1].shape[1], precision)


def _means(
    parts: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], precision: Precision
) -> Iterator[torch.Tensor]:
    """(N, D) a feature: the mean of its present rows, zeros without any."""
    for part_RB, slots_NW in zip(parts, slots, strict=True):
        there_NW = slots_NW >= 0
        rows_NB = part_RB.index_select(0, slots_NW.clamp(min=0).flatten())
        vectors_NWD = decode_rows(rows_NB, precision).view(*slots_NW.shape, -1) * there_NW.unsqueeze(2)
        if slots_NW.shape[1] == 1:
            yield vectors_NWD.squeeze(1)
        else:
            yield vectors_NWD.sum(1) / there_NW.sum(1, keepdim=True).clamp(min=1)


def _has_fbgemm() -> bool:
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError):  # OSError: built for another torch
        return False
    return True


class _Fbgemm:
    """FBGEMM's inference kernel over a block, which it reads in place."""

    def __init__(self, layout: TableLayout, block: torch.Tensor) -> None:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

        kind = SparseType(layout.precision)
        n, dim, width = len(layout.names), layout.dim, row_bytes(layout.dim, layout.precision)
        starts = np.cumsum((0, *layout.rows[:-1])) * width
        self._arguments = {
            "dev_weights": block,
            "uvm_weights": torch.empty(0, dtype=torch.uint8),
            "weights_placements": torch.full((n,), EmbeddingLocation.HOST, dtype=torch.int32),
            "weights_offsets": torch.from_numpy(starts.astype(np.int64)),
            "weights_tys": torch.full((n,), kind.as_int(), dtype=torch.uint8),
            "D_offsets": torch.arange(0, (n + 1) * dim, dim, dtype=torch.int32),
            "total_D": n * dim,
            "max_int2_D": 0,
            "max_int4_D": dim * (layout.precision == "int4"),
            "max_int8_D": dim * (layout.precision == "int8"),
            "max_float16_D": dim * (layout.precision == "fp16"),
            "max_float32_D": dim * (layout.precision == "fp32"),
            "pooling_mode": int(PoolingMode.MEAN),
            "indice_weights": None,
            "output_dtype": SparseType.FP32.as_int(),
            "row_alignment": 1,
        }

    def pooled(self, slots_NW: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        indices, offsets = _bags(slots_NW, widths)
        lookup = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function
        return lookup(indices=indices, offsets=offsets, **self._arguments)


def _bags(slots_NW: torch.Tensor, widths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Present rows, feature after feature and entity after entity, and where each bag begins."""
    n_bags = len(slots_NW) * len(widths)
    single = slots_NW.shape[1] == len(widths)
    if single and len(slots_NW) and slots_NW.min() >= 0:
        return slots_NW.t().reshape(-1), torch.arange(n_bags + 1)
    slots = [slots_NW.t().reshape(-1, 1)] if single else list(slots_NW.split(widths, 1))
    there = [part >= 0 for part in slots]
    offsets = torch.zeros(n_bags + 1, dtype=torch.int64)
    torch.cumsum(torch.cat([mask.sum(1) for mask in there]), 0, out=offsets[1:])
    return torch.cat([part[mask] for part, mask in zip(slots, there, strict=True)]), offsets
