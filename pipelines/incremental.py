"""The day after: train on from the model that is live, on the days that came since, and let ids come and go.

Kept beside the bundle it went into (REGISTRY/training/VERSION/): the encoder, both models' best checkpoints and what
they exported, and the days they were trained on, so that nothing is trained twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from features.dataset import Dataset, ids_on
from features.transforms import Encoder
from pipelines.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class IncrementalConfig:
    """How a model is trained on."""

    epochs: int = 1
    lr_share: float = 0.5
    """Of both learning rates of the full training, held through: what is new must be learnt, what is old kept."""
    keep_ids_days: int = 30
    """A user or video without an impression for so many days becomes unknown, and its embedding row free; while the
    log itself is shorter than this, nobody is."""

    def trained_on(self, full: TrainConfig) -> TrainConfig:
        """The training configuration of an increment."""
        return replace(
            full,
            epochs=self.epochs,
            lr_dense=full.lr_dense * self.lr_share,
            lr_sparse=full.lr_sparse * self.lr_share,
            lr_final=1.0,
            warmup_steps=0,
        )


def carry_on(
    encoder: Encoder,
    *,
    users: pa.Table,
    videos: pa.Table,
    events: pa.Table,
    undated: pa.Table | None,
    follows: pa.Table | None,
    new_dates: tuple[str, ...],
    keep_ids_days: int,
) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Examples of the whole log as a model that trains on reads them, and the embedding rows that change hands (see
    `Encoder.carried_on`). `new_dates`: the days that will be trained on."""
    dates = tuple(sorted(set(events["date"].to_pylist())))
    kept = tuple(dates[-keep_ids_days:])
    everyone = len(dates) < keep_ids_days
    carried, renewed = encoder.carried_on(
        users,
        videos,
        seen_users=ids_on(events, new_dates, "user_id"),
        seen_videos=ids_on(events, new_dates, "video_id"),
        recent_users=users["user_id"].to_numpy() if everyone else ids_on(events, kept, "user_id"),
        recent_videos=videos["video_id"].to_numpy() if everyone else ids_on(events, kept, "video_id"),
    )
    dataset = Dataset.build(
        encoder.spec,
        users=users,
        videos=videos,
        events=events,
        undated=undated,
        follows=follows,
        train_dates=new_dates,
        encoder=carried,
    )
    return dataset, renewed
