"""The bulk path of the video tower gives what the trained modules give, whatever a video lacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from candidate_gen.bulk import BLOCK, BulkVideoTower
from candidate_gen.model import TowersModel
from features.batch import to_kjt
from features.entities import SparseColumns


def through_modules(
    model: TowersModel, columns: SparseColumns, sparse: np.ndarray, dense: np.ndarray, candidate: np.ndarray
) -> np.ndarray:
    """The reference: TorchRec's collection on a KeyedJaggedTensor, as in training."""
    with torch.inference_mode():
        vector_NE = model.encode_videos(to_kjt(sparse, columns), torch.from_numpy(dense))
        prior_N = model.prior(torch.from_numpy(candidate))
        return model.place_videos(functional.normalize(vector_NE, dim=-1), prior_N).numpy()


def random_videos(model: TowersModel, columns: SparseColumns, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A third without a known id, tags of 0 to all slots, some without any value of a single-valued feature."""
    rng = np.random.default_rng()
    parts = []
    for width, rows in zip(columns.widths, columns.table_rows, strict=True):
        part = rng.integers(0, rows, (n, width))
        present = np.arange(width) < rng.integers(0 if width > 1 else 1, width + 1, (n, 1))
        parts.append(np.where(present, part, -1))
    sparse = np.concatenate(parts, axis=1).astype(np.int32)
    sparse[rng.random(n) < 1 / 3, 0] = 0
    sparse[rng.random(n) < 1 / 50, 1] = -1
    dense = rng.normal(size=(n, model.sizes.video_dense)).astype(np.float32)
    return sparse, dense, rng.normal(size=(n, model.sizes.candidate_dense)).astype(np.float32)


@pytest.fixture(scope="module")
def model(planted) -> TowersModel:
    """The trained towers with an unknown video that is not the zero it may have stayed."""
    trained = planted.task.build()
    trained.load_state_dict(planted.model.state_dict())
    torch.nn.init.normal_(trained.video_features.unknown["video_id"])
    return trained.eval().requires_grad_(False)


@pytest.mark.parametrize("n", [0, 1, BLOCK + 7])
def test_bulk_vectors_are_those_of_the_trained_modules(model, planted, n: int):
    columns = planted.dataset.videos.columns
    videos = random_videos(model, columns, n)
    got = BulkVideoTower(model, columns)(*videos)
    assert got.shape == (n, model.config.dim)
    if n:
        np.testing.assert_allclose(got, through_modules(model, columns, *videos), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_a_block_of_content_alone_takes_the_short_way_to_the_same_vectors(model, planted):
    columns = planted.dataset.videos.columns
    sparse, dense, candidate = random_videos(model, columns, 500)
    sparse[:, 0] = 0
    got = BulkVideoTower(model, columns)(sparse, dense, candidate)
    np.testing.assert_allclose(got, through_modules(model, columns, sparse, dense, candidate), atol=1e-6)


def test_a_video_has_the_same_vector_in_whatever_company(planted):
    videos, n = planted.dataset.videos, len(planted.dataset.videos)
    candidate = np.random.default_rng().normal(size=(n + 1, planted.model.sizes.candidate_dense)).astype(np.float32)
    together = planted.towers.video_vectors(videos, np.arange(n + 1), candidate)
    for row in (0, 1, n):
        alone = planted.towers.video_vectors(videos, np.array([row]), candidate[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)
