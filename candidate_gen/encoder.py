"""Causal encoders of a user's event sequence behind one interface: SASRec, SASRec with LiGR's gates, HSTU.

B users, P positions of one token each, E width, H heads, A = E / H width of a head, G gap buckets. State p has seen
tokens 0 .. p and nothing behind them, so padding behind the last event is never seen and needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional

from features.history import UNDATED_TS_MS

BUCKETS_PER_DOUBLING = 2
"""A new bucket each time a gap grows by sqrt(2); HSTU's public code takes e^.301 = 1.35."""
GAP_BUCKETS = 64
"""0 unknown, 1 for up to a second, then two a doubling; the last holds all above 2^31 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Architecture of a sequence encoder."""

    kind: Literal["ligr", "hstu", "sasrec"] = "ligr"
    """sasrec: pre-norm transformer (arXiv 1808.09781). ligr: the same with gated residuals (arXiv 2502.03417) and
    SwiGLU, as eSASRec (arXiv 2508.06450) combines them. hstu: arXiv 2402.17152."""
    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    ffn_multiple: int = 4
    """Hidden width of the feed-forward part over `dim`; HSTU has no such part."""
    positions: Literal["relative", "absolute"] = "relative"
    """relative: attention is biased by how many events back a token lies, so that cutting a history elsewhere changes
    nothing but what is cut off. absolute: a learned vector for each place counted from the window's begin."""
    time_gaps: bool = False
    """Attention is biased by the time from a token's event to the instant its reader is asked at, in log buckets."""

    def __post_init__(self) -> None:
        if self.kind not in LAYERS:
            raise ValueError(f"EncoderConfig.kind {self.kind!r}: choose from {', '.join(LAYERS)}")
        if self.positions not in ("relative", "absolute"):
            raise ValueError(f"EncoderConfig.positions {self.positions!r}: choose relative or absolute")
        if self.dim < 1 or self.dim % self.heads:
            raise ValueError(f"EncoderConfig.dim {self.dim} is not a multiple of heads {self.heads}")


class SequenceEncoder(nn.Module):
    """Layers of one kind over at most `positions` tokens, then a LayerNorm."""

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        self.config, self.positions = config, positions
        self.layers = nn.ModuleList(LAYERS[config.kind](config, positions) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.place_PE = None
        if config.positions == "absolute":
            self.place_PE = nn.Parameter(torch.randn(positions, config.dim) * 0.02)

    def forward(
        self,
        event_BPE: torch.Tensor,
        event_ms_BP: torch.Tensor | None = None,
        asked_ms_BP: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, P, E) states. Times (int64) are read with `time_gaps` alone; without them every gap is unknown.

        `event_ms_BP` is when each token's event was, UNDATED_TS_MS where that is unknown or the token is no event;
        `asked_ms_BP` the instant state p is asked at, which must not fall along p, and is the event's own by default.
        """
        positions = event_BPE.shape[1]
        if positions > self.positions:
            raise ValueError(f"{positions} tokens, but the encoder was made for {self.positions}: cut the histories")
        if self.place_PE is not None:
            event_BPE = event_BPE + self.place_PE[:positions]
        at_P = torch.arange(positions, device=event_BPE.device)
        back_PP = at_P[:, None] - at_P[None, :]
        gap_BPP = None
        if self.config.time_gaps:
            gap_BPP = torch.zeros_like(back_PP).unsqueeze(0)
            if event_ms_BP is not None:
                gap_BPP = gap_buckets(event_ms_BP if asked_ms_BP is None else asked_ms_BP, event_ms_BP)
        pairs = Pairs(back_PP=back_PP.clamp(min=0), unseen_PP=back_PP < 0, gap_BPP=gap_BPP)
        state_BPE = event_BPE
        for layer in self.layers:
            state_BPE = layer(state_BPE, pairs)
        return self.norm(state_BPE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What attention knows of (reader, token) pairs; the same for all layers."""

    back_PP: torch.Tensor
    """int64: how many positions before the reader the token lies."""
    unseen_PP: torch.Tensor
    """bool: the token stands behind the reader."""
    gap_BPP: torch.Tensor | None
    """int64 gap buckets; leading 1 instead of B when no time is known."""


def gap_buckets(asked_ms_BP: torch.Tensor, event_ms_BP: torch.Tensor) -> torch.Tensor:
    """(B, P, P) int64: bucket of the time from event j to the instant reader i is asked at; 0 where either is undated.

    A gap below zero, which a causal reader never looks at, falls into the first bucket.
    """
    known_BPP = (asked_ms_BP != UNDATED_TS_MS)[:, :, None] & (event_ms_BP != UNDATED_TS_MS)[:, None, :]
    gap_s_BPP = (asked_ms_BP[:, :, None] - event_ms_BP[:, None, :]).to(torch.float32) / 1000
    bucket_BPP = 1 + (BUCKETS_PER_DOUBLING * gap_s_BPP.clamp(min=1).log2()).to(torch.int64)
    return bucket_BPP.clamp(max=GAP_BUCKETS - 1) * known_BPP


class PairBias(nn.Module):
    """What is added to attention scores by distance and by gap, for each head."""

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        self.bias_HP = self.bias_HG = None
        if config.positions == "relative":
            self.bias_HP = nn.Parameter(torch.zeros(config.heads, positions))
        if config.time_gaps:
            self.bias_HG = nn.Parameter(torch.zeros(config.heads, GAP_BUCKETS))

    def forward(self, pairs: Pairs) -> torch.Tensor:
        """(B or 1, H, P, P); 0 where nothing is known."""
        bias = torch.zeros((1, 1, *pairs.back_PP.shape), device=pairs.back_PP.device)
        if self.bias_HP is not None:
            bias = self.bias_HP[:, pairs.back_PP].unsqueeze(0)
        if self.bias_HG is not None and pairs.gap_BPP is not None:
            bias = bias + _take(self.bias_HG, pairs.gap_BPP)
        return bias


def _take(table_HG: torch.Tensor, index_BPP: torch.Tensor) -> torch.Tensor:
    """(B, H, P, P) entries. By `gather`, whose gradient is a plain sum; an embedding's took 80 times as long."""
    n, positions, _ = index_BPP.shape
    index_BHX = index_BPP.view(n, 1, -1).expand(-1, len(table_HG), -1)
    taken_BHX = table_HG.expand(n, -1, -1).gather(2, index_BHX)
    return taken_BHX.view(n, -1, positions, positions)


class SoftmaxAttention(nn.Module):
    """Multi-head causal attention with biased scores; written out, since torch's own kernel takes twice as long on a
    CPU once the bias wants a gradient."""

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim)
        self.bias = PairBias(config, positions)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, token_BPE: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        query, key, value = _split_heads(self.query_key_value(token_BPE), 3, self.heads)
        bias = self.bias(pairs).masked_fill(pairs.unseen_PP, float("-inf")).to(query.dtype)
        score_BHPP = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
        seen_BHPA = score_BHPP.softmax(dim=-1).to(value.dtype) @ value
        return self.out(seen_BHPA.transpose(1, 2).flatten(2))


