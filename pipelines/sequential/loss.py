"""Softmax losses over the next item: exact over the catalogue, or over a sampled pool shared by the batch.

N positions with their query vectors, V items, E width, C columns of the pool. Score = query . item / temperature.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of float32 logits the full softmax holds at a time: on a CPU what stays in its cache, on a GPU what keeps it busy."""
MIN_CHUNK_ROWS = 64


def full_softmax(
    query_NE: torch.Tensor, item_VE: torch.Tensor, target_N: torch.Tensor, temperature: float, *, bf16: bool = False
) -> torch.Tensor:
    """Sum over N of the exact cross-entropy; both gradients are found in the forward pass, chunk by chunk, so that the
    N x V logits never exist. `bf16` multiplies in it and sums in float32: a logit of 20 is then off by up to .06."""
    loss: Any = _FullSoftmax.apply(query_NE, item_VE, target_N, 1 / temperature, bf16)
    return loss


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_NE: torch.Tensor, item_VE: torch.Tensor, target_N: torch.Tensor, scale: float, bf16: bool
    ) -> torch.Tensor:
        low = torch.bfloat16 if bf16 else query_NE.dtype
        scaled_NE, low_VE = (query_NE * scale).to(low), item_VE.to(low)
        grad_query_NE, grad_item_VE = torch.empty_like(query_NE), torch.zeros_like(item_VE)
        loss = torch.zeros((), device=query_NE.device, dtype=query_NE.dtype)
        rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES[query_NE.device.type] // (4 * len(item_VE)))
        logits = torch.empty(rows, len(item_VE), device=query_NE.device, dtype=low)
        shares = torch.empty_like(logits, dtype=query_NE.dtype)  # made once: the pages of a new one cost more than exp
        for begin in range(0, len(query_NE), rows):
            query, target = scaled_NE[begin : begin + rows], target_N[begin : begin + rows, None]
            logit = torch.mm(query, low_VE.T, out=logits[: len(query)])
            share = shares[: len(query)].copy_(logit)
            of_target, top = share.gather(1, target), share.amax(dim=1, keepdim=True)
            total = share.sub_(top).exp_().sum(dim=1, keepdim=True)
            loss += (total.log() + top - of_target).sum()
            share.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
            low_share = logit.copy_(share)
            grad_query_NE[begin : begin + rows] = low_share @ low_VE
            grad_item_VE += low_share.T @ query
        ctx.save_for_backward(grad_query_NE.mul_(scale), grad_item_VE)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_query_NE, grad_item_VE = ctx.saved_tensors
        return grad_query_NE * grads[0], grad_item_VE * grads[0], None, None, None


def sampled_softmax(
    query_NE: torch.Tensor,
    positive_NE: torch.Tensor,
    pool_CE: torch.Tensor,
    *,
    target_N: torch.Tensor,
    pool_C: torch.Tensor,
    log_draws_C: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Sum over N of -log(e^s+ / (e^s+ + sum of e^(s - log_draws) over the pool)); copies of the row's own target do
    not count. With the log of each item's expected draws the sum is unbiased (logQ); with zeros it is not."""
    positive_N = (query_NE * positive_NE).sum(dim=1) / temperature
    score_NC = (query_NE @ pool_CE.T) / temperature - log_draws_C
    score_NC = score_NC.masked_fill(target_N[:, None] == pool_C[None, :], float("-inf"))
    return (torch.logaddexp(positive_N, score_NC.logsumexp(dim=1)) - positive_N).sum()
