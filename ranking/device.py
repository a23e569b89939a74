"""The frozen ranker on an accelerator: tables and weights in its memory, one request padded to one of a few sizes.

K candidates, U videos, L history. A size is captured once (`Capture`) and replayed from then on, so that a request
costs one copy in, one launch and one copy out. This module knows torch devices and no vendor; `ranking.cuda` brings the
capture of one, and another accelerator brings its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch

from features.inputs import Inputs
from ranking.frozen import FrozenRanker, Request, Shape, fold
from ranking.infer import Engine, Ranker
from ranking.products import TOLERANCE, DenseType
from ranking.requests import Places, Slots, read_slots, to_tensors
from ranking.tables import ExportedTables, Tables

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Replay]
"""Takes a computation on fixed tensors, gives what repeats it on their contents of the moment."""
SIZES = (128, 256, 512, 1024, 2048)
"""Candidates a request is padded to."""


class _Captured(NamedTuple):
    """Tensors on the device that a replay reads, and the replay."""

    given: dict[str, torch.Tensor]
    replay: Replay


class DeviceScorer:
    """Computes on one device; callers wait for each other."""

    def __init__(self, ranker: Ranker, device: torch.device, dense: DenseType, capture: Capture) -> None:
        self._net, self._device, self._capture = FrozenRanker(Shape.of(ranker.config, ranker.sizes)), device, capture
        weights = fold(ranker.dense, ranker.config, ranker.sizes, dense)
        self._weights = {name: weight.to(device) for name, weight in weights.items()}
        self._tables = {side: _moved(tables, device) for side, tables in ranker.tables.items()}
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._lock = threading.Lock()

    def logits(self, inputs: Inputs, places: Places) -> np.ndarray:
        """(B, K, T + 1) float32, the logit of the watch-time quantile last."""
        slots = {side: read_slots(inputs, side, tables.layout) for side, tables in self._tables.items()}
        given = to_tensors(inputs, places) | {f"{side}_slots": found.rows for side, found in slots.items()}
        n_requests, n_candidates = places.shape
        with torch.inference_mode(), self._lock:
            if n_requests > 1 or n_candidates > SIZES[-1]:
                return self._compute({name: t.to(self._device) for name, t in given.items()}, slots).cpu().numpy()
            size = next(size for size in SIZES if size >= n_candidates)
            captured = self._captured_for(size, given, slots)
            for name, tensor in given.items():
                _copy_in(captured.given[name], tensor)
            return captured.replay()[:, :n_candidates].cpu().numpy()

    def _captured_for(self, size: int, given: dict[str, torch.Tensor], slots: dict[str, Slots]) -> _Captured:
        length = given["history_BL"].shape[1]
        key = (size, length, *slots["user"].widths, *slots["video"].widths)
        if key not in self._captured:
            most = {"video_slots": 1 + length + size, "video_dense_UD": 1 + length + size}
            fixed = {}
            for name, tensor in given.items():
                shape = list(tensor.shape)
                if name in most:
                    shape[0] = most[name]
                elif name in ("candidate_BM", "candidate_dense_BMC"):
                    shape[1] = size
                fixed[name] = torch.zeros(shape, dtype=tensor.dtype, device=self._device)
            self._captured[key] = _Captured(fixed, self._capture(lambda: self._compute(fixed, slots)))
        return self._captured[key]

    def _compute(self, given: dict[str, torch.Tensor], slots: dict[str, Slots]) -> torch.Tensor:
        looked_up = {
            f"{side}_{axis}E": self._tables[side].pooled(given[f"{side}_slots"], slots[side].widths)
            for side, axis in (("user", "B"), ("video", "U"))
        }
        fields = {name: tensor for name, tensor in given.items() if not name.endswith("_slots")}
        return self._net(self._weights, tuple(Request(**fields, **looked_up)))


def _moved(tables: Tables | ExportedTables, device: torch.device) -> Tables:
    if isinstance(tables, ExportedTables):
        raise ValueError("an accelerator scores a frozen ranker, not what training exported: freeze it first")
    return Tables(tables.layout, tables.block, device)


def capture_of(device: torch.device) -> Capture:
    """Of the module `ranking.TYPE`, TYPE being torch's word for the device; without it kernels are launched singly."""
    try:
        return import_module(f"ranking.{device.type}").capture
    except ModuleNotFoundError:
        return lambda compute: compute


def device_engine(ranker: Ranker, device: torch.device, dense: DenseType, capture: Capture) -> Engine:
    """For `Ranker.accelerate`, which compares it with plain float32 on the CPU first."""
    return Engine(f"{device} {dense}", DeviceScorer(ranker, device, dense, capture).logits, TOLERANCE[dense])


def _copy_in(fixed: torch.Tensor, tensor: torch.Tensor) -> None:
    """Into the corner; what a longer request left beyond it is never referred to, but must not be read as ids."""
    corner = fixed[tuple(slice(0, n) for n in tensor.shape)]
    corner.copy_(tensor, non_blocking=True)
