"""The ranker as a training task: one example an impression, its labels and its watch-time quantile.

N examples of a batch, T tasks. The training loop is not here: it asks this task for units, batches and an export.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from features.dataset import Dataset
from features.inputs import Collated
from features.schema import SIGNALS
from ranking.calibrate import Calibration
from ranking.infer import Ranker
from ranking.model import RankerConfig, RankerModel, RankerSizes, config_fields
from ranking.watch import DurationColumn, WatchQuantiles

CALIBRATION_ROWS = 2048
"""Rows a batch while calibrating."""


class RankerTask:
    """What the training loop needs to know of the ranker."""

    name = "ranker"

    def __init__(
        self,
        dataset: Dataset,
        config: RankerConfig,
        train_dates: tuple[str, ...],
        validation_dates: tuple[str, ...],
    ) -> None:
        self._dataset, self._config = dataset, config
        self._dated_rows = dataset.rows_on(train_dates)
        n_dated = len(dataset.examples)
        self._undated = np.arange(n_dated, n_dated + (len(dataset.undated) if config.undated else 0))
        self._validation_rows = dataset.rows_on(validation_dates)
        if len(self._dated_rows) == 0:
            raise ValueError(f"no impressions on the training dates {train_dates}; the dataset has {dataset.dates}")
        self.base_rates = _base_rates(np.asarray(dataset.examples.signals[self._dated_rows]))
        self.tasks = tuple(signal for signal in SIGNALS if signal in self.base_rates)
        self.dropped_tasks = tuple(signal for signal in SIGNALS if signal not in self.base_rates)
        if not self.tasks:
            raise ValueError(f"no positive of any signal on the training dates {train_dates}: nothing to learn")
        self._task_columns = [SIGNALS.index(task) for task in self.tasks]
        self._sizes = RankerSizes.of(dataset, self.tasks, config.leave_out)
        self._watch = self._fit_watch()

    def build(self, tables_on: torch.device | None = None) -> RankerModel:
        """A fresh model; the caller seeds torch."""
        return RankerModel(self._config, self._sizes, self.base_rates, tables_on)

    def train_units(self) -> np.ndarray:
        """Example rows of the training dates; numbers beyond the examples are undated impressions."""
        return np.concatenate([self._undated, self._dated_rows])

    def validation_units(self) -> np.ndarray:
        """Example rows of the validation dates."""
        return self._validation_rows

    def collate(self, units: np.ndarray, *, seed: int) -> Collated:
        """Inputs, labels (N, T) and watch-time quantiles (N,), dated impressions first; nothing is drawn, so the seed
        changes nothing."""
        dated = units < len(self._dataset.examples)
        dataset = self._dataset
        examples = dataset.examples.take(units[dated]) + dataset.undated.take(units[~dated] - len(dataset.examples))
        inputs = dataset.inputs_of(examples, history_length=None if self._config.history else 0)
        watch_quantile_N = self._watch.quantile(examples.watch_ms, self._watch.durations(inputs))
        labels_NT = examples.signals[:, self._task_columns]
        unit_N = np.concatenate([units[dated], units[~dated]])
        return Collated(inputs, {"labels_NT": labels_NT, "watch_quantile_N": watch_quantile_N, "unit_N": unit_N})

    def export(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `ranker.safetensors`, `ranker.json`, and `calibration.json` fitted on the validation dates."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "ranker.safetensors")
        description = {
            "config": config_fields(self._config),
            "sizes": asdict(self._sizes),
            "base_rates": self.base_rates,
            "dropped_tasks": self.dropped_tasks,
            "watch_quantiles": self._watch.to_json(),
        }
        (folder / "ranker.json").write_text(json.dumps(description))
        Calibration.identity(self.tasks).save(folder / "calibration.json")
        if len(self._validation_rows):
            self._calibrate(Ranker.load(folder)).save(folder / "calibration.json")

    def _calibrate(self, ranker: Ranker) -> Calibration:
        rows = self._validation_rows
        blocks = np.array_split(rows, max(1, len(rows) // CALIBRATION_ROWS))
        logits_NT = np.concatenate([ranker.logits(self._dataset.inputs(block, with_slot=False))[0] for block in blocks])
        labels_NT = np.asarray(self._dataset.examples.signals[rows])[:, self._task_columns]
        return Calibration.fit(self.tasks, logits_NT, labels_NT)

    def _fit_watch(self) -> WatchQuantiles:
        rows, examples = self._dated_rows, self._dataset.examples
        duration = DurationColumn.find(self._dataset.encoder)
        dense_ND = np.asarray(self._dataset.videos.dense[examples.video_row[rows]])
        duration_ms_N = np.zeros(len(rows)) if duration is None else duration.duration_ms(dense_ND)
        return WatchQuantiles.fit(np.asarray(examples.watch_ms[rows]), duration_ms_N, duration)


def _base_rates(signals_NS: np.ndarray) -> dict[str, float]:
    """Share of positives of each signal that has any."""
    logged_S = (~np.isnan(signals_NS)).sum(axis=0)
    positive_S = np.nansum(signals_NS, axis=0)
    return {signal: float(positive_S[s] / logged_S[s]) for s, signal in enumerate(SIGNALS) if positive_S[s] > 0}
