"""Twenty steps of both models at a fixed seed give the losses that are kept, to 1e-6, on any x86 processor."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from tests.pipelines.golden.curve import KEPT, STEPS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kept losses are of x86 instructions")
def test_the_first_twenty_losses_of_both_models_are_the_kept_ones():
    kept = json.loads(KEPT.read_text())
    printed = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.golden.curve"], capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr
    found = json.loads(printed.stdout)
    assert kept["losses"].keys() == found["losses"].keys() == {"towers", "ranker"}
    for model, expected in kept["losses"].items():
        assert len(expected) == STEPS + 1, "twenty of training, one of validation"
        assert found["losses"][model] == pytest.approx(expected, rel=0, abs=1e-6), (
            f"{model}; kept with {kept['versions']}, found with {found['versions']}"
        )
