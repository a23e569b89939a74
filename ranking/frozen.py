"""The ranker's dense part as serving computes it: user-side work once a request, candidates in rows of equal length.

B requests, M candidates each (the longest's number; the rest is padding), U distinct videos, L history, F width of the
interaction, T tasks and the watch-time quantile. It is `RankerModel.logits` rearranged: matrices that read user and
candidate side by side are split, so that the user's part is multiplied once; norms are folded into the matrix behind
them. A candidate's logits depend on its request and itself alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import embedding, layer_norm, linear, silu

from features.counters import WIDTH_PER_KEY
from features.inputs import INSTANT_WIDTH
from ranking import products
from ranking.config import RankerConfig, RankerSizes
from ranking.products import DenseType, Weights, product

NORM_EPS = 1e-5
"""As in `nn.LayerNorm`."""


class Request(NamedTuple):
    """B requests as tensors; `candidate_BM` and `history_BL` are positions in U."""

    user_BE: torch.Tensor
    """Looked-up features of the user, side by side."""
    user_dense_BD: torch.Tensor
    surface_B: torch.Tensor
    video_UE: torch.Tensor
    video_dense_UD: torch.Tensor
    history_BL: torch.Tensor
    history_events_BLS: torch.Tensor
    """Signals, and the share watched."""
    history_gap_BL: torch.Tensor
    history_length_B: torch.Tensor
    candidate_BM: torch.Tensor
    candidate_dense_BMC: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the computation needs to know beside its weights: with them, all there is to a compiled scorer."""

    user_width: int
    """Of the looked-up user features."""
    video_width: int
    user_dense: int
    """Dense user features that are read, from the left."""
    candidate_skipped: int
    """Dense candidate features that are not read, from the left."""
    bottom_layers: int
    cross_layers: int
    """At least 1."""
    heads: int
    """Of the attention over history; 0 without one."""
    experts: int
    outputs: int
    surface: bool

    @classmethod
    def of(cls, config: RankerConfig, sizes: RankerSizes) -> Shape:
        """What a ranker of this configuration and size comes to."""
        return cls(
            user_width=len(sizes.user_names) * config.embedding_dim,
            video_width=len(sizes.video_names) * config.embedding_dim,
            user_dense=sizes.user_dense - (0 if config.counters else WIDTH_PER_KEY),
            candidate_skipped=0 if config.counters else sizes.candidate_dense - INSTANT_WIDTH,
            bottom_layers=len(config.bottom_widths),
            cross_layers=config.cross_layers,
            heads=config.attention_heads if config.history else 0,
            experts=config.n_experts,
            outputs=len(sizes.tasks) + 1,
            surface=config.surface_as_context,
        )


