"""What is learned once from a sample and then shared by all shards: the space codes live in, lists, codebook.

A code's error matters as far as queries look along it. So videos are first scaled by how much queries vary, S the root
of their second moment, and queries by its inverse, which leaves inner products as they are:

    q . x = (q S^-1) . (S x)

Principal directions of the scaled videos are those that matter to the ranking; each is then balanced, so that queries
and videos vary equally along it. Two-tower queries lie off the videos' distribution, and where a coordinate is an
additive prior all of them look along it. Without sample queries S is 1.

D width of the vectors, R of the codes' space (R <= D), N videos and Q queries of the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candidate_gen.index.clusters import Clusters
from candidate_gen.index.codes import Codebook
from candidate_gen.index.config import IndexConfig

_ALIGN = 4
"""R is a multiple of this, so that codes fill whole bytes at either precision."""
CODEBOOK_SAMPLE = 131_072
QUERY_FLOOR = 0.05
"""Share of the queries' mean energy that every direction has at least."""
FILES = ("video_map.npy", "query_map.npy", "centroids.npy", "group_start.npy", "codebook.npy")


@dataclass(frozen=True, slots=True)
class Trained:
    """Immutable; written beside the index as plain .npy files."""

    video_map_RD: np.ndarray
    """Of videos into the codes' space."""
    query_map_RD: np.ndarray
    """Of queries: their products with mapped videos are the products of both, but for what R < D leaves out and a
    constant a query."""
    clusters: Clusters
    codebook: Codebook

    @classmethod
    def fit(
        cls,
        sample_ND: np.ndarray,
        lists: int,
        config: IndexConfig,
        query_QD: np.ndarray | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
        device: str = "cpu",
    ) -> Trained:
        """The space, then two-level k-means, then codes of what the nearest centroid leaves."""
        video_map_RD, query_map_RD = learn_space(sample_ND, query_QD, config.kept_variance)
        mapped_NR = sample_ND @ video_map_RD.T
        clusters = Clusters.train(mapped_NR, lists, seed=config.seed, device=device, on_progress=on_progress)
        few_NR = mapped_NR[:CODEBOOK_SAMPLE]
        residual_NR = few_NR - clusters.centroid_LD[clusters.assign(few_NR, device=device)]
        on_progress("codebook")
        return cls(video_map_RD, query_map_RD, clusters, Codebook.train(residual_NR, config.code_bits, config.seed))

    def encode(self, vector_ND: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """(list (N,) int32, residual code (N, bytes) uint8) of each vector; lists are found on the device."""
        mapped_NR = np.asarray(vector_ND, dtype=np.float32) @ self.video_map_RD.T
        list_N = self.clusters.assign(mapped_NR, device=device)
        mapped_NR -= self.clusters.centroid_LD[list_N]
        return list_N, self.codebook.encode(mapped_NR)

    def save(self, folder: Path) -> None:
        """Write into `folder`."""
        arrays = self.video_map_RD, self.query_map_RD, self.clusters.centroid_LD, self.clusters.group_start
        for name, array in zip(FILES, (*arrays, self.codebook.value_MKd), strict=True):
            np.save(folder / name, array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """Read what `save` wrote; raises ValueError when arrays do not fit one another."""
        video_map, query_map, centroids, group_start, codebook = (
            np.load(folder / name, allow_pickle=False) for name in FILES
        )
        trained = cls(video_map, query_map, Clusters(centroids, group_start), Codebook(codebook, len(video_map)))
        widths = {len(video_map), len(query_map), centroids.shape[1], trained.codebook.dim}
        if len(widths) != 1 or group_start[-1] != len(centroids):
            raise ValueError(f"{folder}: maps, centroids and codebook differ in width; build the index again")
        return trained


def learn_space(
    sample_ND: np.ndarray, query_QD: np.ndarray | None, kept_variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """(map of videos, map of queries), float32 (R, D) each: the fewest principal directions, strongest first, that hold
    this share of the variance of scaled videos."""
    few_ND = sample_ND[:CODEBOOK_SAMPLE].astype(np.float64)
    scale_DD, inverse_DD = _query_scale(few_ND.shape[1], query_QD)
    variance_D, direction_DD = np.linalg.eigh(scale_DD @ np.cov(few_ND.T) @ scale_DD)
    order = np.argsort(-variance_D, kind="stable")
    share_D = np.cumsum(variance_D[order]) / max(variance_D.sum(), 1e-30)
    needed = int(np.searchsorted(share_D, kept_variance - 1e-12)) + 1
    wanted = min(-(-needed // _ALIGN) * _ALIGN, sample_ND.shape[1])
    # Half the spread of each direction goes to the queries, so that lists are cut along all of them and not along the
    # strongest alone: at a million videos .988 instead of .982 of the top 100.
    spread_R1 = np.maximum(variance_D[order[:wanted], None], 1e-12) ** 0.25
    kept_RD = direction_DD[:, order[:wanted]].T
    video_map_RD, query_map_RD = kept_RD @ scale_DD / spread_R1, kept_RD @ inverse_DD * spread_R1
    return np.ascontiguousarray(video_map_RD, np.float32), np.ascontiguousarray(query_map_RD, np.float32)


def _query_scale(dim: int, query_QD: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(S, S^-1), (D, D) float64. Directions that no sample query looks along keep a little weight: tomorrow's may."""
    if query_QD is None or not len(query_QD):
        return np.eye(dim), np.eye(dim)
    query_QD = query_QD.astype(np.float64)
    moment_DD = query_QD.T @ query_QD / len(query_QD)
    energy_D, direction_DD = np.linalg.eigh(moment_DD)
    root_D = np.sqrt(np.maximum(energy_D, 0) + QUERY_FLOOR * energy_D.sum() / dim)
    return (direction_DD * root_D) @ direction_DD.T, (direction_DD / root_D) @ direction_DD.T
