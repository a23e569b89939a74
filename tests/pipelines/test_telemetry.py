"""Curves: by step, also over restarts; and no model is lost to its plots."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from pipelines.training.progress import Progress
from pipelines.training.telemetry import TelemetryError, telemetry
from pipelines.training.train_config import TrainConfig
from tests.pipelines.events import curve

PROGRESS = Progress(
    name="ranker",
    epoch=0,
    epochs=2,
    step=5,
    steps=10,
    steps_done=5,
    loss=0.5,
    validation_loss=None,
    metrics={},
    lr_dense=0.01,
    lr_sparse=0.2,
    samples_per_s=100.0,
    input_wait_share=0.25,
    eta_s=1.0,
)


def test_curves_are_by_step_and_a_restart_replaces_what_is_done_again(tmp_path):
    with telemetry("ranker", TrainConfig(), tmp_path, fresh=True) as plot:
        for step, loss in ((5, 0.5), (8, 0.4), (9, 0.3), (6, 0.45), (12, 0.2)):  # a worker died after 9
            plot(replace(PROGRESS, steps_done=step, loss=loss))
        plot(replace(PROGRESS, steps_done=20, validation_loss=0.6, metrics={"normalised_entropy": 0.75}))
    shown = {tag: curve(tmp_path / "tensorboard", tag) for tag in ("train/loss", "validation/normalised_entropy")}
    assert shown["train/loss"] == pytest.approx({5: 0.5, 6: 0.45, 12: 0.2, 20: 0.5})
    assert shown["validation/normalised_entropy"] == {20: 0.75}
    for tag in ("pace/samples_per_s", "pace/input_wait_share", "lr/dense", "lr/sparse"):
        assert curve(tmp_path / "tensorboard", tag).keys() == {5, 6, 12, 20}

    with telemetry("ranker", TrainConfig(), tmp_path, fresh=False) as plot:  # the command again, from a checkpoint
        plot(replace(PROGRESS, steps_done=13, loss=0.19))
    assert curve(tmp_path / "tensorboard", "train/loss") == pytest.approx({5: 0.5, 6: 0.45, 12: 0.2, 13: 0.19})

    with telemetry("ranker", TrainConfig(), tmp_path, fresh=True) as plot:  # another run in the same folder
        plot(PROGRESS)
    assert curve(tmp_path / "tensorboard", "train/loss") == {5: 0.5}


def test_curves_that_cannot_be_written_are_told_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with telemetry("ranker", TrainConfig(), tmp_path, fresh=False) as plot:
        plot(PROGRESS)
        plot(replace(PROGRESS, steps_done=6))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "TensorBoard: curves end at step 5" in told
    assert str(tmp_path / "tensorboard") in told


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="MLflow is installed here")
def test_mlflow_is_imported_only_when_asked_for_and_its_lack_names_the_cure(tmp_path):
    asked = TrainConfig(mlflow="http://127.0.0.1:1")
    with pytest.raises(TelemetryError, match=r"requirements/mlflow\.txt"), telemetry("r", asked, tmp_path, fresh=True):
        pass


def test_the_progress_line_shows_the_last_normalised_entropy():
    assert "normalised" not in PROGRESS.line()
    line = replace(PROGRESS, metrics={"normalised_entropy": 0.9123}).line()
    assert line == ("ranker, epoch 1/2, step 5/10 loss 0.5000 normalised entropy 0.9123 100 samples/s, 1 s left")
