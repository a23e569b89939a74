"""A faster engine under a bundle's ranker: code compiled on this machine, or an accelerator.

A bundle answers in plain float32 from its first request on. Code that is there already takes over before that; code
that must be compiled first does so while requests are answered. Whatever fails is told, and plain float32 goes on.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Literal, get_args

import torch

from ranking.compiled import best_dense_type, compile_apart, default_cache, load_engine
from ranking.device import capture_of, device_engine
from ranking.infer import Engine, Ranker
from ranking.products import DenseType

Scorer = Literal["plain", "auto", "fp32", "bf16", "int8"]
"""plain: as the bundle is; auto: compiled, in the precision that is best on this machine; or compiled in that one."""
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
_log = logging.getLogger(__name__)


def scorer_named(name: str) -> Scorer:
    """`name`, if it is one; raises ValueError with those that are."""
    for scorer in SCORERS:
        if scorer == name:
            return scorer
    raise ValueError(f"--scorer {name!r}: choose from {', '.join(SCORERS)}")


def accelerate(
    ranker: Ranker, folder: Path, scorer: Scorer, device: str = "cpu", cache: Path | None = None
) -> threading.Thread | None:
    """Put an engine in place, at once or by the thread that is returned. `folder`: the ranker's own."""
    if scorer == "plain":
        return None
    dense: DenseType = best_dense_type() if scorer == "auto" else scorer
    cache = cache or default_cache()
    try:
        if torch.device(device).type != "cpu":
            engine = device_engine(ranker, torch.device(device), dense, capture_of(torch.device(device)))
        else:
            engine = load_engine(ranker, dense, cache)
        if engine is not None:
            _use(ranker, engine)
            return None
    except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
        _log.warning("the %s scorer is not used: %s", dense, error)
        return None
    compiling = threading.Thread(
        target=_compile_and_use, args=(ranker, folder, dense, cache), name="compile-scorer", daemon=True
    )
    compiling.start()
    return compiling


def _compile_and_use(ranker: Ranker, folder: Path, dense: DenseType, cache: Path) -> None:
    _log.info("compiling the %s scorer for this shape of ranker, once; plain fp32 answers meanwhile", dense)
    try:
        compile_apart(folder, dense, cache)
        engine = load_engine(ranker, dense, cache)
        if engine is None:
            raise OSError(f"{cache}: the compiled scorer is gone")
        _use(ranker, engine)
    except (ArithmeticError, OSError, RuntimeError) as error:
        _log.warning("plain fp32 goes on: %s", error)


def _use(ranker: Ranker, engine: Engine) -> None:
    ranker.accelerate(engine)
    _log.info("the %s scorer answers", engine.name)
