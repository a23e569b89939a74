"""A corpus of a few thousand clustered vectors, in shards of unequal size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

DIM = 16


def unit(vector_ND: np.ndarray) -> np.ndarray:
    return (vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng()
    centre_CD = generator.standard_normal((50, DIM))
    for number, rows in enumerate((1_500, 700, 1_800)):
        vector_ND = unit(centre_CD[generator.integers(50, size=rows)] + 0.5 * generator.standard_normal((rows, DIM)))
        np.save(folder / f"videos-{number:05d}.npy", vector_ND.astype(np.float16))
    for name in ("queries", "train_queries"):
        np.save(folder / f"{name}.npy", unit(centre_CD[:40] + generator.standard_normal((40, DIM))))
    return folder
