"""The coarse quantizer: L centroids in G groups, trained and searched in two levels.

Flat k-means compares every vector with every centroid. Here a vector meets the G groups, and then only the centroids
of the `reach` nearest groups: with G = sqrt(L) that is about reach * sqrt(L) products instead of L. Groups are
answered together, one matrix product a group, so the work is BLAS-bound. Two-level training is the recipe of FAISS's
billion-scale baseline (big-ann-benchmarks, `--two_level_clustering`).

N vectors, D width, L lists (centroids), G groups. Centroids stand group by group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from candidate_gen.index.device import is_cpu, scores_at_once
from candidate_gen.index.kmeans import kmeans

REACH = 3
"""Groups whose centroids a vector is compared with. Of trained video vectors in 16,384 lists of 128 groups 3 find the
truly nearest centroid for 99.7%, 2 for 98.9%, 4 for 99.9%; the work grows with it."""
BLOCK = 131_072
"""Vectors assigned together, at least: enough rows a group for a good matrix product, few enough to stay near the
cache."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Centroids of all lists, and the groups they stand in."""

    centroid_LD: np.ndarray
    group_start: np.ndarray
    """(G+1,) int64: group g owns centroids group_start[g] .. group_start[g+1]-1."""

    @property
    def lists(self) -> int:
        """L."""
        return len(self.centroid_LD)

    @classmethod
    def train(
        cls,
        sample_ND: np.ndarray,
        lists: int,
        *,
        seed: int,
        device: str = "cpu",
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> Clusters:
        """k-means into sqrt(L) groups, then of each group into its share of the lists, then one pass over all lists."""

        def centroids(vector_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
            vectors = torch.from_numpy(np.ascontiguousarray(vector_ND, np.float32)).to(device)
            return kmeans(vectors, count, seed).cpu().numpy()

        groups = max(1, round(np.sqrt(lists))) if lists >= 256 else 1
        rng = np.random.default_rng(seed)
        few_ND = sample_ND[rng.permutation(len(sample_ND))[: 256 * groups]]
        group_GD = centroids(few_ND, groups, seed)
        of_N = cls(group_GD, np.array([0, groups])).assign(sample_ND, device=device)
        order = np.argsort(of_N, kind="stable")
        count_G = np.bincount(of_N, minlength=groups)
        own_G = _share_out(lists, count_G)
        start = np.concatenate([[0], np.cumsum(own_G)])
        centroid_LD = np.empty((lists, sample_ND.shape[1]), np.float32)
        at = np.concatenate([[0], np.cumsum(count_G)])
        for g in range(groups):
            members_ND = sample_ND[order[at[g] : at[g + 1]]]
            centroid_LD[start[g] : start[g + 1]] = centroids(members_ND, int(own_G[g]), seed + 1 + g)
            on_progress(f"k-means: group {g + 1} of {groups}")
        return cls(centroid_LD, start)._moved_to_means(sample_ND, device)

    def assign(self, vector_ND: np.ndarray, *, reach: int = REACH, device: str = "cpu") -> np.ndarray:
        """(N,) int32: the nearest list of each vector, by squared distance, among its `reach` nearest groups."""
        list_N = np.empty(len(vector_ND), np.int32)
        tables = _Tables.of(self, device)
        size = max(BLOCK, scores_at_once(device) // len(tables.member_DC))
        for begin in range(0, len(vector_ND), size):
            block_ND = np.ascontiguousarray(vector_ND[begin : begin + size], dtype=np.float32)
            list_N[begin : begin + size] = tables.assign(torch.from_numpy(block_ND).to(device), reach)
        return list_N

    def group_means(self) -> np.ndarray:
        """(G, D) float32: what a vector is compared with first."""
        sums_GD = np.add.reduceat(self.centroid_LD.astype(np.float64), self.group_start[:-1], axis=0)
        return (sums_GD / np.diff(self.group_start)[:, None]).astype(np.float32)

    def _moved_to_means(self, sample_ND: np.ndarray, device: str) -> Clusters:
        """One Lloyd step over all lists, which mends the borders between groups; an empty list stays where it is."""
        list_N = self.assign(sample_ND, device=device)
        order = np.argsort(list_N, kind="stable")
        count_L = np.bincount(list_N, minlength=self.lists)
        filled = np.flatnonzero(count_L)
        first = (np.cumsum(count_L) - count_L)[filled]
        centroid_LD = self.centroid_LD.copy()
        centroid_LD[filled] = np.add.reduceat(sample_ND[order], first, axis=0) / count_L[filled, None]
        return Clusters(centroid_LD, self.group_start)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Centroids as matrices for x.c - |c|^2 / 2, whose largest value is the nearest centroid."""

    group_DG: torch.Tensor
    group_bias_G: torch.Tensor
    member_DC: list[torch.Tensor]
    member_bias_C: list[torch.Tensor]
    start: np.ndarray

    @classmethod
    def of(cls, clusters: Clusters, device: str) -> _Tables:
        def table(centroid_CD: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            matrix_DC = torch.from_numpy(np.ascontiguousarray(centroid_CD.T)).to(device)
            return matrix_DC, -0.5 * (matrix_DC**2).sum(dim=0)

        bounds = zip(clusters.group_start[:-1], clusters.group_start[1:], strict=True)
        members = [table(clusters.centroid_LD[a:b]) for a, b in bounds]
        group_DG, group_bias_G = table(clusters.group_means())
        return cls(group_DG, group_bias_G, [m for m, _ in members], [b for _, b in members], clusters.group_start)

    def assign(self, vector_ND: torch.Tensor, reach: int) -> np.ndarray:
        n, groups = len(vector_ND), len(self.member_DC)
        reach = min(reach, groups)
        score_NG = torch.addmm(self.group_bias_G, vector_ND, self.group_DG)
        near = _largest(score_NG, reach)
        bounds = torch.cumsum(torch.bincount(near, minlength=groups), 0).tolist()
        vector_of = _order(near) // reach
        best_N = torch.full((n,), -torch.inf, device=near.device)
        list_N = torch.zeros(n, dtype=torch.int64, device=near.device)
        begin = 0
        for g, end in enumerate(bounds):
            who = vector_of[begin:end]
            begin = end
            if not len(who):
                continue
            score, member = torch.addmm(self.member_bias_C[g], vector_ND[who], self.member_DC[g]).max(dim=1)
            better = score > best_N[who]
            who = who[better]
            best_N[who], list_N[who] = score[better], member[better] + int(self.start[g])
        return list_N.int().cpu().numpy()


def _order(near: torch.Tensor) -> torch.Tensor:
    """Places sorted by group, as they came within a group."""
    if not is_cpu(near.device):
        return torch.sort(near, stable=True).indices
    return torch.from_numpy(np.argsort(near.numpy().astype(np.int16), kind="stable"))  # of 16 bits: by radix


def _largest(score_NG: torch.Tensor, count: int) -> torch.Tensor:
    """(N * count,) columns of each row's largest values, row after row; destroys the scores. For a few columns this
    takes two thirds of `topk`'s time."""
    found = torch.empty((len(score_NG), count), dtype=torch.int64, device=score_NG.device)
    for at in range(count):
        column_N1 = score_NG.argmax(dim=1, keepdim=True)
        found[:, at : at + 1] = column_N1
        score_NG.scatter_(1, column_N1, -torch.inf)
    return found.flatten()


def _share_out(lists: int, count_G: np.ndarray) -> np.ndarray:
    """Lists a group (G,) in proportion to its vectors, at least one, never more than vectors where that is possible."""
    wish_G = lists * count_G / max(count_G.sum(), 1)
    own_G = np.maximum(np.floor(wish_G).astype(np.int64), 1)
    by_need = np.argsort(own_G - wish_G, kind="stable")
    missing = lists - int(own_G.sum())
    step = 1 if missing > 0 else -1
    at = 0
    while missing:
        g = by_need[at % len(by_need)] if step > 0 else by_need[-1 - at % len(by_need)]
        if own_G[g] + step >= 1:
            own_G[g] += step
            missing -= step
        at += 1
    return own_G
