"""Calls compiled code (a shared object of AOTInductor) without Python's lock, so that threads score side by side.

torch's own loader holds the lock while the code runs. The interface used here is the one that AOTInductor exports for
callers in other languages (torch/csrc/inductor/aoti_runtime/interface.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._aoti import alloc_tensor_by_stealing_from_void_ptr, unsafe_alloc_void_ptrs_from_tensors

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype, _capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class NativeCode:
    """One function of tensors to a tensor; up to `at_once` threads run it at the same time, more wait."""

    def __init__(self, library: Path, at_once: int) -> None:
        """Raises OSError when the file is no library for this machine and torch."""
        self._library = ctypes.CDLL(str(library))
        self._container = ctypes.c_void_p()
        create = self._library.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        if create(ctypes.byref(self._container), at_once, b"cpu", None):
            raise OSError(f"{library}: the compiled scorer could not be set up; delete the file to compile it again")
        self._run = self._library.AOTInductorModelContainerRun
        handles = ctypes.POINTER(ctypes.c_void_p)
        self._run.argtypes = [
            ctypes.c_void_p,
            handles,
            ctypes.c_size_t,
            handles,
            ctypes.c_size_t,
            *[ctypes.c_void_p] * 2,
        ]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run. Raises RuntimeError when the code refuses the inputs; it has then told stderr why."""
        given: list[Any] = unsafe_alloc_void_ptrs_from_tensors(
            list(inputs)
        )  # new references, which the code takes over
        arguments = (ctypes.c_void_p * len(given))(*(_pointer_of(capsule, None) for capsule in given))
        result = (ctypes.c_void_p * 1)()
        if self._run(self._container, arguments, len(given), result, 1, None, None):
            raise RuntimeError("the compiled scorer refused its inputs (its message is on stderr)")
        return alloc_tensor_by_stealing_from_void_ptr(_capsule_of(result[0], None, None))

    def __del__(self) -> None:
        if getattr(self, "_container", None):
            delete = self._library.AOTInductorModelContainerDelete
            delete.argtypes = [ctypes.c_void_p]
            delete(self._container)
