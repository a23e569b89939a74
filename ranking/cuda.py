"""Capture for NVIDIA's GPUs: CUDA graphs. The only module of the scorer that names a vendor (`device.capture_of`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ranking.device import Replay

WARM_UPS = 3
"""Runs before capturing, as torch asks for: libraries set themselves up in the first ones."""


def capture(compute: Callable[[], torch.Tensor]) -> Replay:
    """A graph of the kernels that `compute` launches; its tensors must stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
