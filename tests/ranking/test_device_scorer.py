"""The accelerator's scorer on the CPU, where a capture is the computation itself: padding changes no answer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ranking
from ranking.device import SIZES, device_engine
from ranking.freeze import freeze
from ranking.infer import Ranker

from .test_scorer import asked, exported, of_ranker, strange


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_requests_of_every_size_answer_as_the_plain_scorer(precision: str, tmp_path: Path) -> None:
    exported(tmp_path / "trained")
    freeze(tmp_path / "trained", tmp_path / "frozen", precision)  # pyright: ignore[reportArgumentType]
    ranker, captured = Ranker.load(tmp_path / "frozen"), []

    def capture(compute):
        captured.append(compute)
        return compute

    engine = device_engine(ranker, torch.device("cpu"), "fp32", capture)
    # A long request first: what it leaves in the buffers must not reach the shorter ones.
    requests = [
        asked(2_048),
        asked(1_030),
        asked(3),
        asked(128),
        strange(asked(1)),
        asked(129),
        asked(2_500),
        asked(4, 9),
    ]
    for inputs in requests:
        logits_NT, watch_N = ranker.logits(inputs, by=engine)
        found = np.concatenate([logits_NT, watch_N[:, None]], axis=1)
        np.testing.assert_allclose(found, of_ranker(ranker, inputs), atol=2e-5)
    assert len(captured) == 3  # 2,048, 128 and 256; those of 2,500 and of two users are computed without


def test_an_accelerator_takes_over_once_it_agrees(tmp_path: Path) -> None:
    exported(tmp_path / "trained")
    freeze(tmp_path / "trained", tmp_path / "frozen", "int8")
    ranker = Ranker.load(tmp_path / "frozen")
    ranker.accelerate(device_engine(ranker, torch.device("cpu"), "bf16", lambda compute: compute))
    assert ranker.engine == "cpu bf16"
    assert tuple(sorted(SIZES)) == SIZES


def test_one_module_alone_names_a_vendor() -> None:
    folder = Path(ranking.__file__).parent
    named = {path.name for path in folder.glob("*.py") if re.search(r"torch\.cuda|[Cc]udart|nvidia", path.read_text())}
    assert named == {"cuda.py"}
