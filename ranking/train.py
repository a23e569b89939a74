"""The ranker as a training task: one example an impression, its labels and its watch-time quantile.

N examples of a batch, T tasks. The training loop is not here: it asks this task for units, batches and an export.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from features.dataset import Dataset
from features.hashing import hash_int64
from features.inputs import Collated, Inputs
from features.spec import Categorical
from ranking.calibrate import Calibration
from ranking.config import RankerConfig, RankerSizes, config_fields
from ranking.infer import Ranker
from ranking.model import RankerModel
from ranking.tasks import TASKS, task_labels
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
        earlier: Path | None = None,
    ) -> None:
        """`earlier`: folder of an exported ranker that is trained on, with these days alone: heads, base rates and
        watch-time quantiles stay its own."""
        self._dataset, self._config = dataset, config
        self._dated_rows = dataset.rows_on(train_dates)
        n_dated = len(dataset.examples)
        with_undated = config.undated and earlier is None  # an earlier one has had them
        self._undated = np.arange(n_dated, n_dated + (len(dataset.undated) if with_undated else 0))
        self._validation_rows = dataset.rows_on(validation_dates)
        if len(self._dated_rows) == 0:
            raise ValueError(f"no impressions on the training dates {train_dates}; the dataset has {dataset.dates}")
        before = None if earlier is None else json.loads((earlier / "ranker.json").read_text())
        self.base_rates = (
            _base_rates(task_labels(dataset.examples.take(self._dated_rows)))
            if before is None
            else {task: before["base_rates"][task] for task in TASKS if task in before["base_rates"]}
        )
        self.tasks = tuple(task for task in TASKS if task in self.base_rates)
        self.dropped_tasks = tuple(task for task in TASKS if task not in self.base_rates)
        if not self.tasks:
            raise ValueError(f"no positive of any task on the training dates {train_dates}: nothing to learn")
        self._units, self._weight = self._drawn(np.concatenate([self._undated, self._dated_rows]))
        self._is_validation = np.zeros(len(self._weight), bool)
        self._is_validation[self._validation_rows] = True
        self._task_columns = [TASKS.index(task) for task in self.tasks]
        self._sizes = RankerSizes.of(dataset, self.tasks, config.leave_out)
        self._watch = self._fit_watch() if before is None else WatchQuantiles.from_json(before["watch_quantiles"])
        self._validation_entropy = self._entropies(self._validation_rows)

    def build(self, tables_on: torch.device | None = None) -> RankerModel:
        """A fresh model; the caller seeds torch."""
        return RankerModel(self._config, self._sizes, self.base_rates, tables_on)

    def train_units(self) -> np.ndarray:
        """Example rows of the training dates; numbers beyond the examples are undated impressions."""
        return self._units

    def validation_units(self) -> np.ndarray:
        """Example rows of the validation dates."""
        return self._validation_rows

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int = 0) -> Collated:
        """Inputs, labels (N, T), watch-time quantiles and weights (N,), dated impressions first. Whose id is dropped in
        training hangs on the impression, or the video, and the seed that all workers of a step have."""
        dataset = self._dataset
        dated = units < len(dataset.examples)
        units = np.concatenate([units[dated], units[~dated]])
        n_dated = np.count_nonzero(dated)
        undated = dataset.undated.take(units[n_dated:] - len(dataset.examples))
        examples = dataset.examples.take(units[:n_dated]) + undated
        inputs = dataset.inputs_of(examples, history=self._config.history, pairs=self._config.counters)
        if self._config.id_dropout and not self._is_validation[units].any():
            inputs = self._without_some_ids(inputs, units, seed_of_all)
        watch_quantile_N = self._watch.quantile(examples.watch_ms, self._watch.durations(inputs))
        labels_NT = task_labels(examples)[:, self._task_columns]
        targets = {"labels_NT": labels_NT, "watch_quantile_N": watch_quantile_N, "weight_N": self._weight[units]}
        return Collated(inputs, {**targets, "unit_N": units})

    def metrics(self, scalars: dict[str, float]) -> dict[str, float]:
        """The losses, and over what a constant rate would lose on the same rows: normalised entropy of each task, and
        of all together. Before calibration."""
        entropy = self._validation_entropy
        losses = {task: scalars[f"loss_{task}"] for task in self.tasks if entropy[task] > 0}
        each = {f"normalised_entropy_{task}": loss / entropy[task] for task, loss in losses.items()}
        together = {"normalised_entropy": sum(losses.values()) / sum(entropy.values())} if losses else {}
        return {**scalars, **together, **each}

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

    def _without_some_ids(self, inputs: Inputs, units_B: np.ndarray, seed: int) -> Inputs:
        spec = self._dataset.encoder.spec
        below = np.uint64(self._config.id_dropout * 2.0**64)
        kept = []
        for features, rows_NW, columns, key_N in (
            (spec.user, inputs.user_sparse_BW, inputs.user_columns, units_B),
            (spec.video, inputs.video_sparse_UW, inputs.video_columns, inputs.video_row_U),
        ):
            rows_NW, dropped_N = rows_NW.copy(), hash_int64(key_N, seed) < below
            for feature in features:
                if isinstance(feature, Categorical) and feature.known_only:
                    rows_NW[dropped_N, columns.slice(feature.name)] = 0
            kept.append(rows_NW)
        return replace(inputs, user_sparse_BW=kept[0], video_sparse_UW=kept[1])

    def _drawn(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All units with a positive signal and the configured share of the others; and for how many impressions each
        unit stands: together for all there were, exactly. Units of the validation dates stand for themselves."""
        examples, undated = self._dataset.examples, self._dataset.undated
        weight = np.ones(len(examples) + len(undated), np.float32)
        if self._config.keep_negatives == 1.0:
            return units, weight
        positive = np.concatenate([(np.nan_to_num(e.signals) > 0).any(axis=1) for e in (examples, undated)])
        negatives = units[~positive[units]]
        kept = max(1, round(self._config.keep_negatives * len(negatives)))
        drawn = np.random.default_rng(len(negatives)).choice(negatives, kept, replace=False)
        weight[drawn] = len(negatives) / kept
        return np.concatenate([units[positive[units]], drawn]), weight

    def _calibrate(self, ranker: Ranker) -> Calibration:
        rows = self._validation_rows
        blocks = np.array_split(rows, max(1, len(rows) // CALIBRATION_ROWS))
        logits_NT = np.concatenate([ranker.logits(self._dataset.inputs(block, with_slot=False))[0] for block in blocks])
        labels_NT = task_labels(self._dataset.examples.take(rows))[:, self._task_columns]
        return Calibration.fit(self.tasks, logits_NT, labels_NT)

    def _entropies(self, rows: np.ndarray) -> dict[str, float]:
        """Of each task's label: nats a row, those included where it was not logged (as `ranking.loss` counts); 0 where
        all labels are equal."""
        labels_NT = task_labels(self._dataset.examples.take(rows))[:, self._task_columns]
        logged_T = (~np.isnan(labels_NT)).sum(axis=0)
        rate_T = np.nansum(labels_NT, axis=0) / np.maximum(logged_T, 1)
        each_T = _entropy(rate_T) * logged_T / max(1, len(rows))
        return dict(zip(self.tasks, each_T.tolist(), strict=True))

    def _fit_watch(self) -> WatchQuantiles:
        rows, examples = self._dated_rows, self._dataset.examples
        duration = DurationColumn.find(self._dataset.encoder)
        dense_ND = np.asarray(self._dataset.videos.dense[examples.video_row[rows]])
        duration_ms_N = np.zeros(len(rows)) if duration is None else duration.duration_ms(dense_ND)
        return WatchQuantiles.fit(np.asarray(examples.watch_ms[rows]), duration_ms_N, duration)


def _entropy(rate_T: np.ndarray) -> np.ndarray:
    """Of a coin, in nats; 0 at the ends."""
    inside_T = np.clip(rate_T, 1e-12, 1 - 1e-12)
    return np.where(
        (rate_T > 0) & (rate_T < 1), -(inside_T * np.log(inside_T) + (1 - inside_T) * np.log1p(-inside_T)), 0.0
    )


def _base_rates(labels_NT: np.ndarray) -> dict[str, float]:
    """Share of positives of each task that has any."""
    logged_T = (~np.isnan(labels_NT)).sum(axis=0)
    positive_T = np.nansum(labels_NT, axis=0)
    return {task: float(positive_T[t] / logged_T[t]) for t, task in enumerate(TASKS) if positive_T[t] > 0}
