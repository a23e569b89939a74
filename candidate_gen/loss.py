"""Sampled softmax over cosine + prior: one positive against the batch's other positives and uniform negatives.

N positives (each with its user vector), X uniform negatives, U distinct videos, E width, C = N + X sampled columns.
A negative drawn m times in expectation stands for 1/m of itself in the sum, which makes the sum unbiased:

    loss = -log( e^s+ / (e^s+ + sum over sampled v != + of e^(s_v - log m_v)) ),   s = (cosine + prior) / temperature
"""

from __future__ import annotations

import torch
from torch.nn import functional


def sampled_softmax(
    user_NE: torch.Tensor,
    video_UE: torch.Tensor,
    *,
    positive_N: torch.Tensor,
    owner_N: torch.Tensor,
    uniform_X: torch.Tensor,
    prior_N: torch.Tensor,
    prior_X: torch.Tensor,
    log_draws_N: torch.Tensor,
    log_draws_X: torch.Tensor,
    temperature: float,
    in_batch: bool = True,
    correct: bool = True,
) -> dict[str, torch.Tensor]:
    """Mean loss over the positives, and `hit_rate`: how often the positive beats every sampled negative.

    `positive_N` and `uniform_X` are positions in U; `prior_*` is added to that video's cosines, `log_draws_*` is the
    log of how often it is expected in the whole pool. A sampled video that is the row's own positive, or another one
    of the same owner, does not count.
    """
    pool_C = torch.cat([positive_N, uniform_X]) if in_batch else uniform_X
    # Another row's positive keeps the prior of that row's day: the sum over all videos on one day is much like that on
    # another, and each video keeps the features under which it was drawn.
    prior_C = torch.cat([prior_N, prior_X]) if in_batch else prior_X
    log_draws_C = torch.cat([log_draws_N, log_draws_X]) if in_batch else log_draws_X
    positive_score_N = ((user_NE * video_UE[positive_N]).sum(dim=-1) + prior_N) / temperature
    own_NC = _own_positives(positive_N, owner_N, pool_C, len(video_UE))
    score_NC = ((user_NE @ video_UE[pool_C].T + prior_C) / temperature).masked_fill(own_NC, float("-inf"))
    with torch.no_grad():
        hit_rate = (positive_score_N > score_NC.max(dim=1).values).float().mean()
    if correct:
        score_NC = score_NC - log_draws_C
    logit_NC = torch.cat([positive_score_N.unsqueeze(1), score_NC], dim=1)
    loss = functional.cross_entropy(logit_NC, torch.zeros_like(positive_N))
    return {"loss": loss, "hit_rate": hit_rate}


def _own_positives(
    positive_N: torch.Tensor, owner_N: torch.Tensor, pool_C: torch.Tensor, n_videos: int
) -> torch.Tensor:
    """(N, C) bool: the sampled video is a positive of the row's owner in this batch (its own one included)."""
    owners, owner_index_N = torch.unique(owner_N, return_inverse=True)
    liked_BU = torch.zeros(len(owners), n_videos, dtype=torch.bool, device=owner_N.device)
    liked_BU[owner_index_N, positive_N] = True
    return liked_BU[:, pool_C][owner_index_N]
