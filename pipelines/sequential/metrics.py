"""Exact ranking over the whole catalogue: where each user's held-out item stands, and what follows from it.

B users at a time, U users, V items, K best items. Equal scores say nothing about order, so a tie counts as its average
over all orders: with g candidates above the target and e beside it, its place is uniform on g+1 .. g+e+1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipelines.metrics import coverage
from pipelines.sequential.data import Sequences, Windows

KS = (10, 50, 200)
USERS_AT_ONCE = 256
NEVER = 1 << 40
"""Candidates above a target that is no candidate."""

Exclude = Literal["seen", "window", "none"]
Scorer = Callable[[Windows], torch.Tensor]
"""Windows -> (B, V) scores, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Where the targets stand."""

    above_U: np.ndarray
    """Candidates that score higher; NEVER when the target was no candidate itself."""
    beside_U: np.ndarray
    """Other candidates that score the same."""
    top_UK: np.ndarray
    """Best candidates of each user, -1 where there are no more."""


def rank_targets(score: Scorer, sequences: Sequences, windows: Windows, exclude: Exclude) -> Ranking:
    """Rank every window's last target. Excluded are all items the user has seen, those in the window, or none;
    a target that is excluded itself, being consumed again, is never found."""
    parts = [_rank(score(part), sequences, part, exclude) for part in _parts(windows)]
    return Ranking(
        above_U=np.concatenate([p.above_U for p in parts]),
        beside_U=np.concatenate([p.beside_U for p in parts]),
        top_UK=np.concatenate([p.top_UK for p in parts]),
    )


def summarise(ranking: Ranking, n_items: int) -> dict[str, float]:
    """HR@k, NDCG@k with one relevant item (1 / log2(place + 1)), and the share of the catalogue in anybody's top k."""
    result: dict[str, float] = {}
    for k in KS:
        result[f"hr@{k}"] = float(hits(ranking, k).mean())
        result[f"ndcg@{k}"] = float(gains(ranking, k).mean())
    for k in KS:
        result[f"coverage@{k}"] = coverage(ranking.top_UK[:, :k], n_items)
    return result


def hits(ranking: Ranking, k: int) -> np.ndarray:
    """(U,) chance that the target is among the first k."""
    places_U = ranking.beside_U + 1
    return np.clip(k - ranking.above_U, 0, places_U) / places_U


def gains(ranking: Ranking, k: int) -> np.ndarray:
    """(U,) expected 1 / log2(place + 1), 0 beyond k."""
    upto = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))])
    first_U, last_U = ranking.above_U, ranking.above_U + ranking.beside_U + 1
    return (upto[np.minimum(last_U, k)] - upto[np.minimum(first_U, k)]) / (ranking.beside_U + 1)


def popularity(sequences: Sequences, windows: Windows) -> Scorer:
    """How often each item was consumed, by anybody, before these windows' targets and not after."""
    user_end_W = sequences.start_U[np.searchsorted(sequences.start_U, windows.end_W, side="right")]
    step_N = np.zeros(len(sequences.item_N) + 1, dtype=np.int64)
    np.add.at(step_N, windows.end_W, 1)
    np.add.at(step_N, user_end_W, -1)
    known_N = np.cumsum(step_N)[:-1] == 0
    counts_V = np.bincount(sequences.item_N[known_N], minlength=sequences.n_items)
    scores_V = torch.from_numpy(counts_V.astype(np.float32))
    return lambda part: scores_V.expand(len(part), -1).clone()


def _parts(windows: Windows) -> Iterator[Windows]:
    """In order; each part is padded only to its own longest window."""
    for begin in range(0, len(windows), USERS_AT_ONCE):
        yield windows.take(np.arange(begin, min(begin + USERS_AT_ONCE, len(windows))))


def _rank(score_BV: torch.Tensor, sequences: Sequences, windows: Windows, exclude: Exclude) -> Ranking:
    target_B = torch.from_numpy(sequences.item_N[windows.end_W]).to(score_BV.device)
    row_B = torch.arange(len(target_B), device=score_BV.device)
    of_target_B1 = score_BV[row_B, target_B][:, None].clone()
    if exclude != "none":
        begin_B = windows.first_W if exclude == "seen" else windows.begin_W
        size_B = windows.end_W - begin_B
        at_X = np.repeat(begin_B - np.cumsum(size_B) + size_B, size_B) + np.arange(size_B.sum())
        owner_X = torch.from_numpy(np.repeat(np.arange(len(size_B)), size_B)).to(score_BV.device)
        score_BV[owner_X, torch.from_numpy(sequences.item_N[at_X]).to(score_BV.device)] = float("-inf")
    candidate_B = score_BV[row_B, target_B] > float("-inf")
    above_B = (score_BV > of_target_B1).sum(dim=1)
    beside_B = (score_BV == of_target_B1).sum(dim=1) - 1
    k = max(KS)
    best = score_BV.topk(min(k, score_BV.shape[1]), dim=1)
    top_BK = torch.where(best.values > float("-inf"), best.indices, -1)
    return Ranking(
        above_U=torch.where(candidate_B, above_B, NEVER).cpu().numpy(),
        beside_U=torch.where(candidate_B, beside_B, 0).cpu().numpy(),
        top_UK=np.pad(top_BK.cpu().numpy(), ((0, 0), (0, k - top_BK.shape[1])), constant_values=-1),
    )
