"""A server's scorer: plain at once, compiled when it is there, and plain still when nothing compiles."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from ranking.compiled import best_dense_type, package_path
from ranking.infer import Ranker
from ranking.products import TOLERANCE
from serving.scorer import accelerate
from tests.ranking.test_scorer import asked, exported, of_ranker


def test_the_scorer_is_compiled_once_while_plain_answers(tmp_path: Path) -> None:
    exported(tmp_path / "today")
    cache, ranker, inputs = tmp_path / "cache", Ranker.load(tmp_path / "today"), asked(60)
    compiling = accelerate(ranker, tmp_path / "today", "auto", cache=cache)
    assert compiling is not None
    assert ranker.engine == "plain fp32"
    before = of_ranker(ranker, inputs)
    compiling.join(timeout=240)
    assert ranker.engine == f"compiled {best_dense_type()}"
    assert (np.abs(of_ranker(ranker, inputs) - before) <= 0.05 * (1 + np.abs(before))).all()
    exported(tmp_path / "tomorrow", seed=3)
    tomorrow = Ranker.load(tmp_path / "tomorrow")
    assert accelerate(tomorrow, tmp_path / "tomorrow", "auto", cache=cache) is None
    assert tomorrow.engine == f"compiled {best_dense_type()}"


@pytest.mark.slow
@pytest.mark.skipif(best_dense_type() == "fp32", reason="fp32 is the best there is here")
def test_where_the_best_precision_differs_too_much_fp32_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "ranker")
    monkeypatch.setitem(TOLERANCE, best_dense_type(), 0.0)
    ranker = Ranker.load(tmp_path / "ranker")
    compiling = accelerate(ranker, tmp_path / "ranker", "auto", cache=tmp_path / "cache")
    assert compiling is not None
    compiling.join(timeout=280)
    assert ranker.engine == "compiled fp32"
    again = Ranker.load(tmp_path / "ranker")
    assert accelerate(again, tmp_path / "ranker", "auto", cache=tmp_path / "cache") is None
    assert again.engine == "compiled fp32"


def test_without_a_compiler_plain_goes_on_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exported(tmp_path / "ranker")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    ranker = Ranker.load(tmp_path / "ranker")
    with caplog.at_level(logging.INFO):
        compiling = accelerate(ranker, tmp_path / "ranker", "fp32", cache=tmp_path / "cache")
        assert compiling is not None
        compiling.join(timeout=240)
    assert ranker.engine == "plain fp32"
    assert "plain fp32 goes on: compiling the scorer ended with" in caplog.text
    assert accelerate(ranker, tmp_path / "ranker", "plain", cache=tmp_path / "cache") is None


def test_damaged_code_is_refused_and_plain_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exported(tmp_path / "ranker")
    ranker, cache = Ranker.load(tmp_path / "ranker"), tmp_path / "cache"
    cache.mkdir(mode=0o700)
    package_path(ranker, "fp32", cache).write_bytes(b"\x7fELF, or not")
    assert accelerate(ranker, tmp_path / "ranker", "fp32", cache=cache) is None
    assert ranker.engine == "plain fp32"
    assert "the fp32 scorer is not used" in caplog.text
