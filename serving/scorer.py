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
"""plain: as the bundle is; auto: compiled, in the precision that is best on this machine, or in fp32 where a bundle's
answers in that one differ too much; or compiled in that one."""
SCORERS: tuple[Scorer, ...] = get_args(Scorer)
FAILURES = (ArithmeticError, OSError, RuntimeError, ValueError)
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
    wanted = tuple(dict.fromkeys((best_dense_type(), "fp32"))) if scorer == "auto" else (scorer,)
    cache = cache or default_cache()
    for number, dense in enumerate(wanted):
        try:
            if torch.device(device).type != "cpu":
                engine = device_engine(ranker, torch.device(device), dense, capture_of(torch.device(device)))
            else:
                engine = load_engine(ranker, dense, cache)
            if engine is None:
                arguments = (ranker, folder, wanted[number:], cache)
                compiling = threading.Thread(
                    target=_compile_and_use, args=arguments, name="compile-scorer", daemon=True
                )
                compiling.start()
                return compiling
            _use(ranker, engine)
        except FAILURES as error:
            _log.warning("the %s scorer is not used: %s", dense, error)
        else:
            return None
    return None


def _compile_and_use(ranker: Ranker, folder: Path, wanted: tuple[DenseType, ...], cache: Path) -> None:
    """The first of these precisions that agrees with plain fp32, which answers meanwhile."""
    for dense in wanted:
        try:
            if load_engine(ranker, dense, cache) is None:
                _log.info("compiling the %s scorer for this shape of ranker, once; plain fp32 answers meanwhile", dense)
                compile_apart(folder, dense, cache)
            engine = load_engine(ranker, dense, cache)
            if engine is None:
                raise OSError(f"{cache}: the compiled scorer is gone")
            _use(ranker, engine)
        except FAILURES as error:
            _log.warning("the %s scorer is not used, plain fp32 goes on: %s", dense, error)
        else:
            return


def _use(ranker: Ranker, engine: Engine) -> None:
    ranker.accelerate(engine)
    _log.info("the %s scorer answers", engine.name)
