"""What is learned once from a sample and then shared by all shards: rotation, lists, codebook.

D width of the vectors, R of the rotated ones (R <= D), N of the sample. Rotated vectors are projections on the sample's
first principal directions about its mean. The mean itself and the directions left out shift every inner product of one
query by (nearly) the same amount, so the order stays.
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


@dataclass(frozen=True, slots=True)
class Trained:
    """Immutable; written beside the index as plain .npy files."""

    rotation_RD: np.ndarray
    clusters: Clusters
    codebook: Codebook

    @classmethod
    def fit(
        cls,
        sample_ND: np.ndarray,
        lists: int,
        config: IndexConfig,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> Trained:
        """Principal directions, then two-level k-means, then codes of what the nearest centroid leaves."""
        rotation_RD = principal_directions(sample_ND, config.kept_variance)
        rotated_NR = sample_ND @ rotation_RD.T
        clusters = Clusters.train(rotated_NR, lists, seed=config.seed, on_progress=on_progress)
        few_NR = rotated_NR[:CODEBOOK_SAMPLE]
        residual_NR = few_NR - clusters.centroid_LD[clusters.assign(few_NR)]
        on_progress("codebook")
        nibbles = len(rotation_RD) // config.dims_per_nibble
        return cls(rotation_RD, clusters, Codebook.train(residual_NR, nibbles, config.seed))

    def encode(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(list (N,) int32, residual code (N, bytes) uint8) of each vector."""
        rotated_NR = np.asarray(vector_ND, dtype=np.float32) @ self.rotation_RD.T
        list_N = self.clusters.assign(rotated_NR)
        rotated_NR -= self.clusters.centroid_LD[list_N]
        return list_N, self.codebook.encode(rotated_NR)

    def save(self, folder: Path) -> None:
        """Write into `folder`."""
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Trained:
        """Read what `save` wrote; raises ValueError when arrays do not fit one another."""
        names = ("rotation", "centroids", "group_start", "codebook")
        found = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}
        clusters = Clusters(found["centroids"], found["group_start"])
        trained = cls(found["rotation"], clusters, Codebook(found["codebook"]))
        widths = {len(trained.rotation_RD), clusters.centroid_LD.shape[1], trained.codebook.dim}
        if len(widths) != 1 or clusters.group_start[-1] != clusters.lists:
            raise ValueError(f"{folder}: rotation, centroids and codebook differ in width; build the index again")
        return trained

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "rotation": self.rotation_RD,
            "centroids": self.clusters.centroid_LD,
            "group_start": self.clusters.group_start,
            "codebook": self.codebook.centroid_MKd,
        }


def principal_directions(sample_ND: np.ndarray, kept_variance: float) -> np.ndarray:
    """(R, D) float32, orthonormal, strongest first: the fewest whose variance is this share of the whole."""
    few_ND = sample_ND[:CODEBOOK_SAMPLE].astype(np.float64)
    variance_D, direction_DD = np.linalg.eigh(np.cov(few_ND.T))
    order = np.argsort(-variance_D, kind="stable")
    share_D = np.cumsum(variance_D[order]) / max(variance_D.sum(), 1e-30)
    needed = int(np.searchsorted(share_D, kept_variance - 1e-12)) + 1
    wanted = min(-(-needed // _ALIGN) * _ALIGN, sample_ND.shape[1])
    return np.ascontiguousarray(direction_DD[:, order[:wanted]].T, dtype=np.float32)