class SasrecLayer(nn.Module):
    """Pre-norm attention and feed-forward part, each added to what it read."""

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        hidden = config.ffn_multiple * config.dim
        self.attention_norm, self.ffn_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = SoftmaxAttention(config, positions)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, state_BPE: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        state_BPE = state_BPE + self.dropout(self.attention(self.attention_norm(state_BPE), pairs))
        return state_BPE + self.dropout(self.ffn(self.ffn_norm(state_BPE)))


class LigrLayer(nn.Module):
    """Pre-norm attention and SwiGLU; what each adds is gated by what it read: x + f(norm(x)) * sigmoid(Wx + b)."""

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = SoftmaxAttention(config, positions)
        self.ffn = SwiGlu(config)
        self.attention_gate, self.ffn_gate = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, state_BPE: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        seen_BPE = self.dropout(self.attention(self.attention_norm(state_BPE), pairs))
        state_BPE = state_BPE + seen_BPE * torch.sigmoid(self.attention_gate(state_BPE))
        made_BPE = self.dropout(self.ffn(self.ffn_norm(state_BPE)))
        return state_BPE + made_BPE * torch.sigmoid(self.ffn_gate(state_BPE))


class SwiGlu(nn.Module):
    """Feed-forward part with a SiLU gate (arXiv 2002.05202)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.ffn_multiple * config.dim
        self.up_and_gate = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_BPE: torch.Tensor) -> torch.Tensor:
        up, gate = self.up_and_gate(token_BPE).chunk(2, dim=-1)
        return self.down(self.dropout(up * functional.silu(gate)))


class HstuLayer(nn.Module):
    """Pointwise attention, SiLU instead of a softmax, whose normed sum is gated by the reader's own U.

    The paper divides the sum by the sequence length; before a LayerNorm a constant factor says nothing, so none here.
    """

    def __init__(self, config: EncoderConfig, positions: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.input_norm, self.seen_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.gate_value_query_key = nn.Linear(config.dim, 4 * config.dim)
        self.bias = PairBias(config, positions)
        self.out = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, state_BPE: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        made = functional.silu(self.gate_value_query_key(self.input_norm(state_BPE)))
        gate_BPE, rest = made.split([state_BPE.shape[-1], 3 * state_BPE.shape[-1]], dim=-1)
        value, query, key = _split_heads(rest, 3, self.heads)
        score = functional.silu(query @ key.transpose(-1, -2) + self.bias(pairs).to(query.dtype))
        seen_BHPA = score.masked_fill(pairs.unseen_PP, 0.0).to(value.dtype) @ value
        seen_BPE = self.seen_norm(seen_BHPA.transpose(1, 2).flatten(2))
        return state_BPE + self.out(self.dropout(seen_BPE * gate_BPE))


def _split_heads(made_BPX: torch.Tensor, parts: int, heads: int) -> tuple[torch.Tensor, ...]:
    """`parts` tensors (B, H, P, A) from one projection of width parts * E."""
    n, positions, _ = made_BPX.shape
    return cast(
        "tuple[torch.Tensor, ...]", made_BPX.view(n, positions, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    )


LAYERS = {"ligr": LigrLayer, "hstu": HstuLayer, "sasrec": SasrecLayer}
