"""The reference DLRM (Naumov et al., 2019) at the size training is compared at, as a task of our loop and in pieces.

26 tables of R x 64, one random id each; 13 numbers; bottom 512-256-64, dot interaction, top 512-512-256-1: 4.8 MFLOP a
sample forward and backward. B samples, F = 26 + 1 vectors a sample, D width, R rows a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch

from features.batch import Batch
from features.entities import SparseColumns
from features.inputs import Collated, Inputs

TABLES, DIM, NUMBERS = 26, 64, 13
BOTTOM, TOP = [512, 256, DIM], [512, 512, 256, 1]
NAMES = tuple(f"c{number:02d}" for number in range(TABLES))


def tables(rows: int, device: torch.device | None = None, n_tables: int = TABLES) -> EmbeddingBagCollection:
    """The embedding tables."""
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=name,
                feature_names=[name],
                num_embeddings=rows,
                embedding_dim=DIM,
                weight_init_min=-0.02,
                weight_init_max=0.02,
            )
            for name in NAMES[:n_tables]
        ],
    )


class DensePart(nn.Module):
    """TorchRec's own dense modules: (B, 13) and (B, F-1, D) -> logits (B,)."""

    def __init__(self, n_tables: int = TABLES, *, own_interaction: bool = False) -> None:
        super().__init__()
        self.bottom = DenseArch(NUMBERS, BOTTOM)
        self.interaction = DotInteraction(n_tables) if own_interaction else InteractionArch(n_tables)
        self.top = OverArch(DIM + n_tables * (n_tables + 1) // 2, TOP)

    def forward(self, numbers_BN: torch.Tensor, embedded_BFD: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.top(self.interaction(self.bottom(numbers_BN), embedded_BFD)).squeeze(1)


class DotInteraction(nn.Module):
    """InteractionArch with a gradient of one product: Z Z' is symmetric, so dZ = (G + G') Z."""

    def __init__(self, n_tables: int) -> None:
        super().__init__()
        self.place_P: torch.Tensor
        self.symmetric_FF: torch.Tensor
        n = n_tables + 1
        left, right = torch.triu_indices(n, n, offset=1)
        symmetric = torch.full((n, n), len(left))  # the diagonal reads a zero behind the pairs
        symmetric[left, right] = symmetric[right, left] = torch.arange(len(left))
        self.register_buffer("place_P", left * n + right, persistent=False)
        self.register_buffer("symmetric_FF", symmetric.flatten(), persistent=False)

    def forward(self, dense_BD: torch.Tensor, embedded_BFD: torch.Tensor) -> torch.Tensor:
        """(B, D + F (F - 1) / 2)."""
        z_BFD = torch.cat([dense_BD.unsqueeze(1), embedded_BFD.to(dense_BD.dtype)], dim=1)
        dots_BP = _PairDots.apply(z_BFD, self.place_P, self.symmetric_FF)
        return torch.cat([dense_BD, dots_BP], dim=1)


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_BFD, place_P, symmetric_FF):
        ctx.save_for_backward(z_BFD, symmetric_FF)
        return torch.bmm(z_BFD, z_BFD.transpose(1, 2)).flatten(1).index_select(1, place_P)

    @staticmethod
    def backward(ctx, grad_BP):
        z_BFD, symmetric_FF = ctx.saved_tensors
        n = z_BFD.shape[1]
        padded_BP = nn.functional.pad(grad_BP, (0, 1))
        grad_BFF = padded_BP.index_select(1, symmetric_FF).view(-1, n, n)
        return torch.bmm(grad_BFF, z_BFD), None, None


class Dlrm(nn.Module):
    """Tables and dense part, with a loss, as our loop wants it."""

    def __init__(self, rows: int, n_tables: int, tables_on: torch.device | None, *, own_interaction: bool) -> None:
        super().__init__()
        self.n_tables = n_tables
        self.ebc = tables(rows, tables_on, n_tables)
        self.dense = DensePart(n_tables, own_interaction=own_interaction)

    def forward(self, batch: Batch, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mean cross-entropy."""
        embedded_BFD = self.ebc(batch.user).values().unflatten(1, (self.n_tables, DIM))
        logit_B = self.dense(batch.user_dense_BD, embedded_BFD)
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logit_B.float(), targets["label_B"])}


@dataclass(frozen=True, kw_only=True, slots=True)
class DlrmTask:
    """Random samples, drawn while collating as a log would be read."""

    rows: int
    samples: int
    n_tables: int = TABLES
    own_interaction: bool = True
    name: str = "reference-dlrm"

    def build(self, tables_on: torch.device) -> nn.Module:
        """See `pipelines.training.trainer.Task`."""
        return Dlrm(self.rows, self.n_tables, tables_on, own_interaction=self.own_interaction)

    def train_units(self) -> np.ndarray:
        """Sample numbers."""
        return np.arange(self.samples)

    def validation_units(self) -> np.ndarray:
        """A few: the loop wants some."""
        return np.arange(self.samples, self.samples + 256)

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int) -> Collated:
        """One request a sample, no videos."""
        ids_BF, numbers_BN, label_B = draw(len(units), self.rows, seed, self.n_tables)
        n, columns = (
            len(units),
            SparseColumns(NAMES[: self.n_tables], (1,) * self.n_tables, (self.rows,) * self.n_tables),
        )
        zeros = np.zeros(n, np.int64)
        nothing = np.zeros((n, 0), np.int64)
        inputs = Inputs(
            user_sparse_BW=ids_BF,
            user_dense_BD=numbers_BN,
            user_columns=columns,
            surface_B=zeros,
            now_ms_B=zeros,
            video_row_U=zeros[:1],
            video_sparse_UW=np.zeros((1, 1), np.int32),
            video_dense_UD=np.zeros((1, 0), np.float32),
            video_columns=SparseColumns(("none",), (1,), (1,)),
            history_BL=nothing,
            history_signals_BLS=np.zeros((n, 0, 1), np.float32),
            history_watch_BL=np.zeros((n, 0), np.float32),
            history_ts_ms_BL=nothing,
            history_gap_BL=nothing,
            history_length_B=zeros,
            candidate_N=zeros,
            owner_N=np.arange(n),
            candidate_dense_NC=np.zeros((n, 0), np.float32),
            slot_N=zeros,
            extra_X=zeros[:0],
        )
        return Collated(inputs, {"label_B": label_B})

    def metrics(self, scalars: dict[str, float]) -> dict[str, float]:
        """See `pipelines.training.trainer.Task`."""
        return scalars

    def export(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        """Nothing: nobody scores with random weights."""


def draw(n: int, rows: int, seed: int, n_tables: int = TABLES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uniform ids (n, F) int32, normal numbers (n, 13) float32, labels (n,) float32."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, (n, n_tables), dtype=np.int32)
    return ids, rng.standard_normal((n, NUMBERS), dtype=np.float32), rng.integers(0, 2, n).astype(np.float32)
