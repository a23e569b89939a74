"""Next item from a sequence: one table of item vectors, read by a causal encoder and ranked by its states.

B sequences, P positions, V items, E width, N positions that have a target, C sampled negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from candidate_gen.encoder import EncoderConfig, SequenceEncoder
from pipelines.sequential.data import WindowBatch
from pipelines.sequential.loss import full_softmax, sampled_softmax

FULL_SOFTMAX_ITEMS = 100_000
"""Up to here `loss=auto` is exact. Logits are held a chunk of positions at a time (64 of them, at this size 26 MB), so
memory would allow more; time is 6 * positions * items * width operations a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextItemConfig:
    """Architecture and loss."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    length: int = 200
    """Last items that are read."""
    times: Literal["none", "event", "request"] = "none"
    """What the encoder's gaps are measured to: nothing; the last event; or the instant at which the next item was
    consumed (request), as a recommender that is asked then would know, and as HSTU's published figures use it."""
    l2_norm: bool = True
    """Cosine instead of dot product."""
    temperature: float = 0.05
    input_dropout: float = 0.1
    loss: Literal["auto", "full", "sampled"] = "auto"
    uniform_negatives: int = 512
    """Items drawn uniformly a batch, for the sampled loss."""
    in_batch_negatives: int = 0
    """Items drawn from the batch's targets, for the sampled loss."""
    correct_sampling: bool = True
    """logQ, for the sampled loss."""

    def __post_init__(self) -> None:
        if self.encoder.time_gaps:
            raise ValueError("NextItemConfig: set times=event or times=request; encoder.time_gaps follows from it")
        if self.loss != "full" and self.uniform_negatives + self.in_batch_negatives < 1:
            raise ValueError("NextItemConfig: the sampled loss needs uniform_negatives or in_batch_negatives")
        if self.temperature <= 0:
            raise ValueError(f"NextItemConfig.temperature is {self.temperature}, it must be above 0")


class NextItemModel(nn.Module):
    """Item vectors stand at both ends: what is read and what is ranked."""

    def __init__(self, config: NextItemConfig, n_items: int, frequency_V: np.ndarray | None = None) -> None:
        """`frequency_V`: share of each item among the training targets, for in-batch negatives."""
        super().__init__()
        self.config, self.n_items = config, n_items
        encoder = replace(config.encoder, time_gaps=config.times != "none")
        self.item = nn.Embedding(n_items, encoder.dim)
        nn.init.normal_(self.item.weight, std=encoder.dim**-0.5)
        self.dropout = nn.Dropout(config.input_dropout)
        self.encoder = SequenceEncoder(encoder, config.length)
        self.full = config.loss == "full" or (config.loss == "auto" and n_items <= FULL_SOFTMAX_ITEMS)
        share_V = np.zeros(n_items) if frequency_V is None else frequency_V
        draws_V = config.in_batch_negatives * share_V + config.uniform_negatives / n_items
        log_draws_V = torch.from_numpy(np.log(np.maximum(draws_V, 1e-12)).astype(np.float32))
        self.log_draws_V: torch.Tensor
        self.register_buffer("log_draws_V", log_draws_V, persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the loss over all positions that have a target."""
        valid_BP, target_N = batch["valid_BP"], batch["target_BP"][batch["valid_BP"]]
        query_NE = self._normed(self.states(batch)[valid_BP].float())
        bf16 = torch.is_autocast_enabled(query_NE.device.type)
        with torch.autocast(query_NE.device.type, enabled=False):
            if self.full:
                return full_softmax(query_NE, self.candidates(), target_N, self.config.temperature, bf16=bf16)
            pool_C = self._pool(target_N)
            return sampled_softmax(
                query_NE,
                self._normed(self.item(target_N)),
                self._normed(self.item(pool_C)),
                target_N=target_N,
                pool_C=pool_C,
                log_draws_C=self.log_draws_V[pool_C] * float(self.config.correct_sampling),
                temperature=self.config.temperature,
            )

    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, P, E) before normalisation."""
        event_BPE = self.dropout(self.item(batch["item_BP"]))
        asked = batch["event_ms_BP"] if self.config.times == "event" else batch["next_ms_BP"]
        return self.encoder(event_BPE, batch["event_ms_BP"], asked)

    def last_queries(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, E): what ranks the catalogue after each sequence's last item."""
        last_B = batch["valid_BP"].sum(dim=1) - 1
        return self._normed(self.states(batch)[torch.arange(len(last_B), device=last_B.device), last_B].float())

    def candidates(self) -> torch.Tensor:
        """(V, E): the whole catalogue, to be multiplied with queries."""
        return self._normed(self.item.weight)

    def _pool(self, target_N: torch.Tensor) -> torch.Tensor:
        """(C,) items: uniform ones and targets of the batch, drawn with replacement."""
        uniform = torch.randint(self.n_items, (self.config.uniform_negatives,), device=target_N.device)
        drawn = torch.randint(len(target_N), (self.config.in_batch_negatives,), device=target_N.device)
        return torch.cat([uniform, target_N[drawn]])

    def _normed(self, x_E: torch.Tensor) -> torch.Tensor:
        return functional.normalize(x_E, dim=-1) if self.config.l2_norm else x_E


def to_device(batch: WindowBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors, under their own names."""
    return {name: torch.from_numpy(getattr(batch, name)).to(device) for name in WindowBatch.__slots__}
