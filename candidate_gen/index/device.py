"""The device that heavy index work runs on; no other module of the index names a vendor.

Everything that runs there is torch, and runs on the CPU as the very same code, which is how it is tested: nothing here
has been measured on a GPU. faiss-gpu would be the alternative for training and for searching:

- Training: k-means and assignment are matrix products and a maximum, which torch hands to the same library as FAISS
  does, without a second package whose build must match torch's CUDA.
- Searching: the classic GPU indexes ignore selectors (faiss#3924; #3114), so that a filter could only come after the
  search and results run short. The cuVS builds filter by a bitmap since April 2026 (faiss#4858), but with one selector
  for all queries of a call, while requests differ in what they exclude.
"""

from __future__ import annotations

import re

import torch

_SCORES_CPU, _SCORES_GPU = 1 << 19, 1 << 27
"""Scores (float32: 2 MiB, near a core's cache) and (float16: 256 MiB) that are made before they are looked at."""


def resolve(name: str) -> str:
    """From what --device may say, "cpu" or "cuda:N"; "auto" is the first GPU there is, or the CPU. Raises ValueError
    for a device that torch cannot reach, naming what it found."""
    said = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if said is None:
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    there, number = _count(), int(said[1] or 0)
    if name == "cpu" or (name == "auto" and not there):
        return "cpu"
    if number >= there:
        raise ValueError(
            f"--device {name}: {found()}; `reelrank doctor` says how to mend it, --device cpu needs no GPU"
        )
    return f"cuda:{number}"


def found() -> str:
    """What torch can reach, in words."""
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is a build without CUDA"
    names = ", ".join(f"cuda:{number} {torch.cuda.get_device_name(number)}" for number in range(_count()))
    return f"torch {torch.__version__} for CUDA {built_for} reaches {names or 'no GPU'}"


def _count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def is_cpu(device: str | torch.device) -> bool:
    """Whether tensors there share numpy's memory."""
    return torch.device(device).type == "cpu"


def scores_at_once(device: str | torch.device) -> int:
    """How many products of queries (or vectors) with vectors (or centroids) to hold at a time."""
    return _SCORES_CPU if is_cpu(device) else _SCORES_GPU
