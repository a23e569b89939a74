"""Losses of the ranker: binary cross-entropy a task and for the watch-time quantile, blind to what was not logged.

N candidates, T tasks; NaN means "not logged" and contributes neither loss nor gradient. Sums over the logged rows are
divided by all rows: a row weighs the same whatever is logged of its neighbours, or the few dated rows among many
undated ones would count thirty times for the tasks that only they have.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


def task_losses(logits_NT: torch.Tensor, labels_NT: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each task, summed over its logged rows, a row of the batch (T,). A weight says for how many
    impressions a row stands: those of its kind that down-sampling left out were as likely to be drawn."""
    logged_NT = ~labels_NT.isnan()
    losses_NT = binary_cross_entropy_with_logits(logits_NT, labels_NT.nan_to_num(), reduction="none")
    return (losses_NT * logged_NT * weight_N[:, None]).sum(0) / len(labels_NT)


def quantile_loss(logit_N: torch.Tensor, quantile_N: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against the quantile in 0 .. 1 as a soft label, less its own entropy: 0 when met exactly.

    The minimiser is the expected quantile, as with squared error, but the gradient does not vanish at the ends.
    """
    logged_N = ~quantile_N.isnan()
    target_N = torch.where(logged_N, quantile_N, 0.5)
    loss_N = binary_cross_entropy_with_logits(logit_N, target_N, reduction="none")
    entropy_N = torch.special.entr(target_N) + torch.special.entr(1 - target_N)
    return ((loss_N - entropy_N) * logged_N * weight_N).sum() / len(quantile_N)