class FrozenRanker(nn.Module):
    """Logits of B * M candidates. Without parameters of its own: weights come with each call, so that one compiled
    scorer serves every bundle of the same shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, w: Weights, request: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(B, M, T + 1) float32: logits by task, and the logit of the watch-time quantile last. `request`: a `Request`
        as a plain tuple, which is what compiled code takes."""
        r = Request(*request)
        shape, n_requests, per_request = self.shape, *r.candidate_BM.shape
        video_UF = torch.cat([r.video_UE, r.video_dense_UD], dim=1)
        candidate_N = r.candidate_BM.flatten()
        video_NF = video_UF.index_select(0, candidate_N)
        bottom_BMH, direct_BMT = self._dense(w, r, video_NF[:, shape.video_width :])
        of_user, of_item = [r.user_BE], [video_NF[:, : shape.video_width].view(n_requests, per_request, -1), bottom_BMH]
        if shape.heads:
            attended_BMA, taste_BA = self._attend(w, r, video_UF, candidate_N)
            of_user.append(taste_BA)
            of_item.append(attended_BMA)
        if shape.surface:
            of_user.append(embedding(r.surface_B, w["surface.embedding"]))
            direct_BMT = direct_BMT + embedding(r.surface_B, w["surface.shift"]).unsqueeze(1)
        x_BMF = self._cross(w, torch.cat(of_user, dim=1), torch.cat(of_item, dim=2))
        return self._mixture(w, x_BMF) + direct_BMT

    def _dense(self, w: Weights, r: Request, video_dense_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bottom MLP, and the direct linear part that reads the same features."""
        shape = self.shape
        candidate_NC = r.candidate_dense_BMC.flatten(0, 1)[:, shape.candidate_skipped :]
        user_B1H = linear(r.user_dense_BD[:, : shape.user_dense], w["dense.user"], w["dense.bias"]).unsqueeze(1)
        item_NH = product(w, "dense.item", torch.cat([video_dense_NF, candidate_NC], dim=1))
        both_BMH = item_NH.view(*r.candidate_BM.shape, -1) + user_B1H
        hidden_BMH, direct_BMT = both_BMH[..., : -shape.outputs], both_BMH[..., -shape.outputs :]
        for layer in range(1, shape.bottom_layers):
            hidden_BMH = product(w, f"bottom.{layer}", silu(hidden_BMH))
        return silu(hidden_BMH), direct_BMT

    def _attend(
        self, w: Weights, r: Request, video_UF: torch.Tensor, candidate_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """History as each candidate sees it (B, M, A), and its plain mean (B, A). All in float32: scores are large."""
        (n_requests, length), heads = r.history_BL.shape, self.shape.heads
        events_BLA = linear(r.history_events_BLS, w["attention.event"]) + embedding(
            r.history_gap_BL, w["attention.gap"]
        )
        videos_NA = linear(video_UF.index_select(0, r.history_BL.flatten()), w["attention.kv"], w["attention.kv.bias"])
        key_BLA, value_BLA = (videos_NA.view(n_requests, length, -1) + events_BLA).chunk(2, dim=-1)
        there_BL = torch.arange(length, device=key_BLA.device) < r.history_length_B[:, None]
        value_BLA = silu(value_BLA) * there_BL.unsqueeze(-1)
        taste_BA = value_BLA.sum(1) / r.history_length_B.clamp(min=1)[:, None]
        query_UA = linear(video_UF, w["attention.query"], w["attention.query.bias"])
        query_BMA = query_UA.index_select(0, candidate_N).view(*r.candidate_BM.shape, -1)
        scores_BHML = _by_head(query_BMA, heads) @ _by_head(key_BLA, heads).transpose(-1, -2)
        scores_BHML = scores_BHML + torch.where(there_BL, 0.0, -1e9)[:, None, None]
        # Dividing after the second product: M x A numbers instead of M x L. A row of padding sums values that are zero.
        power_BHML = torch.exp(scores_BHML - scores_BHML.amax(-1, keepdim=True))
        attended_BHMA = (power_BHML @ _by_head(value_BLA, heads)) / power_BHML.sum(-1, keepdim=True)
        return attended_BHMA.transpose(1, 2).flatten(2), taste_BA

    def _cross(self, w: Weights, user_BF: torch.Tensor, item_BMF: torch.Tensor) -> torch.Tensor:
        x0_BMF = torch.cat([user_BF.unsqueeze(1).expand(-1, item_BMF.shape[1], -1), item_BMF], dim=2)
        low_BMR = product(w, "cross.0.down.item", item_BMF) + linear(user_BF, w["cross.0.down.user"]).unsqueeze(1)
        x_BMF = x0_BMF * product(w, "cross.0.up", low_BMR) + x0_BMF
        for layer in range(1, self.shape.cross_layers):
            low_BMR = product(w, f"cross.{layer}.down", x_BMF)
            x_BMF = x0_BMF * product(w, f"cross.{layer}.up", low_BMR) + x_BMF
        return x_BMF

    def _mixture(self, w: Weights, x_BMF: torch.Tensor) -> torch.Tensor:
        shape, n = self.shape, x_BMF.shape[:2]
        x_NF = layer_norm(x_BMF.flatten(0, 1), x_BMF.shape[-1:], eps=NORM_EPS)
        hidden_gate_NG = product(w, "mixture.in", x_NF)
        gates = shape.outputs * shape.experts
        hidden_NEH = silu(hidden_gate_NG[:, :-gates]).unflatten(-1, (shape.experts, -1))
        gate_NTE = hidden_gate_NG[:, -gates:].unflatten(-1, (shape.outputs, shape.experts)).softmax(-1)
        out_EHO = w["mixture.out"]
        expert_NEO = torch.bmm(hidden_NEH.transpose(0, 1).to(out_EHO.dtype), out_EHO).transpose(0, 1).float()
        norm, shift = w["mixture.norm"], w["mixture.norm.bias"]
        expert_NEO = silu(layer_norm(expert_NEO, norm.shape, norm, shift, NORM_EPS))
        opinion_NET = product(w, "mixture.head", expert_NEO)
        return (gate_NTE * opinion_NET.transpose(1, 2)).sum(-1).view(*n, -1)


def _by_head(x_BXA: torch.Tensor, heads: int) -> torch.Tensor:
    return x_BXA.unflatten(-1, (heads, -1)).transpose(1, 2)


def fold(state: Mapping[str, torch.Tensor], config: RankerConfig, sizes: RankerSizes, dense: DenseType) -> Weights:
    """The dense part of a `RankerModel.state_dict()` as `FrozenRanker` reads it; `dense`: of products a candidate."""
    shape, w = Shape.of(config, sizes), Weights()

    def keep(name: str, weight: torch.Tensor, bias: torch.Tensor | None = None, kind: DenseType = dense) -> None:
        products.keep(w, name, weight, bias, kind)

    def layer(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    exact: DenseType = "fp32"
    (first, first_bias), (direct, direct_bias) = layer("bottom.0"), layer("direct")
    both = torch.cat([first, direct])
    keep("dense.user", both[:, : shape.user_dense], kind=exact)
    keep("dense.item", both[:, shape.user_dense :])
    keep("dense.bias", torch.cat([first_bias, direct_bias]), kind=exact)
    for number in range(1, shape.bottom_layers):
        keep(f"bottom.{number}", *layer(f"bottom.{2 * number}"))  # activations lie between
    if config.history:
        # The sharpness of a head scales its keys: the video's part and the event's.
        per_key = state["attention.sharpness"].repeat_interleave(config.attention_width // config.attention_heads)
        sharp = torch.cat([per_key, torch.ones_like(per_key)])
        weight, bias = layer("attention.key_value")
        keep("attention.kv", weight * sharp[:, None], bias * sharp, kind=exact)
        keep("attention.event", state["attention.event.weight"] * sharp[:, None], kind=exact)
        keep("attention.gap", state["attention.gap.weight"] * sharp, kind=exact)
        keep("attention.query", *layer("attention.query"), kind=exact)
    if config.surface_as_context:
        keep("surface.embedding", state["surface.embedding.weight"], kind=exact)
        keep("surface.shift", state["surface.shift.weight"], kind=exact)
    order, n_user = _user_first(config, shape)
    for number in range(shape.cross_layers):
        down = state[f"cross.down.{number}.weight"][:, order]
        if number == 0:
            keep("cross.0.down.user", down[:, :n_user], kind=exact)
            keep("cross.0.down.item", down[:, n_user:])
        else:
            keep(f"cross.{number}.down", down)
        up, bias = layer(f"cross.up.{number}")
        keep(f"cross.{number}.up", up[order], bias[order])
    (hidden, hidden_bias), (gate, gate_bias) = layer("mixture.hidden"), layer("mixture.gate")
    into, bias = torch.cat([hidden, gate]), torch.cat([hidden_bias, gate_bias])
    scale, shift = layer("mixture.normalise")
    keep("mixture.in", (into * scale)[:, order], bias + into @ shift)
    keep("mixture.out", state["mixture.out_EHO"])
    keep("mixture.norm", *layer("mixture.normalise_out"), kind=exact)
    keep("mixture.head", state["mixture.head_TO"])
    return w


def _user_first(config: RankerConfig, shape: Shape) -> tuple[torch.Tensor, int]:
    """Where the interaction's inputs lie in the model's order, those of the user first, and how many these are."""
    widths = {"user": shape.user_width, "video": shape.video_width, "bottom": config.bottom_widths[-1]}
    if config.history:
        widths |= {"attended": config.attention_width, "taste": config.attention_width}
    if config.surface_as_context:
        widths |= {"surface": config.side_width}
    spans = dict(zip(widths, torch.arange(sum(widths.values())).split(list(widths.values())), strict=True))
    user = [spans[name] for name in ("user", "taste", "surface") if name in spans]
    item = [spans[name] for name in ("video", "bottom", "attended") if name in spans]
    return torch.cat([*user, *item]), sum(len(span) for span in user)
