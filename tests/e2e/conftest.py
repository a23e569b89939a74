"""One run of the demo at its smallest, shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.demo import run_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    run_demo("tiny", folder)
    return folder
