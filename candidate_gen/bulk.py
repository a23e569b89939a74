"""The video tower without TorchRec's jagged tensors, for embedding whole catalogues: plain lookups, then the MLP.

The weights are the trained modules' own, and so is every step behind the lookups; only the way to the joined
embeddings is shorter. n videos, W sparse slots, F joined embeddings, C features of (video, instant), D width of the
vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from candidate_gen.model import TowersModel
from features.entities import SparseColumns

BLOCK = 2048
"""Videos a step: what one step reads and writes (F + hidden floats a video) stays in a core's own cache."""
DEVICE_BLOCK = 65_536
"""Videos a step on another device than the CPU, where a step's start costs more than its memory."""


class BulkVideoTower:
    """Vectors of encoded videos, equal to `TowersModel.encode_videos` and `prior` placed together, to float32's
    rounding. Read-only, so many threads may share it."""

    def __init__(self, model: TowersModel, columns: SparseColumns) -> None:
        """`columns` say where each feature lies in the W slots; read are those the model has tables for."""
        self._model, self._columns, self._names = model, columns, model.video_features.names
        weights = model.video_ebc.state_dict()
        self._tables = {name: weights[f"embedding_bags.{name}.weight"] for name in self._names}
        self._unknown = dict(model.video_features.unknown.items())
        self._device = next(model.video_mlp.parameters()).device

    def __call__(self, sparse_NW: np.ndarray, dense_ND: np.ndarray, candidate_dense_NC: np.ndarray) -> np.ndarray:
        """(n, D) float32, L2-normalised."""
        out_ND = np.empty((len(sparse_NW), self._model.config.dim), np.float32)
        with torch.inference_mode():
            step = BLOCK if self._device.type == "cpu" else DEVICE_BLOCK
            for start in range(0, len(out_ND), step):
                at = slice(start, start + step)
                joined_NF = self.lookup(sparse_NW[at], dense_ND[at])
                out_ND[at] = self.dense(joined_NF, candidate_dense_NC[at]).cpu().numpy()
        return out_ND

    def lookup(self, sparse_NW: np.ndarray, dense_ND: np.ndarray) -> torch.Tensor:
        """(n, F) float32: pooled embeddings, an unknown id as its learned vector, then the dense features."""
        features, width = self._model.video_features, self._model.config.embedding_dim
        joined_NF = torch.empty(len(sparse_NW), features.width, device=self._device)
        rows_NW = torch.from_numpy(np.array(sparse_NW, np.int64))
        for position, name in enumerate(self._names):
            part = joined_NF[:, position * width : (position + 1) * width]
            self._pool(name, rows_NW[:, self._columns.slice(name)], part)
        joined_NF[:, len(self._names) * width :] = torch.from_numpy(np.array(dense_ND[:, : features.dense], np.float32))
        return joined_NF

    def dense(self, joined_NF: torch.Tensor, candidate_dense_NC: np.ndarray) -> torch.Tensor:
        """(n, D) float32: the MLP's direction, the prior of the instant, placed as unit vectors."""
        model = self._model
        unit_NE = functional.normalize(model.video_mlp(joined_NF), dim=-1)
        prior_N = model.prior(torch.from_numpy(np.array(candidate_dense_NC, np.float32)).to(self._device))
        return model.place_videos(unit_NE, prior_N)

    def _pool(self, name: str, rows_NS: torch.Tensor, part_NE: torch.Tensor) -> None:
        """Mean over the present slots (-1 is absent) of a feature, into `part_NE`."""
        table = self._tables[name]
        if rows_NS.shape[1] == 1 and bool((rows_NS >= 0).all()):
            only_content = name in self._unknown and bool((rows_NS == 0).all())
            rows_N = rows_NS[:, 0].to(self._device)
            if name not in self._unknown:
                part_NE.copy_(table[rows_N])
            elif only_content:
                part_NE.copy_(self._unknown[name])
            else:
                part_NE.copy_(torch.where((rows_N > 0).unsqueeze(1), table[rows_N], self._unknown[name]))
            return
        rows_NS = rows_NS.to(self._device)
        present_NS = rows_NS >= 0
        weight_NS = present_NS / present_NS.sum(dim=1, keepdim=True).clamp(min=1)
        part_NE.copy_(functional.embedding_bag(rows_NS.clamp(min=0), table, mode="sum", per_sample_weights=weight_NS))
