"""Softmax losses over cosine + prior: sampled for large catalogues, exact for small ones.

N positives (each with its user vector), U distinct videos, E width, score s = (cosine + prior) / temperature. A
positive competes with C columns: all X eligible videos, or M = N + X sampled ones, the batch's other positives and X
uniform draws. A video drawn m times in expectation stands for 1/m of itself in the sum, which makes the sum unbiased
(logQ: Bengio and Senecal 2008; Yi et al., RecSys 2019); the row's own positive is no draw and is not weighed:

    loss = -log( e^s+ / (e^s+ + sum over columns v != + of e^(s_v - log m_v)) ),   m = 1 where all videos are there
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
    correct: bool = True,
) -> dict[str, torch.Tensor]:
    """Mean loss over the positives, and `hit_rate`: how often the positive beats every sampled negative.

    `positive_N` and `uniform_X` are positions in U; `prior_*` is added to that video's cosines, `log_draws_*` is the
    log of how often it is expected among the M draws. A sampled video that is the row's own positive, or another one
    of the same owner, does not count. `correct=False` leaves logQ out.
    """
    # Another row's positive keeps the prior of that row's day: the sum over all videos on one day is much like that on
    # another, and each video keeps the features under which it was drawn.
    pool_M, prior_M = torch.cat([positive_N, uniform_X]), torch.cat([prior_N, prior_X])
    positive_score_N = ((user_NE * video_UE[positive_N]).sum(dim=-1) + prior_N) / temperature
    score_NM = (user_NE @ video_UE[pool_M].T + prior_M) / temperature
    score_NM = score_NM.masked_fill(_own_positives(positive_N, owner_N, pool_M, len(video_UE)), float("-inf"))
    log_draws_M = torch.cat([log_draws_N, log_draws_X])
    return _against(positive_score_N, score_NM, score_NM - log_draws_M if correct else score_NM)


def full_softmax(
    user_NE: torch.Tensor,
    video_UE: torch.Tensor,
    *,
    positive_N: torch.Tensor,
    owner_N: torch.Tensor,
    catalogue_X: torch.Tensor,
    uploaded_N: torch.Tensor,
    prior_N: torch.Tensor,
    prior_NX: torch.Tensor,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """As `sampled_softmax`, but exact: a positive competes with the first `uploaded_N` videos of the catalogue
    (positions in U, by upload time), those there were at its instant, less the owner's own positives; `prior_NX` is
    theirs on the positive's day."""
    positive_score_N = ((user_NE * video_UE[positive_N]).sum(dim=-1) + prior_N) / temperature
    score_NX = (user_NE @ video_UE[catalogue_X].T + prior_NX) / temperature
    later_NX = torch.arange(len(catalogue_X), device=uploaded_N.device) >= uploaded_N[:, None]
    barred_NX = later_NX | _own_positives(positive_N, owner_N, catalogue_X, len(video_UE))
    score_NX = score_NX.masked_fill(barred_NX, float("-inf"))
    return _against(positive_score_N, score_NX, score_NX)


def _against(
    positive_score_N: torch.Tensor, score_NC: torch.Tensor, weighed_NC: torch.Tensor
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        hit_rate = (positive_score_N > score_NC.max(dim=1).values).float().mean()
    logit_NC = torch.cat([positive_score_N.unsqueeze(1), weighed_NC], dim=1)
    loss = functional.cross_entropy(logit_NC, torch.zeros(len(logit_NC), dtype=torch.int64, device=logit_NC.device))
    return {"loss": loss, "hit_rate": hit_rate}


def _own_positives(
    positive_N: torch.Tensor, owner_N: torch.Tensor, pool_C: torch.Tensor, n_videos: int
) -> torch.Tensor:
    """(N, C) bool: the video is a positive of the row's owner in this batch (its own one included)."""
    owners, owner_index_N = torch.unique(owner_N, return_inverse=True)
    liked_BU = torch.zeros(len(owners), n_videos, dtype=torch.bool, device=owner_N.device)
    liked_BU[owner_index_N, positive_N] = True
    return liked_BU[:, pool_C][owner_index_N]
