"""What is kept for the day after is whole, verified, and does not pile up."""

from __future__ import annotations

import json

import pytest
import torch

from features.dataset import Dataset
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.states import KEPT, StateError, keep_state, open_state
from pipelines.training.trainer import TrainConfig, fit


@pytest.fixture(scope="module")
def training(toy_task, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    for model in ("towers", "ranker"):
        fit(toy_task, TrainConfig(epochs=1, batch_size=64), out_dir=folder / model)
    return folder


@pytest.fixture
def keep(toy_task, training, tmp_path):
    encoder = Dataset.load(toy_task.folder).encoder

    def kept(version, live=None, dates=("2026-01-01",)):
        keep_state(tmp_path, version, training=training, encoder=encoder, dates=dates, live=live)

    return kept


def test_a_kept_state_opens_to_what_was_trained(keep, toy_task, training, tmp_path):
    keep("v1", dates=("2026-01-01", "2026-01-02"))
    state = open_state(tmp_path, "v1")
    assert state.dates == ("2026-01-01", "2026-01-02")
    assert state.encoder.spec == Dataset.load(toy_task.folder).encoder.spec
    best = Checkpoints(training / "towers" / "checkpoints").find("best")
    assert best is not None
    for path in best.iterdir():
        assert (state.checkpoint("towers") / path.name).read_bytes() == path.read_bytes()
    assert json.loads((state.exported("ranker") / "training.json").read_text())["name"] == "toy"


def test_damage_is_told_with_its_file_and_a_missing_state_with_its_cure(keep, tmp_path):
    keep("v1")
    damaged = next((tmp_path / "training" / "v1" / "ranker" / "checkpoint").glob("*.distcp"))
    written = bytearray(damaged.read_bytes())
    written[len(written) // 2] ^= 1
    damaged.unlink()  # it may be a link
    damaged.write_bytes(written)
    with pytest.raises(StateError, match=f"ranker/checkpoint/{damaged.name}"):
        open_state(tmp_path, "v1")
    with pytest.raises(StateError, match="Run once without --since"):
        open_state(tmp_path, "v2")


def test_old_states_go_and_the_live_one_stays(keep, tmp_path):
    for number in range(KEPT + 3):
        keep(f"v{number}", live="v0")
    kept = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert kept == ["v0", *(f"v{number}" for number in range(3, KEPT + 3))]
