"""The reference DLRM of the benchmarks: our loop trains it, and each way to compute it gives TorchRec's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.models.dlrm import InteractionArch

from benchmarks import reference_dlrm
from benchmarks.dlrm import DIM, NUMBERS, TABLES, DlrmTask, DotInteraction
from pipelines.training.trainer import TrainConfig, fit


def test_our_loop_trains_the_reference(tmp_path: Path) -> None:
    task = DlrmTask(rows=50, samples=128, n_tables=3)
    result = fit(task, TrainConfig(epochs=1, batch_size=32, threads=1), out_dir=tmp_path)
    assert result.steps == 4
    assert np.isfinite(result.best_validation_loss)


def test_the_cheaper_interaction_has_torchrecs_values_and_gradients() -> None:
    torch.manual_seed(0)
    found = []
    for module in (InteractionArch(4), DotInteraction(4)):
        torch.manual_seed(1)
        dense_BD, embedded_BFD = torch.randn(6, DIM, requires_grad=True), torch.randn(6, 4, DIM, requires_grad=True)
        out = module(dense_BD, embedded_BFD)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), dense_BD.grad, embedded_BFD.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dense", "off"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.05)])
def test_our_scorers_dense_part_is_torchrecs(dense: str, off: float) -> None:
    model = reference_dlrm.torchrec_model(rows=40)
    rows_NT, numbers_NC = torch.randint(40, (9, TABLES)), torch.randn(9, NUMBERS)
    with torch.no_grad():
        expected = reference_dlrm.eager(model)(numbers_NC, rows_NT)
        tables_NE = reference_dlrm.coded_tables(model).pooled(rows_NT, (1,) * TABLES)
        weights = reference_dlrm.dense_weights(model, dense)  # pyright: ignore[reportArgumentType]
        found = reference_dlrm.DotInteraction()(weights, numbers_NC, tables_NE)
    # Tables are coded: a code is off by half a step of .04 / 255, which the products shrink further.
    assert (found - expected).abs().max() < off + 1e-3
