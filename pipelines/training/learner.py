"""The sharded model and its two optimizers: one worker's part of a step.

loss -> (the caller looks at it) -> backward, in which the tables move -> mean of the workers' dense gradients -> Adam
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from features.batch import Batch
from pipelines.training.sharding import Sharded, dense_parameters
from pipelines.training.train_config import TrainConfig
from pipelines.training.workers import mean_of_workers


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity; no checkpoint holds any."""


class NonFiniteLossError(NonFiniteError):
    """The loss became NaN or infinite; no parameter has moved in that step."""


class NonFiniteStateError(NonFiniteError):
    """Gradients, or parameters that moved, are NaN or infinite; the last checkpoint is from before."""


class Learner:
    """Model, fused Adagrad of the tables, Adam of the rest; called by all workers together."""

    def __init__(self, sharded: Sharded, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = sharded.model, config, device
        self.dense = dense_parameters(self.model)
        matrices = [p for p in self.dense.values() if p.ndim > 1]
        others = [p for p in self.dense.values() if p.ndim <= 1]
        self.dense_optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr_dense,
            fused=True,
        )

    def loss(self, batch: Batch, targets: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """This worker's loss and the mean of all; nothing moves."""
        with self._dense_precision():
            loss = self.model(batch, targets)["loss"]
        return loss, mean_of_workers(loss)

    def move(self, loss: torch.Tensor) -> None:
        """Every parameter, by the gradient of a finite loss; raises NonFiniteStateError where that is not finite."""
        self.dense_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in self.dense.values() if parameter.grad is not None]
        self._average(gradients)
        # A NaN passes through the dense part on its way to the tables, so one norm sees nearly all; what it misses
        # is met when the tables are checkpointed.
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise NonFiniteStateError(f"the gradient of the dense part has norm {norm} though the loss is finite")
        self.dense_optimizer.step()

    @torch.no_grad()
    def scalars(self, batch: Batch, targets: dict[str, torch.Tensor]) -> dict[str, float]:
        """Every scalar of the module, as the mean of the workers."""
        with self._dense_precision():
            scalars = self.model(batch, targets)
        return {name: mean_of_workers(scalar) for name, scalar in scalars.items()}

    def set_learning_rates(self, share: float) -> tuple[float, float]:
        """Both to this share of the configured ones; returns (dense, sparse). Before `move`."""
        lr_dense, lr_sparse = self.config.lr_dense * share, self.config.lr_sparse * share
        for group in self.dense_optimizer.param_groups:
            group["lr"] = lr_dense
        for group in self.model.fused_optimizer.param_groups:
            cast("dict", group)["lr"] = lr_sparse
        self.model.fused_optimizer.step()  # hands the rate to the kernels; the tables move in backward
        return lr_dense, lr_sparse

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state under unsharded names: sharded tables with their accumulators, dense parameters with Adam's. What
        is written into these tensors is the learner's."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for table, state in self.model.fused_optimizer.state_dict()["state"].items():
            tensors |= {f"fused/{table}/{name}": tensor for name, tensor in state.items()}
        for name, parameter in self.dense.items():
            state = self._adam_state(parameter)
            tensors |= {f"dense/{name}/{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        return tensors

    def _adam_state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.dense_optimizer.state[parameter]
        if not state:  # before the first step Adam has none
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _dense_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """In one piece: the dense part is small beside what the tables exchange, so there is little to overlap, and
        DistributedDataParallel's hooks and copies would cost a step time even of one worker."""
        world = dist.get_world_size()
        if world == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
