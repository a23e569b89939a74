"""The frozen ranker as native code (AOTInductor): compiled once for a shape of model, kept in a folder of this machine.

    python -m ranking.compiled BUNDLE/ranker        # compile now, so that a server finds it

Weights are arguments of the code, so tomorrow's model of the same shape needs no compiler. Code never travels in a
bundle: it is made on the machine that runs it, for its processor, and only a folder that nobody else can write to is
read. Compiling takes a C++ compiler and 15 to 40 seconds; without one the plain scorer goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ranking import frozen, products
from ranking.config import config_fields
from ranking.frozen import FrozenRanker, Request, Shape, fold
from ranking.infer import Engine, Ranker
from ranking.native import NativeCode
from ranking.products import TOLERANCE, DenseType, Weights
from ranking.requests import Places

MOST = 1 << 20
"""Requests, candidates of each, videos, events of a history."""
AT_ONCE = max(2, os.cpu_count() or 1)
"""Threads that may run the code at the same time."""


class CompilerError(RuntimeError):
    """The scorer could not be compiled here; the message has the compiler's last words."""


def default_cache() -> Path:
    """`~/.cache/reelrank/scorers`, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reelrank" / "scorers"


def best_dense_type() -> DenseType:
    """bf16 where the processor multiplies it natively, otherwise fp32."""
    return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def package_path(ranker: Ranker, dense: DenseType, cache: Path) -> Path:
    """Where the code for this ranker's shape lies: named by everything that it depends on."""
    about = {
        "source": inspect.getsource(frozen) + inspect.getsource(products),
        "config": config_fields(ranker.config),
        "sizes": {**asdict(ranker.sizes), "user_table_rows": None, "video_table_rows": None},
        "dense": dense,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return cache / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]}.so"


def load_engine(ranker: Ranker, dense: DenseType, cache: Path) -> Engine | None:
    """The compiled engine; None when this shape was not compiled yet. Raises PermissionError for a folder that others
    may write to."""
    path = package_path(ranker, dense, cache)
    if not path.exists():
        return None
    _own(cache)
    code = NativeCode(path, AT_ONCE)
    weights = pytree.tree_leaves(fold(ranker.dense, ranker.config, ranker.sizes, dense))

    def run(request: Request) -> torch.Tensor:
        return code([*weights, *request])

    return ranker.engine_of(f"compiled {dense}", run, TOLERANCE[dense])


def compile_apart(folder: Path, dense: DenseType, cache: Path) -> None:
    """Compile in a process of its own, which lowers its priority: a server's threads go on. Raises CompilerError."""
    command = [sys.executable, "-m", "ranking.compiled", str(folder), "--dense", dense, "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompilerError(f"compiling the scorer ended with {done.returncode}: {last}")


def compile_package(ranker: Ranker, dense: DenseType, cache: Path) -> Path:
    """Compile for this ranker's shape. The file appears whole or not at all."""
    path = package_path(ranker, dense, cache)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    _own(cache)
    net = FrozenRanker(Shape.of(ranker.config, ranker.sizes))
    weights = fold(ranker.dense, ranker.config, ranker.sizes, dense)
    probe = ranker.probe((3, 3))
    example = tuple(ranker.request(probe, Places.of(probe)))
    compile_module(net, (weights, example), _dynamic(weights), path)
    return path


def compile_module(net: nn.Module, arguments: tuple, dynamic: tuple, path: Path) -> None:
    """Any module without parameters of its own, tensors to one tensor, into a library that `NativeCode` calls."""
    with TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder, torch.no_grad():
        exported = torch.export.export(net.eval(), arguments, dynamic_shapes=dynamic)
        package = str(Path(folder) / "scorer.pt2")
        # One thread a request: many requests fill the cores better than many threads a request.
        torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs={"cpp.threads": 1})
        with zipfile.ZipFile(package) as archive:
            (library,) = (name for name in archive.namelist() if name.endswith(".so"))
            os.replace(archive.extract(library, folder), path)


def _dynamic(weights: Weights) -> tuple:
    """Sizes that differ from call to call: requests, candidates of each, videos, events of a history."""
    b, m, u, length = (torch.export.Dim(name, min=1, max=MOST) for name in ("B", "M", "U", "L"))
    by_field = {name: {0: u} if name.startswith("video_") else {0: b} for name in Request._fields}
    by_field |= {name: {0: b, 1: m} for name in ("candidate_BM", "candidate_dense_BMC")}
    by_field |= {name: {0: b, 1: length} for name in ("history_BL", "history_events_BLS", "history_gap_BL")}
    return {name: {} for name in weights}, tuple(by_field[name] for name in Request._fields)


def _own(cache: Path) -> None:
    """Code is loaded from here, so nobody else may put any here."""
    found = cache.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{cache} belongs to user {found.st_uid} with mode {stat.filemode(found.st_mode)}: compiled code is only "
            f"read from a folder of one's own that nobody else can write to; chmod 700 it, or name another"
        )


def main() -> None:
    """Compile for one ranker's shape, unless that was done."""
    parser = argparse.ArgumentParser(prog="ranking.compiled", description="Compile a ranker's scorer for this machine.")
    parser.add_argument("folder", type=Path, help="a ranker: RUN/ranker, or the folder `ranker` of a bundle")
    parser.add_argument("--dense", choices=TOLERANCE, default=best_dense_type(), help="precision of large products")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    options = parser.parse_args()
    os.nice(10)  # whatever serves on this machine comes first
    ranker, start = Ranker.load(options.folder), time.perf_counter()
    path = package_path(ranker, options.dense, options.cache)
    if not path.exists():
        compile_package(ranker, options.dense, options.cache)
    print(f"{path} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
