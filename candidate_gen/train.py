"""The towers' training task: windows of users' logs, each with a target wherever a positive impression came next.

A unit is a window W: at most L events and the positives that follow some of them. B windows a batch, N targets,
X uniform negatives (or the whole catalogue), G days, C features of (video, instant). One pass of the history encoder
serves every target of its window:

    log of one user    a  b  c  d  e  f        positives: c f
    window             a  b  c  d  e           c is predicted from position 2 (after a b), f from 5
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from candidate_gen.frequency import DayShare, StreamingShare
from candidate_gen.model import TowerConfig, TowerSizes, TowersModel
from features.dataset import Dataset
from features.history import UNDATED_TS_MS
from features.inputs import Collated, UserRows, age_features, assemble
from features.schema import SIGNALS

FORMAT = 3
"""Version of towers.json; raised when an older reader would go wrong."""


@dataclass(frozen=True, slots=True)
class Targets:
    """T positive impressions of known users and videos. Those that precede the log, without a time, count as shown
    just before its first instant; they are worth training on: on KuaiRand there are ten for each dated one."""

    user_row: np.ndarray
    video_row: np.ndarray
    history_end: np.ndarray
    """Position in the history log one past the last event before it."""
    asked_ms: np.ndarray
    """When its request was; UNDATED_TS_MS where that is unknown."""
    day: np.ndarray
    """Index into `Dataset.dates`; -1 for the time before the log."""
    surface: np.ndarray

    def __len__(self) -> int:
        return len(self.user_row)

    @classmethod
    def dated(cls, dataset: Dataset, config: TowerConfig, dates: tuple[str, ...]) -> Targets:
        """Those of these dates."""
        e, rows = dataset.examples, dataset.rows_on(dates)
        columns = [SIGNALS.index(signal) for signal in config.positives]
        positive = (np.nan_to_num(e.signals[rows][:, columns]) > 0).any(axis=1)
        at = rows[positive & (e.video_row[rows] > 0) & (e.user_row[rows] > 0)]
        return cls(e.user_row[at], e.video_row[at], e.history_end[at], e.ts_ms[at], e.day[at], e.surface[at])

    @classmethod
    def undated(cls, dataset: Dataset, config: TowerConfig) -> Targets:
        """Those before the log."""
        log = dataset.history
        mask = sum(1 << SIGNALS.index(signal) for signal in config.positives)
        known = (np.asarray(log.ts_ms) == UNDATED_TS_MS) & (np.asarray(log.video_row) > 0)
        at = np.flatnonzero(known & ((np.asarray(log.signals) & mask) > 0))
        user_row = np.searchsorted(log.user_start, at, side="right") - 1
        nothing = np.zeros(len(at), np.int64)
        return cls(user_row, log.video_row[at], at, nothing + UNDATED_TS_MS, nothing - 1, nothing)

    def __add__(self, other: Targets) -> Targets:
        return Targets(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def take(self, at: np.ndarray) -> Targets:
        """The targets at these positions."""
        return Targets(*(getattr(self, f.name)[at] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Windows:
    """W windows; window w predicts the targets start[w] .. start[w+1]."""

    user_row: np.ndarray
    end: np.ndarray
    """(W,) position in the history log one past the window's last event; the window holds the L events before."""
    start: np.ndarray
    """(W+1,) offsets into `targets`."""
    targets: Targets
    """By user and time."""


