"""Matrix products of the frozen scorers in float32, bfloat16 or int8, with everything between them in float32.

N rows, K inputs, M outputs. In int8 each row of the input and each output of the weight has a scale of its own, so that
no candidate's scores depend on another's; products of few numbers stay in bfloat16, where int8 would gain nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import linear, pad

DenseType = Literal["fp32", "bf16", "int8"]
Weights = dict[str, torch.Tensor]
TOLERANCE: dict[DenseType, float] = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}
"""How far a logit may be off, as a share of 1 + its size."""
WIDE = 1 << 14
"""Numbers in a weight from which on int8 pays."""
SMALLEST = 1e-20
"""Scale of a row of zeros."""


def keep(w: Weights, name: str, weight: torch.Tensor, bias: torch.Tensor | None, dense: DenseType) -> None:
    """Store a layer for `product`: its weight (M, K), or several of them (E, K, M), and its bias (M,)."""
    kind = torch.float32 if dense == "fp32" else torch.bfloat16
    if dense == "int8" and weight.ndim == 2 and weight.numel() >= WIDE:
        w[name], w[f"{name}.scale"] = _coded(weight.float())
        kind = torch.float32
    else:
        w[name] = weight.to(kind).contiguous()
    if bias is not None:
        w[f"{name}.bias"] = bias.to(kind).contiguous()


def product(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """A linear layer (..., K) -> (..., M) in its weight's precision; the result is float32."""
    weight, bias = w[name], w.get(f"{name}.bias")
    if weight.dtype != torch.int8:
        return linear(x.to(weight.dtype), weight, bias).float()
    out = _int8_product(x.flatten(0, -2), weight, w[f"{name}.scale"]).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _coded(weight_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with K rounded up to a multiple of 16, and a scale for each output."""
    scale_M = weight_MK.abs().amax(1) / 127 + SMALLEST
    codes_MK = (weight_MK / scale_M[:, None]).round().to(torch.int8)
    return pad(codes_MK, (0, -weight_MK.shape[1] % 16)).contiguous(), scale_M


def _int8_product(x_NK: torch.Tensor, weight_MK: torch.Tensor, scale_M: torch.Tensor) -> torch.Tensor:
    if padding := weight_MK.shape[1] - x_NK.shape[1]:
        x_NK = pad(x_NK, (0, padding))
    scale_N1 = x_NK.abs().amax(1, keepdim=True) / 127 + SMALLEST
    codes_NK = (x_NK / scale_N1).round().to(torch.int8)
    return torch.ops.aten._int_mm(codes_NK, weight_MK.t()).float() * (scale_N1 * scale_M)
