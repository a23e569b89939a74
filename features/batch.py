"""The one module that builds KeyedJaggedTensors: numpy `Inputs` become the `Batch` both models read.

A KeyedJaggedTensor holds, feature after feature, one bag of rows for each of n entities:

    sparse_NW = [[7  3 -1]        keys     author   tags
                 [2  5  9]]       lengths  1 1      1 2
                                  values   7 2      3  5 9
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.entities import SparseColumns
from features.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one batch; shapes as in `features.inputs.Inputs`, history and candidates refer to positions in U."""

    user: KeyedJaggedTensor
    user_dense_BD: torch.Tensor
    surface_B: torch.Tensor
    now_ms_B: torch.Tensor
    video: KeyedJaggedTensor
    video_row_U: torch.Tensor
    video_dense_UD: torch.Tensor
    history_BL: torch.Tensor
    history_signals_BLS: torch.Tensor
    history_watch_BL: torch.Tensor
    history_ts_ms_BL: torch.Tensor
    history_gap_BL: torch.Tensor
    history_length_B: torch.Tensor
    candidate_N: torch.Tensor
    owner_N: torch.Tensor
    candidate_dense_NC: torch.Tensor
    slot_N: torch.Tensor
    extra_X: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy on the device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def pad_videos(self, n_videos: int) -> Batch:
        """Unknown videos appended, so that all workers embed equally many (TorchRec's table-wise exchange wants one
        batch size); raises ValueError when the batch already has more."""
        has = len(self.video_dense_UD)
        if n_videos < has:
            raise ValueError(f"batch holds {has} distinct videos, more than the {n_videos} it should be padded to")
        if n_videos == has:
            return self
        keys = self.video.keys()
        lengths_FU = self.video.lengths().view(len(keys), has)
        return replace(
            self,
            video=KeyedJaggedTensor(
                keys=keys,
                values=self.video.values(),
                lengths=torch.nn.functional.pad(lengths_FU, (0, n_videos - has)).flatten(),
            ),
            video_dense_UD=torch.nn.functional.pad(self.video_dense_UD, (0, 0, 0, n_videos - has)),
            video_row_U=torch.nn.functional.pad(self.video_row_U, (0, n_videos - has)),
        )


def to_batch(inputs: Inputs) -> Batch:
    """Inputs -> Batch."""
    return Batch(
        user=to_kjt(inputs.user_sparse_BW, inputs.user_columns),
        video=to_kjt(inputs.video_sparse_UW, inputs.video_columns),
        user_dense_BD=_tensor(inputs.user_dense_BD),
        surface_B=_tensor(inputs.surface_B),
        now_ms_B=_tensor(inputs.now_ms_B),
        video_row_U=_tensor(inputs.video_row_U),
        video_dense_UD=_tensor(inputs.video_dense_UD),
        history_BL=_tensor(inputs.history_BL),
        history_signals_BLS=_tensor(inputs.history_signals_BLS),
        history_watch_BL=_tensor(inputs.history_watch_BL),
        history_ts_ms_BL=_tensor(inputs.history_ts_ms_BL),
        history_gap_BL=_tensor(inputs.history_gap_BL),
        history_length_B=_tensor(inputs.history_length_B),
        candidate_N=_tensor(inputs.candidate_N),
        owner_N=_tensor(inputs.owner_N),
        candidate_dense_NC=_tensor(inputs.candidate_dense_NC),
        slot_N=_tensor(inputs.slot_N),
        extra_X=_tensor(inputs.extra_X),
    )


def to_kjt(sparse_NW: np.ndarray, columns: SparseColumns) -> KeyedJaggedTensor:
    """Slots (N, W), -1 for absent -> one bag a feature and row, features in the order of `columns`."""
    lengths, values = [], []
    start = 0
    for width in columns.widths:
        block = sparse_NW[:, start : start + width]
        present = block >= 0
        lengths.append(present.sum(axis=1))
        values.append(block[present])
        start += width
    return KeyedJaggedTensor(
        keys=list(columns.names),
        values=_tensor(np.concatenate(values).astype(np.int64)),
        lengths=_tensor(np.concatenate(lengths).astype(np.int32)),
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
