"""A small real training task (two EmbeddingBagCollections and an MLP on a random Dataset) for the trainer's tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor

from features.batch import Batch
from features.dataset import Dataset
from features.entities import SparseColumns
from features.inputs import Collated
from features.schema import EVENTS, LIMITS, SIGNALS, VIDEOS
from features.spec import Categorical, Content, FeatureSpec, MultiValued, Numeric

N_USERS, N_VIDEOS, N_EVENTS = 60, 80, 1200


class ToyModel(nn.Module):
    """Label from user, candidate video and mean of the history."""

    def __init__(self, user: SparseColumns, video: SparseColumns, tables_on: torch.device | None) -> None:
        super().__init__()
        self.user_ebc, self.video_ebc = _collection(user, tables_on), _collection(video, tables_on)
        self.video = nn.Linear(8 * len(video.names), 16)
        self.top = nn.Sequential(nn.Linear(8 * len(user.names) + 32, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, batch: Batch, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        user_BD = _by_name(self.user_ebc(batch.user))
        video_UD = self.video(_by_name(self.video_ebc(batch.video)))
        history_BD = video_UD[batch.history_BL].mean(dim=1)
        x_ND = torch.cat([user_BD[batch.owner_N], video_UD[batch.candidate_N], history_BD[batch.owner_N]], dim=1)
        logit_N = self.top(x_ND).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logit_N, targets["label_B"])
        right = ((logit_N > 0) == (targets["label_B"] > 0.5)).float().mean()
        return {"loss": loss, "accuracy": right}


def _by_name(pooled: KeyedTensor) -> torch.Tensor:
    """Sharded collections give the features in the order of their workers, so order them by name."""
    return torch.cat([pooled[name] for name in sorted(pooled.keys())], dim=1)


def _collection(columns: SparseColumns, tables_on: torch.device | None) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=tables_on,
        tables=[
            EmbeddingBagConfig(name=n, feature_names=[n], num_embeddings=rows, embedding_dim=8)
            for n, rows in zip(columns.names, columns.table_rows, strict=True)
        ],
    )


@dataclass(frozen=True)
class ToyTask:
    """The label is the parity of the video's row."""

    folder: Path
    name: str = "toy"

    def build(self, tables_on: torch.device | None = None) -> nn.Module:
        dataset = Dataset.load(self.folder)
        return ToyModel(dataset.users.columns, dataset.videos.columns, tables_on)

    def train_units(self) -> np.ndarray:
        return np.arange(1000)

    def validation_units(self) -> np.ndarray:
        return np.arange(1000, N_EVENTS)

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int) -> Collated:
        dataset = Dataset.load(self.folder)
        label_B = (dataset.examples.video_row[units] % 2).astype(np.float32)
        return Collated(inputs=dataset.inputs(units), targets={"label_B": label_B})

    def metrics(self, scalars: dict[str, float]) -> dict[str, float]:
        """As the model gives them."""
        return scalars

    def export(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        torch.save(state, folder / "toy.pt")


@pytest.fixture(scope="session")
def toy_task(tmp_path_factory) -> ToyTask:
    folder = tmp_path_factory.mktemp("toy") / "dataset"
    _dataset(np.random.default_rng(0)).save(folder)
    return ToyTask(folder)


def _dataset(rng: np.random.Generator) -> Dataset:
    users = pa.table({"user_id": np.arange(N_USERS) + 2**60, "region": rng.choice(["a", "b"], N_USERS).tolist()})
    videos = pa.table(
        {
            "video_id": np.arange(N_VIDEOS) + 2**58,
            "author_id": rng.integers(0, 10, N_VIDEOS),
            "upload_ts_ms": rng.integers(10**12, 11 * 10**11, N_VIDEOS),
            "duration_ms": rng.integers(5000, 60000, N_VIDEOS),
            "music_id": rng.integers(0, 10, N_VIDEOS),
            "video_type": ["x"] * N_VIDEOS,
            "upload_type": ["y"] * N_VIDEOS,
            "tags": [rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(N_VIDEOS)],
            "content": list(rng.normal(size=(N_VIDEOS, 4)).astype(np.float32)),
            "eligible": [True] * N_VIDEOS,
        }
    ).cast(pa.schema([field for field in VIDEOS if field not in LIMITS]))
    events = {
        "request_id": [str(i) for i in range(N_EVENTS)],
        "user_id": rng.choice(users["user_id"].to_numpy(), N_EVENTS),
        "video_id": rng.choice(videos["video_id"].to_numpy(), N_EVENTS),
        "author_id": pa.nulls(N_EVENTS, pa.int64()),
        "ts_ms": np.sort(rng.integers(11 * 10**11, 11 * 10**11 + 2 * 86_400_000, N_EVENTS)),
        "surface": ["s"] * N_EVENTS,
        "slot": rng.integers(0, 6, N_EVENTS),
        "source": ["a"] * N_EVENTS,
        "connected": [False] * N_EVENTS,
        "policy_id": ["p"] * N_EVENTS,
        "propensity": [0.1] * N_EVENTS,
        "bundle_version": ["v"] * N_EVENTS,
        "watch_ms": rng.integers(0, 60000, N_EVENTS),
        "duration_ms": rng.integers(5000, 60000, N_EVENTS),
    } | {signal: rng.integers(0, 2, N_EVENTS) for signal in SIGNALS}
    table = pa.table(events).cast(EVENTS)
    dates = [str(np.datetime64(int(ts), "ms").astype("datetime64[D]")) for ts in events["ts_ms"]]
    spec = FeatureSpec(
        user=(
            Categorical(name="user_id", column="user_id", rows=100, known_only=True),
            Categorical(name="region", column="region", rows=16),
        ),
        video=(
            Categorical(name="video_id", column="video_id", rows=200, known_only=True),
            Categorical(name="author_id", column="author_id", rows=32),
            MultiValued(name="tags", column="tags", rows=32, max_values=3),
            Numeric(name="duration", column="duration_ms", log=True),
            Content(name="content", column="content", dim=4),
        ),
    )
    return Dataset.build(
        spec,
        users=users,
        videos=videos,
        events=table.append_column("date", pa.array(dates)),
        undated=None,
        train_dates=tuple(sorted(set(dates))),
    )
