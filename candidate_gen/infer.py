"""The frozen towers: float32, eager, read-only and therefore safe to call from many threads.

n videos, B users, D width of the vectors, E = D - 2 of the towers, C features of (video, instant). The vectors come
from the very modules that were trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from candidate_gen.bulk import BulkVideoTower
from candidate_gen.model import TowerConfig, TowerSizes, TowersModel
from candidate_gen.train import FORMAT
from features.batch import to_batch
from features.entities import Entities, SparseColumns
from features.inputs import Inputs


class Towers:
    """Vectors of videos and users; nothing in it changes after loading."""

    def __init__(self, model: TowersModel) -> None:
        self._model = model.eval().requires_grad_(False)
        self._device = next(model.parameters()).device
        self.dim = model.config.dim

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Towers:
        """Read `towers.json` and `towers.safetensors` onto a device of torch; raises ValueError when they do not belong
        together."""
        described = _read_json(folder / "towers.json")
        model = TowersModel(described["config"], described["sizes"])
        path = folder / "towers.safetensors"
        try:
            model.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit towers.json beside it: {error}; export the towers again") from error
        return cls(model.to(device))

    def video_vectors(self, videos: Entities, rows: np.ndarray, candidate_dense_NC: np.ndarray) -> np.ndarray:
        """(n, D) float32, L2-normalised, as of the instant that `candidate_dense_NC` (`train.features_at`) describes;
        call it chunk by chunk for a large catalogue."""
        return self.embed(videos.columns, videos.sparse[rows], videos.dense[rows], candidate_dense_NC)

    def embed(
        self, columns: SparseColumns, sparse_NW: np.ndarray, dense_ND: np.ndarray, candidate_dense_NC: np.ndarray
    ) -> np.ndarray:
        """`video_vectors` of encoded videos that are in no `Entities`: their sparse slots and dense features."""
        self._check(columns, self._model.sizes.video_tables, "video")
        wanted = (len(sparse_NW), self._model.sizes.candidate_dense)
        if candidate_dense_NC.shape != wanted:
            raise ValueError(
                f"candidate_dense_NC has shape {candidate_dense_NC.shape}, these towers want {wanted}: "
                "one row a video, counters and age as candidate_gen.train.features_at gives them"
            )
        return BulkVideoTower(self._model, columns)(sparse_NW, dense_ND, candidate_dense_NC)

    def user_vectors(self, inputs: Inputs) -> np.ndarray:
        """(B, D) float32, L2-normalised: each user after the last event of the history, at the request's time."""
        self._check(inputs.user_columns, self._model.sizes.user_tables, "user")
        self._check(inputs.video_columns, self._model.sizes.video_tables, "video")
        n = len(inputs.history_length_B)
        if n == 0:
            return np.zeros((0, self.dim), np.float32)
        batch = to_batch(inputs).to(self._device)
        owner_B, position_B = torch.arange(n, device=self._device), batch.history_length_B
        with torch.inference_mode():
            video_UE = self._model.encode_videos(batch.video, batch.video_dense_UD)
            user_BE = self._model.encode_users(batch, video_UE, owner_B, position_B, batch.surface_B)
            return self._model.place_users(user_BE).cpu().numpy()

    def _check(self, columns: SparseColumns, tables: tuple[tuple[str, int], ...], side: str) -> None:
        found = tuple(zip(columns.names, columns.table_rows, strict=True))
        if found != tables:
            raise ValueError(
                f"{side} features {found} are not those the towers were trained on, {tables}: "
                "use the encoder from the towers' own bundle"
            )


def _read_json(path: Path) -> dict:
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']}, this release reads {FORMAT}")
        config = TowerConfig(**{**described["config"], "positives": tuple(described["config"]["positives"])})
        sizes = dict(described["sizes"])
        for side in ("user_tables", "video_tables"):
            sizes[side] = tuple((name, rows) for name, rows in sizes[side])
        sizes["id_features"] = tuple(sizes["id_features"])
        return {"config": config, "sizes": TowerSizes(**sizes)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe towers: {error!r}; export the towers again") from error