class TowersTask:
    """What the trainer needs to know about the towers."""

    name = "towers"

    def __init__(
        self,
        dataset: Dataset,
        config: TowerConfig,
        train_dates: tuple[str, ...],
        validation_dates: tuple[str, ...],
        undated: bool = True,
    ) -> None:
        """`undated`: also train on what precedes the log, which towers that are trained on have had."""
        self.dataset, self.config = dataset, config
        train = Targets.dated(dataset, config, train_dates)
        if undated:
            train = Targets.undated(dataset, config) + train
        if not len(train):
            raise ValueError(
                f"no impression on {train_dates} has any of {config.positives}: nothing to train towers on"
            )
        validation = Targets.dated(dataset, config, validation_dates)
        self._train = cut_windows(dataset, config, train)
        self._validation = cut_windows(dataset, config, validation)
        self._view_ms = view_instants(dataset)
        frequencies = StreamingShare if config.frequencies == "streaming" else DayShare
        both = train + validation
        self._frequencies = frequencies.of(both.video_row, both.day, self._instants(both), len(dataset.videos) + 1)
        eligible = np.flatnonzero(dataset.eligible)
        self._negatives = eligible[np.argsort(dataset.upload_ts_ms[eligible], kind="stable")]
        self._uploads_ms = np.asarray(dataset.upload_ts_ms[self._negatives])
        self.exact = 0 < len(eligible) <= config.full_softmax_up_to
        self._catalogue_dense: dict[int, np.ndarray] = {}

    def build(self, tables_on: torch.device | None = None) -> torch.nn.Module:
        """Fresh towers; the caller seeds torch."""
        return TowersModel(self.config, TowerSizes.of(self.dataset), tables_on)

    def train_units(self) -> np.ndarray:
        """Windows with targets on the training dates."""
        return np.arange(len(self._train.end))

    def validation_units(self) -> np.ndarray:
        """Windows with targets on the validation dates, numbered after the training windows."""
        return len(self._train.end) + np.arange(len(self._validation.end))

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int = 0) -> Collated:
        """One batch of windows; the seed draws its uniform negatives."""
        n_train = len(self._train.end)
        parts = [_take(self._train, units[units < n_train]), _take(self._validation, units[units >= n_train] - n_train)]
        user_row_B, end_B, count_B = (np.concatenate(column) for column in list(zip(*parts, strict=True))[:3])
        t = parts[0][3] + parts[1][3]
        owner_N, data = np.repeat(np.arange(len(end_B)), count_B), self.dataset
        history = data.history.windows(user_row_B, end_B, data.encoder.spec.history_length)
        extra_rows_X, columns = self._exact(t) if self.exact else self._sampled(t, seed)
        inputs = assemble(
            user=UserRows.take(data.users, user_row_B),
            user_counters_BC=np.zeros((len(end_B), 0), np.float32),
            surface_B=np.zeros(len(end_B), np.int64),
            now_ms_B=t.asked_ms[np.cumsum(count_B) - 1],  # a window ends where its last target asks
            history=history,
            videos=data.videos,
            candidate_rows_N=t.video_row,
            owner_N=owner_N,
            candidate_counters_NC=np.zeros((len(t), 0), np.float32),
            candidate_upload_ts_ms_N=data.upload_ts_ms[t.video_row],
            slot_N=np.zeros(len(t), np.int64),
            extra_rows_X=extra_rows_X,
        )
        position_N = t.history_end - (end_B - history.length_B)[owner_N]
        targets = {"position_N": position_N, "surface_N": t.surface, **columns}
        at_view_NC = self._features(t.video_row, t.day)
        return Collated(replace(inputs, candidate_dense_NC=at_view_NC), targets)

    def metrics(self, scalars: dict[str, float]) -> dict[str, float]:
        """What the model reports: the share of targets that come first among their negatives."""
        return scalars

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

    def _features(self, rows_M: np.ndarray, day_M: np.ndarray) -> np.ndarray:
        """(M, C) age and counters as the index of the day has them, which is made once, at the day's first instant.
        Before the log, that of its first day, whose counters have counted the undated impressions: these alone count
        towards their own prior, one in as many as their video had."""
        day_M = np.maximum(day_M, 0)
        return features_at(self.dataset, rows_M, day_M, self._view_ms[day_M])

    def _instants(self, t: Targets) -> np.ndarray:
        """(T,) int64."""
        return np.where(t.day < 0, self._view_ms[0] - 1, t.asked_ms)

    def _exact(self, t: Targets) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(all eligible videos by upload time (X,), what the exact softmax reads of them at the targets' instants)."""
        catalogue_X = self._negatives
        days, day_N = np.unique(np.maximum(t.day, 0), return_inverse=True)
        for day in set(days.tolist()) - self._catalogue_dense.keys():
            self._catalogue_dense[day] = self._features(catalogue_X, np.full(len(catalogue_X), day))
        return catalogue_X, {
            "catalogue_dense_GXC": np.stack([self._catalogue_dense[day] for day in days.tolist()]),
            "day_N": day_N,
            "uploaded_N": self._uploaded(self._instants(t)),
        }

    def _sampled(self, t: Targets, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(uniform negatives (X,), what the sampled softmax reads of them and of how often columns are drawn)."""
        instant_N = self._instants(t)
        negatives_X, like_X = self._draw_negatives(instant_N, seed)
        counts = (len(t), len(like_X))
        return negatives_X, {
            "log_draws_N": self._log_draws(t.video_row, t.day, instant_N, *counts),
            "log_draws_X": self._log_draws(negatives_X, t.day[like_X], instant_N[like_X], *counts),
            "extra_dense_XC": self._features(negatives_X, t.day[like_X]),
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


def cut_windows(dataset: Dataset, config: TowerConfig, targets: Targets) -> Windows:
    """Group targets into windows: those whose histories end within the same stride of a user's log share one."""
    length = dataset.encoder.spec.history_length
    targets = targets.take(np.lexsort((targets.history_end, targets.user_row)))
    user_row, end = targets.user_row, targets.history_end
    block = (end - dataset.history.user_start[user_row]) // min(config.window_stride, length)
    first = np.flatnonzero(np.diff(user_row, prepend=-1).astype(bool) | np.diff(block, prepend=-1).astype(bool))
    start = np.append(first, len(targets))
    return Windows(user_row=user_row[first], end=end[start[1:] - 1], start=start, targets=targets)


def _take(windows: Windows, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Targets]:
    """(user rows, ends, targets a window, targets) of the windows `at`."""
    count_B = windows.start[at + 1] - windows.start[at]
    ahead_B = np.cumsum(count_B) - count_B
    offsets = np.arange(count_B.sum()) + np.repeat(windows.start[at] - ahead_B, count_B)
    return windows.user_row[at], windows.end[at], count_B, windows.targets.take(offsets)
