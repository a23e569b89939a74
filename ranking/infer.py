"""The frozen ranker: weights, tables and calibration from a folder, candidates in, probabilities out.

N candidates of B contexts, T tasks. Nothing here learns or keeps state, so threads may share one `Ranker`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file

from features.batch import to_batch
from features.inputs import Inputs
from ranking.calibrate import Calibration
from ranking.model import RankerModel, RankerSizes, config_from
from ranking.value import Scores
from ranking.watch import WatchQuantiles


class Ranker:
    """Scores candidates one by one: what stands beside a candidate never changes its score."""

    def __init__(self, model: RankerModel, watch: WatchQuantiles, calibration: Calibration) -> None:
        self._model = model.eval()
        self._watch = watch
        self._calibration = calibration
        self.tasks = model.sizes.tasks

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `ranker.safetensors`, `ranker.json` and `calibration.json`."""
        for name in ("ranker.safetensors", "ranker.json", "calibration.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; export the ranker again")
        saved = json.loads((folder / "ranker.json").read_text())
        sizes = RankerSizes.from_json(saved["sizes"])
        model = RankerModel(config_from(saved["config"]), sizes, saved["base_rates"], tables_on=torch.device("meta"))
        model.load_state_dict(load_file(folder / "ranker.safetensors"), assign=True)  # mapped, not copied
        calibration = Calibration.load(folder / "calibration.json")
        if calibration.tasks != sizes.tasks:
            raise ValueError(
                f"{folder / 'calibration.json'} is for tasks {calibration.tasks}, the ranker has {sizes.tasks}; "
                "calibrate this ranker again"
            )
        return cls(model, WatchQuantiles.from_json(saved["watch_quantiles"]), calibration)

    def score(self, inputs: Inputs) -> Scores:
        """Calibrated probabilities (N, T) and expected watch time (N,), slot and surface tower off."""
        logits_NT, watch_N = self.logits(inputs)
        quantile_N = 1 / (1 + np.exp(-watch_N.astype(np.float64)))
        return Scores(
            tasks=self.tasks,
            probability_NT=self._calibration.apply(logits_NT),
            watch_ms_N=self._watch.watch_ms(quantile_N, self._watch.durations(inputs)),
        )

    def logits(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Before calibration: logits (N, T), and the logit of the watch-time quantile (N,)."""
        _check_finite(inputs)
        if len(inputs.candidate_N) == 0:
            return np.zeros((0, len(self.tasks)), np.float32), np.zeros(0, np.float32)
        with torch.inference_mode():
            logits_NT, watch_N = self._model.logits(to_batch(inputs))
        if not (torch.isfinite(logits_NT).all() and torch.isfinite(watch_N).all()):
            raise RuntimeError("the ranker gave a score that is not finite from finite inputs: its weights are damaged")
        return logits_NT.numpy(), watch_N.numpy()


def _check_finite(inputs: Inputs) -> None:
    for field in fields(Inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise ValueError(f"ranker input {field.name} is {value[at]} at {at}; every feature must be finite")
