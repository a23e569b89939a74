"""A process of its own for one engine: memory is honest there, and its threads are set before any library loads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class FreshProcess:
    """A newly started Python that runs one function after another; what they raise is raised here."""

    def __init__(self, threads: int) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        before = {name: os.environ.get(name) for name in (*THREADS, "OMP_WAIT_POLICY")}
        # Libraries read these when they load, and the child inherits them at its start. Waiting threads must sleep:
        # spinning beside other work costs its CPU time twice.
        os.environ.update(dict.fromkeys(THREADS, str(threads)), OMP_WAIT_POLICY="PASSIVE")
        try:
            self._pool.submit(os.getpid).result()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; it and its arguments must be importable and picklable."""
        return self._pool.submit(function, *arguments).result()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
