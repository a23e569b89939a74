"""The towers' training task: windows of users' logs, each with a target wherever a positive impression came next.

A unit is a window W: at most L events and the positives that follow some of them. B windows a batch, N targets,
X uniform negatives. One pass of the history encoder serves every target of its window:

    log of one user    a  b  c  d  e  f        positives: c f
    window             a  b  c  d  e           c is predicted from position 2 (after a b), f from 5
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from candidate_gen.model import TowerConfig, TowerSizes, TowersModel
from features.dataset import Dataset
from features.history import gap_bucket
from features.inputs import Collated, UserRows, assemble
from features.schema import SIGNALS

FORMAT = 1
"""Version of towers.json; raised when an older reader would go wrong."""


@dataclass(frozen=True, slots=True)
class Windows:
    """W windows; window w predicts the examples target[start[w]:start[w+1]]."""

    user_row: np.ndarray
    end: np.ndarray
    """(W,) position in the history log one past the window's last event; the window holds the L events before."""
    start: np.ndarray
    """(W+1,) offsets into `target`."""
    target: np.ndarray
    """Examples (rows of `Dataset.examples`), by user and time."""


class TowersTask:
    """What the trainer needs to know about the towers."""

    name = "towers"

    def __init__(
        self, dataset: Dataset, config: TowerConfig, train_dates: tuple[str, ...], validation_dates: tuple[str, ...]
    ) -> None:
        self.dataset, self.config = dataset, config
        train = target_examples(dataset, config, train_dates)
        if not len(train):
            raise ValueError(
                f"no impression on {train_dates} has any of {config.positives}: nothing to train towers on"
            )
        validation = target_examples(dataset, config, validation_dates)
        examples = dataset.examples
        self._train = cut_windows(dataset, config, train)
        self._validation = cut_windows(dataset, config, validation)
        self._positives = np.bincount(examples.video_row[train], minlength=len(dataset.videos) + 1)
        known = dataset.upload_ts_ms <= examples.ts_ms[train].max()
        self._negatives = np.flatnonzero(dataset.eligible & known)

    def build(self) -> torch.nn.Module:
        """Fresh towers; the caller seeds torch."""
        return TowersModel(self.config, TowerSizes.of(self.dataset))

    def train_units(self) -> np.ndarray:
        """Windows with targets on the training dates."""
        return np.arange(len(self._train.end))

    def validation_units(self) -> np.ndarray:
        """Windows with targets on the validation dates, numbered after the training windows."""
        return len(self._train.end) + np.arange(len(self._validation.end))

    def collate(self, units: np.ndarray, *, seed: int) -> Collated:
        """One batch of windows; the seed draws its uniform negatives."""
        n_train = len(self._train.end)
        parts = [_take(self._train, units[units < n_train]), _take(self._validation, units[units >= n_train] - n_train)]
        user_row_B, end_B, count_B, rows_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        owner_N = np.repeat(np.arange(len(end_B)), count_B)
        e, data = self.dataset.examples, self.dataset
        history = data.history.windows(user_row_B, end_B, data.encoder.spec.history_length)
        position_N = e.history_end[rows_N] - (end_B - history.length_B)[owner_N]
        last_ms_N = history.ts_ms_BL[owner_N, np.maximum(position_N - 1, 0)]
        video_row_N, ts_ms_N = e.video_row[rows_N], e.ts_ms[rows_N]
        negatives_X = self._draw_negatives(seed)
        inputs = assemble(
            user=UserRows.take(data.users, user_row_B),
            user_counters_BC=np.zeros((len(end_B), 0), np.float32),
            surface_B=np.zeros(len(end_B), np.int64),
            now_ms_B=np.zeros(len(end_B), np.int64),
            history=history,
            videos=data.videos,
            candidate_rows_N=video_row_N,
            owner_N=owner_N,
            candidate_counters_NC=np.zeros((len(rows_N), 0), np.float32),
            candidate_upload_ts_ms_N=data.upload_ts_ms[video_row_N],
            slot_N=np.zeros(len(rows_N), np.int64),
            extra_rows_X=negatives_X,
        )
        targets = {
            "position_N": position_N,
            "surface_N": e.surface[rows_N],
            "gap_N": gap_bucket(ts_ms_N, last_ms_N, position_N > 0),
            "log_draws_N": self._log_draws(video_row_N, len(rows_N)),
            "log_draws_X": self._log_draws(negatives_X, len(rows_N)),
        }
        return Collated(inputs, targets)

    def export(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `towers.safetensors` and `towers.json` from the full, unsharded state."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / "towers.safetensors")
        described = {
            "format": FORMAT,
            "config": asdict(self.config),
            "sizes": asdict(TowerSizes.of(self.dataset)),
            "spec": self.dataset.encoder.spec.fingerprint(),
        }
        (folder / "towers.json").write_text(json.dumps(described, indent=2, sort_keys=True))

    def _draw_negatives(self, seed: int) -> np.ndarray:
        wanted = min(self.config.uniform_negatives, len(self._negatives))
        return np.random.default_rng(seed).choice(self._negatives, wanted, replace=False, shuffle=False)

    def _log_draws(self, video_row_M: np.ndarray, n_positives: int) -> np.ndarray:
        """Log of how often a video is expected among a batch's negatives, both pools together (M,) float32."""
        total = self._positives.sum()
        draws_M = np.full(len(video_row_M), min(self.config.uniform_negatives / max(len(self._negatives), 1), 1.0))
        if self.config.in_batch_negatives:
            draws_M += n_positives * self._positives[video_row_M] / total
        never = draws_M == 0  # without uniform negatives, a validation video that training never saw
        return np.log(np.where(never, n_positives / total, draws_M)).astype(np.float32)


def target_examples(dataset: Dataset, config: TowerConfig, dates: tuple[str, ...]) -> np.ndarray:
    """Positive impressions of known users and videos on these dates (rows of `Dataset.examples`)."""
    rows = dataset.rows_on(dates)
    e = dataset.examples
    columns = [SIGNALS.index(signal) for signal in config.positives]
    positive = (np.nan_to_num(e.signals[rows][:, columns]) > 0).any(axis=1)
    return rows[positive & (e.video_row[rows] > 0) & (e.user_row[rows] > 0)]


def cut_windows(dataset: Dataset, config: TowerConfig, target: np.ndarray) -> Windows:
    """Group targets into windows: those whose histories end within the same stride of a user's log share one."""
    e, length = dataset.examples, dataset.encoder.spec.history_length
    target = target[np.lexsort((e.history_end[target], e.user_row[target]))]
    user_row, end = e.user_row[target], e.history_end[target]
    block = (end - dataset.history.user_start[user_row]) // min(config.window_stride, length)
    first = np.flatnonzero(np.diff(user_row, prepend=-1).astype(bool) | np.diff(block, prepend=-1).astype(bool))
    start = np.append(first, len(target))
    return Windows(user_row=user_row[first], end=end[start[1:] - 1], start=start, target=target)


def _take(windows: Windows, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(user rows, ends, targets a window, targets) of the windows `at`."""
    count_B = windows.start[at + 1] - windows.start[at]
    ahead_B = np.cumsum(count_B) - count_B
    offsets = np.arange(count_B.sum()) + np.repeat(windows.start[at] - ahead_B, count_B)
    return windows.user_row[at], windows.end[at], count_B, windows.target[offsets]
