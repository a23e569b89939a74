"""Lloyd's k-means in torch, on whatever device the vectors lie.

The same steps as faiss.Kmeans, whose results it gives from the same beginning: random vectors begin as centroids, each
step assigns every vector to its nearest centroid and moves the centroids to their means, and an empty one takes half
of a large one. N vectors, D width, k centroids.
"""

from __future__ import annotations

import torch

from candidate_gen.index.device import scores_at_once

ITERATIONS = 8
AT_MOST = 256
"""Vectors a centroid that are looked at; more change little."""
_NUDGE = 1 / 1024
"""By how much the halves of a split centroid differ, as in faiss::Clustering."""


def kmeans(vector_ND: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """(k, D) float32. With hardly more vectors than centroids the vectors themselves, repeated, are the centroids."""
    n, dim = vector_ND.shape
    if n <= k:
        at = torch.arange(k, device=vector_ND.device) % max(n, 1)
        return vector_ND[at].float() if n else torch.zeros((k, dim), device=vector_ND.device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: AT_MOST * k].to(vector_ND.device)
    few_ND = vector_ND[order].float()
    return lloyd(few_ND, few_ND[:k])


def lloyd(vector_ND: torch.Tensor, centroid_kD: torch.Tensor) -> torch.Tensor:
    """ITERATIONS steps from given centroids."""
    centroid_kD, step = centroid_kD.clone(), max(1, scores_at_once(vector_ND.device) // len(centroid_kD))
    for _ in range(ITERATIONS):
        bias_k = -0.5 * (centroid_kD**2).sum(dim=1)  # the largest x.c - |c|^2 / 2 is the nearest centroid
        pieces = [torch.addmm(bias_k, part_BD, centroid_kD.T).argmax(dim=1) for part_BD in vector_ND.split(step)]
        nearest_N = torch.cat(pieces)
        count_k = torch.bincount(nearest_N, minlength=len(centroid_kD))
        centroid_kD = torch.zeros_like(centroid_kD).index_add_(0, nearest_N, vector_ND)
        centroid_kD /= count_k.clamp(min=1).unsqueeze(1)
        _split_large(centroid_kD, count_k.tolist())
    return centroid_kD


def _split_large(centroid_kD: torch.Tensor, count_k: list[int]) -> None:
    """Every empty centroid takes half of the largest there is, in place."""
    sign_D = 1 - 2 * (torch.arange(centroid_kD.shape[1], device=centroid_kD.device) % 2)
    for empty in [at for at, count in enumerate(count_k) if count == 0]:
        large = max(range(len(count_k)), key=count_k.__getitem__)
        centroid_kD[empty] = centroid_kD[large] * (1 + _NUDGE * sign_D)
        centroid_kD[large] *= 1 - _NUDGE * sign_D
        count_k[empty] = count_k[large] // 2
        count_k[large] -= count_k[empty]
