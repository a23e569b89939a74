"""The towers' training task: windows of users' logs, each with a target wherever a positive impression came next.

A unit is a window W: at most L events and the positives that follow some of them. B windows a batch, N targets,
X uniform negatives (or the whole catalogue), G days, C features of (video, instant). One pass of the history encoder
serves every target of its window:

    log of one user    a  b  c  d  e  f        positives: c f
    window             a  b  c  d  e           c is predicted from position 2 (after a b), f from 5
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from candidate_gen.frequency import DayShare, StreamingShare
from candidate_gen.model import TowerConfig, TowerSizes, TowersModel
from features.dataset import Dataset
from features.inputs import Collated, UserRows, age_features, assemble
from features.schema import SIGNALS

FORMAT = 3
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
        self._train = cut_windows(dataset, config, train)
        self._validation = cut_windows(dataset, config, validation)
        frequencies = StreamingShare if config.frequencies == "streaming" else DayShare
        self._frequencies = frequencies.of(dataset, np.concatenate([train, validation]))
        eligible = np.flatnonzero(dataset.eligible)
        self._negatives = eligible[np.argsort(dataset.upload_ts_ms[eligible], kind="stable")]
        self._uploads_ms = np.asarray(dataset.upload_ts_ms[self._negatives])
        self._view_ms = view_instants(dataset)
        self.exact = 0 < len(eligible) <= config.full_softmax_up_to
        self._catalogue_dense: dict[int, np.ndarray] = {}

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
        video_row_N, day_N = e.video_row[rows_N], e.day[rows_N]
        extra_rows_X, columns = self._exact(rows_N) if self.exact else self._sampled(rows_N, seed)
        inputs = assemble(
            user=UserRows.take(data.users, user_row_B),
            user_counters_BC=np.zeros((len(end_B), 0), np.float32),
            surface_B=np.zeros(len(end_B), np.int64),
            now_ms_B=e.ts_ms[rows_N[np.cumsum(count_B) - 1]],  # a window ends where its last target asks
            history=history,
            videos=data.videos,
            candidate_rows_N=video_row_N,
            owner_N=owner_N,
            candidate_counters_NC=np.zeros((len(rows_N), 0), np.float32),
            candidate_upload_ts_ms_N=data.upload_ts_ms[video_row_N],
            slot_N=np.zeros(len(rows_N), np.int64),
            extra_rows_X=extra_rows_X,
        )
        position_N = e.history_end[rows_N] - (end_B - history.length_B)[owner_N]
        # Age and counters as the index of the target's day has them, which is made once, at the day's first instant.
        at_view_NC = features_at(data, video_row_N, day_N, self._view_ms[day_N])
        targets = {"position_N": position_N, "surface_N": e.surface[rows_N], **columns}
        return Collated(replace(inputs, candidate_dense_NC=at_view_NC), targets)

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

    def _exact(self, rows_N: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(all eligible videos by upload time (X,), what the exact softmax reads of them at the targets' instants)."""
        e, catalogue_X = self.dataset.examples, self._negatives
        days, day_N = np.unique(e.day[rows_N], return_inverse=True)
        for day in set(days.tolist()) - self._catalogue_dense.keys():
            self._catalogue_dense[day] = features_at(self.dataset, catalogue_X, day, self._view_ms[day])
        return catalogue_X, {
            "catalogue_dense_GXC": np.stack([self._catalogue_dense[day] for day in days.tolist()]),
            "day_N": day_N,
            "uploaded_N": self._uploaded(e.ts_ms[rows_N]),
        }

    def _sampled(self, rows_N: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(uniform negatives (X,), what the sampled softmax reads of them and of how often columns are drawn)."""
        e, n = self.dataset.examples, len(rows_N)
        video_row_N, day_N, ts_ms_N = e.video_row[rows_N], e.day[rows_N], e.ts_ms[rows_N]
        negatives_X, like_X = self._draw_negatives(ts_ms_N, seed)
        day_X, n_uniform = day_N[like_X], len(like_X)
        return negatives_X, {
            "log_draws_N": self._log_draws(video_row_N, day_N, ts_ms_N, n, n_uniform),
            "log_draws_X": self._log_draws(negatives_X, day_X, ts_ms_N[like_X], n, n_uniform),
            "extra_dense_XC": features_at(self.dataset, negatives_X, day_X, self._view_ms[day_X]),
        }

    def _draw_negatives(self, ts_ms_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(video rows (X,), target (X,) whose instant each is drawn for), among what was uploaded by that instant."""
        rng = np.random.default_rng(seed)
        wanted = round(self.config.uniform_ratio * len(ts_ms_N)) if len(self._negatives) else 0
        like_X = rng.integers(0, len(ts_ms_N), wanted)
        return self._negatives[rng.integers(0, self._uploaded(ts_ms_N[like_X]))], like_X

    def _uploaded(self, ts_ms_M: np.ndarray) -> np.ndarray:
        """(M,) int64: how many eligible videos there were at these instants, at least 1."""
        return np.maximum(np.searchsorted(self._uploads_ms, ts_ms_M, side="right"), 1)

    def _log_draws(
        self, row_M: np.ndarray, day_M: np.ndarray, ts_ms_M: np.ndarray, n_positives: int, n_uniform: int
    ) -> np.ndarray:
        """Log of how often a video is expected among the draws of a batch at its instant (M,) float32."""
        in_batch_M = n_positives * self._frequencies.share(row_M, day_M, ts_ms_M)
        return np.log(n_uniform / self._uploaded(ts_ms_M) + in_batch_M).astype(np.float32)


def features_at(
    dataset: Dataset, rows_M: np.ndarray, day_M: np.ndarray | int, now_ms_M: np.ndarray | int
) -> np.ndarray:
    """(M, C) float32: what the prior reads of a video at an instant; columns as `Inputs.candidate_dense_NC`.

    Counters are those of the day's view (days before it), age counts to the instant; not uploaded yet is age 0."""
    counters_MC = dataset.counters.video(np.broadcast_to(day_M, rows_M.shape), rows_M)
    return np.concatenate([counters_MC, age_features(np.asarray(now_ms_M), dataset.upload_ts_ms[rows_M])], axis=1)


def view_instants(dataset: Dataset) -> np.ndarray:
    """(days + 1,) int64: when each view of the counters begins to serve: the day's first impression; last, the end."""
    ts_ms, day = dataset.examples.ts_ms, dataset.examples.day
    first_ms = np.full(len(dataset.dates) + 1, ts_ms.max() + 1, np.int64)
    np.minimum.at(first_ms, day, ts_ms)
    return first_ms


def index_instant(dataset: Dataset, test_dates: tuple[str, ...]) -> tuple[int, int]:
    """(day, now_ms) at which videos are embedded.

    To be evaluated on test days: their first instant and the counters as of its day, so that nothing they add is
    seen. To be published, with no test days: the end of the log and the last view."""
    day = dataset.dates.index(min(test_dates)) if test_dates else len(dataset.dates)
    return day, int(view_instants(dataset)[day])


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
