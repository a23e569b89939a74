"""The day after: train on from what is live, on the days that came since, and let ids come and go.

    live bundle's state  +  log to date  ->  examples read by its encoder, with new ids known and cold ones forgotten
                                         ->  its parameters and optimizers, trained on with the new days alone

Only `examples` and training differ from a full run; what they need of each other stands in the examples' folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from features.examples import dates_of, ids_on, parts_of
from features.transforms import Encoder
from pipelines.training.states import StateError, TrainedState
from pipelines.training.train_config import TrainConfig

RECORD = "increment.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class IncrementalConfig:
    """How models are trained on."""

    epochs: int = 1
    """Over the new days."""
    lr_share: float = 0.5
    """Of both learning rates of the full training, held through: what is new must be learnt, what is old kept."""
    keep_ids_days: int = 30
    """A user or video without an impression for so many days becomes unknown again, and its embedding row free. While
    the log is shorter than this, nobody does."""

    def trained_on(self, full: TrainConfig) -> TrainConfig:
        """A full training's configuration as an increment's."""
        return replace(
            full,
            epochs=self.epochs,
            lr_dense=full.lr_dense * self.lr_share,
            lr_sparse=full.lr_sparse * self.lr_share,
            lr_final=1.0,
            warmup_steps=0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """What a run trains on top of what."""

    base: str
    """Version of the bundle whose state it begins from."""
    dates: tuple[str, ...]
    """Trained on now."""
    dates_before: tuple[str, ...]
    """Trained on by what it begins from."""
    renewed: Mapping[str, np.ndarray]
    """Embedding rows that change hands, by SIDE.FEATURE."""

    def save(self, folder: Path) -> None:
        """Write into the examples' folder."""
        for name, rows in self.renewed.items():
            np.save(folder / f"renewed_{name}.npy", rows, allow_pickle=False)
        fields = {"base": self.base, "dates": self.dates, "dates_before": self.dates_before}
        (folder / RECORD).write_text(json.dumps({**fields, "renewed": sorted(self.renewed)}, indent=1))

    @staticmethod
    def made(folder: Path) -> bool:
        """Whether the examples in the folder are an increment's, not those of a full training."""
        return (folder / RECORD).exists()

    @classmethod
    def load(cls, folder: Path) -> Increment | None:
        """What `save` wrote; None where the examples are those of a full training."""
        if not cls.made(folder):
            return None
        written = json.loads((folder / RECORD).read_text())
        return cls(
            base=written["base"],
            dates=tuple(written["dates"]),
            dates_before=tuple(written["dates_before"]),
            renewed={name: np.load(folder / f"renewed_{name}.npy") for name in written["renewed"]},
        )


def new_dates(since: str, training: tuple[str, ...], state: TrainedState) -> tuple[str, ...]:
    """Those of the training days from `since` on; raises StateError where there are none, or one was trained on."""
    dates = tuple(date for date in training if date >= since)
    if again := [date for date in dates if date in state.dates]:
        untrained = [date for date in training if date not in state.dates]
        cure = f"give --since {untrained[0]}" if untrained else "there is no later training day in the log yet"
        raise StateError(f"bundle {state.version} was trained on {', '.join(again)} already: {cure}")
    if not dates:
        raise StateError(
            f"no training day from {since} on: the log's end at {training[-1]}, later days are held out for validation "
            "and test"
        )
    return dates


def carried_on(
    encoder: Encoder, tables: Mapping[str, Any], *, dates: tuple[str, ...], keep_ids_days: int
) -> tuple[Encoder, dict[str, np.ndarray]]:
    """The encoder for models that are trained on with `dates`, and the embedding rows that change hands: see
    `Encoder.carried_on`. `tables`: the log to date, by the names of `Dataset.build`."""
    users, videos, parts = tables["users"], tables["videos"], parts_of(tables["events"])
    days = dates_of(parts)
    seen_users, seen_videos = ids_on(parts, dates)
    if len(days) < keep_ids_days:
        recent_users, recent_videos = users["user_id"].to_numpy(), videos["video_id"].to_numpy()
    else:
        recent_users, recent_videos = ids_on(parts, days[-keep_ids_days:])
    return encoder.carried_on(
        users,
        videos,
        seen_users=seen_users,
        seen_videos=seen_videos,
        recent_users=recent_users,
        recent_videos=recent_videos,
    )


def require_same_model(state: TrainedState, name: str, wanted: Mapping[str, object]) -> None:
    """Raises StateError when the recipe's model is another than the one to be trained on. `wanted`: its configuration
    as it is exported."""
    found = json.loads((state.exported(name) / f"{name}.json").read_text())["config"]
    wanted = json.loads(json.dumps(wanted))
    if differ := sorted(field for field in {**found, **wanted} if found.get(field) != wanted.get(field)):
        raise StateError(
            f"the recipe's {name} differ from those of bundle {state.version} in {', '.join(differ)}: an increment "
            "trains the same model on; run once without --since"
        )
