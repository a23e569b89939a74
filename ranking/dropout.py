"""Dropout whose mask belongs to the row: the same for an example whichever worker it comes to, in whatever company.

`nn.Dropout` draws by position in the worker's batch, so two workers that share a batch train another model than one
process that takes it whole. Here a mask is a hash of (step's seed, row's key, column), N rows, F columns. It is also
faster on a CPU than drawing: a dozen integer operations in vector registers against one generator stepped N F times.
"""

from __future__ import annotations

import torch
from torch import nn


class RowDropout(nn.Module):
    """`nn.Dropout`, keyed by row."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_NF: torch.Tensor, key_N: torch.Tensor | None) -> torch.Tensor:
        """Rows of equal key get equal masks; `key_N` may be None when not training."""
        if not self.training or self.p == 0:
            return x_NF
        keep_NF = keep_mask(required(key_N), x_NF.shape[1], self.p)
        return x_NF * keep_NF.to(x_NF.dtype).mul_(1 / (1 - self.p))


def required(key_N: torch.Tensor | None) -> torch.Tensor:
    """The keys, or ValueError without any."""
    if key_N is None:
        raise ValueError("dropout in training needs a key for each row, such as the number of its example")
    return key_N


def keep_mask(key_N: torch.Tensor, width: int, p: float) -> torch.Tensor:
    """(N, width) bool, False with probability p; draws one seed from torch's generator, so that workers seeded alike
    agree and each call differs."""
    seed = int(torch.randint(-(2**31), 2**31, (1,)))
    row_N1 = _mix((key_N ^ (key_N >> 32)).to(torch.int32) ^ seed)[:, None]
    column_1F = _mix(torch.arange(1, width + 1, dtype=torch.int32, device=key_N.device) * _signed(0x9E3779B9))
    hashed_NF = _mix(row_N1 ^ column_1F[None, :])
    return hashed_NF >= int(p * 2**32) - 2**31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32 bits in which each input bit flips each output bit about half the time (constants of
    C. Wellons's search for two-round mixers, 2018, "lowbias32")."""
    x = (x ^ _shifted(x, 16)) * _signed(0x7FEB352D)
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without the sign: torch's shift of a signed integer drags it along."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant
