"""The ranker: a multi-task DLRM over TorchRec embedding collections, one logit a task and candidate.

B contexts, N candidates, U distinct videos, L history, F width of the interaction, A attention width, E experts,
T tasks. User-side work happens once a context and video-side work once a video; candidates gather both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import Batch
from features.counters import WIDTH_PER_KEY
from features.history import GAP_BUCKETS
from features.inputs import INSTANT_WIDTH
from features.schema import SIGNALS
from ranking.config import RankerConfig, RankerSizes
from ranking.dropout import RowDropout, keep_mask, required
from ranking.loss import quantile_loss, task_losses

START_SHARPNESS = 4.0
"""Attention's scale at the start, shared out over the heads by their widths; learnt from there."""
HISTORY_WIDTH = len(SIGNALS) + 1
"""What is known of one history event besides its video: the signals, and the share that was watched."""


class RankerModel(nn.Module):
    """Logits of T tasks and of the watch-time quantile for each candidate; a score never sees other candidates."""

    def __init__(
        self,
        config: RankerConfig,
        sizes: RankerSizes,
        base_rates: Mapping[str, float],
        tables_on: torch.device | None = None,
    ) -> None:
        """`base_rates`: share of positives by task, the starting point of the biases. `tables_on`: the meta device
        where the tables are filled later, by sharding or from a file."""
        super().__init__()
        self.config, self.sizes = config, sizes
        weights = dict.fromkeys(sizes.tasks, 1.0) | dict(config.task_weights)
        self.task_weights = [weights[task] for task in sizes.tasks]
        self.user_ebc = _embeddings(sizes.user_names, sizes.user_table_rows, config, tables_on)
        self.video_ebc = _embeddings(sizes.video_names, sizes.video_table_rows, config, tables_on)
        user_width = len(sizes.user_names) * config.embedding_dim
        video_width = len(sizes.video_names) * config.embedding_dim
        self._user_dense, self._skipped = sizes.user_dense, 0
        if not config.counters:
            self._user_dense, self._skipped = sizes.user_dense - WIDTH_PER_KEY, sizes.candidate_dense - INSTANT_WIDTH
        dense_width = self._user_dense + sizes.video_dense + sizes.candidate_dense - self._skipped
        self.embedding_dropout = RowDropout(config.embedding_dropout)
        self.bottom = BottomMlp(dense_width, config.bottom_widths)
        width = user_width + video_width + config.bottom_widths[-1]
        self.attention = HistoryAttention(video_width + sizes.video_dense, config) if config.history else None
        width += 2 * config.attention_width if config.history else 0
        self.surface = SurfaceContext(sizes, config) if config.surface_as_context else None
        width += config.side_width if config.surface_as_context else 0
        self.cross = LowRankCross(width, config.cross_layers, config.cross_rank)
        self.mixture = ExpertMixture(width, len(sizes.tasks) + 1, config)
        self.direct = nn.Linear(dense_width, len(sizes.tasks) + 1)
        self.side = SideTower(sizes, config)
        self._start_at(base_rates)

    def forward(self, batch: Batch, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss over `labels_NT` and `watch_quantile_N` (NaN where not logged), each row by its `weight_N`, and each
        task's own loss. `unit_N` tells examples apart: one context and one candidate each."""
        logits_NT, watch_N, penalty = self._logits(batch, with_side=True, key_N=targets["unit_N"])
        losses_T = task_losses(logits_NT, targets["labels_NT"], targets["weight_N"])
        watch = quantile_loss(watch_N, targets["watch_quantile_N"], targets["weight_N"])
        weights_T = losses_T.new_tensor(self.task_weights)
        loss = (losses_T * weights_T).sum() + self.config.watch_weight * watch + self.config.embedding_l2 * penalty
        metrics = {f"loss_{task}": losses_T[t].detach() for t, task in enumerate(self.sizes.tasks)}
        return {"loss": loss, "loss_watch": watch.detach(), **metrics}

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Serving's view, the side tower off: logits (N, T) and the logit of the watch-time quantile (N,)."""
        logits_NT, watch_N, _ = self._logits(batch, with_side=False)
        return logits_NT, watch_N

    def _logits(
        self, batch: Batch, *, with_side: bool, key_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        user_BF = _lookup(self.user_ebc, batch.user, self.sizes.user_names)
        video_UF = _lookup(self.video_ebc, batch.video, self.sizes.video_names)
        penalty = user_BF.square().sum(1).mean() + video_UF.square().sum(1).mean()
        user_BF = self.embedding_dropout(user_BF, key_N)
        video_UF = self.embedding_dropout(video_UF, batch.video_row_U)
        candidate, owner = batch.candidate_N, batch.owner_N
        user_dense_BD = batch.user_dense_BD[:, : self._user_dense]
        candidate_dense_NC = batch.candidate_dense_NC[:, self._skipped :]
        dense_NF = torch.cat([user_dense_BD[owner], batch.video_dense_UD[candidate], candidate_dense_NC], dim=1)
        direct_NT = self.direct(dense_NF)
        parts = [user_BF.index_select(0, owner), video_UF.index_select(0, candidate), self.bottom(dense_NF)]
        if self.attention is not None:
            attended_NA, taste_BA = self.attention(torch.cat([video_UF, batch.video_dense_UD], dim=1), batch)
            parts += [attended_NA, taste_BA.index_select(0, owner)]
        if self.surface is not None:
            surface_BF, shift_BT = self.surface(batch.surface_B)
            parts.append(surface_BF.index_select(0, owner))
            direct_NT = direct_NT + shift_BT.index_select(0, owner)
        out_NT = self.mixture(self.cross(torch.cat(parts, dim=1)), key_N) + direct_NT
        logits_NT, watch_N = out_NT[:, :-1], out_NT[:, -1]
        if with_side:
            logits_NT = logits_NT + self.side(batch.slot_N, batch.surface_B[owner], key_N)
        return logits_NT, watch_N, penalty

    @torch.no_grad()
    def _start_at(self, base_rates: Mapping[str, float]) -> None:
        nn.init.zeros_(self.direct.weight)
        rates_T = torch.tensor([base_rates[task] for task in self.sizes.tasks] + [0.5])
        self.direct.bias.copy_(torch.logit(rates_T, eps=1e-5))


class BottomMlp(nn.Sequential):
    """MLP with SiLU over the dense features."""

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for wider, narrower in zip((width, *widths), widths, strict=False):
            layers += [nn.Linear(wider, narrower), nn.SiLU()]
        super().__init__(*layers)


class HistoryAttention(nn.Module):
    """Each candidate looks at its context's history; keys and values are computed once a context.

    An event is its video plus what the user did with it plus how long ago: three linear parts that are added, so
    that the video's part is computed once a video, however many histories it lies in.
    """

    def __init__(self, video_width: int, config: RankerConfig) -> None:
        super().__init__()
        self.heads, self.width = config.attention_heads, config.attention_width
        self.query = nn.Linear(video_width, self.width)
        self.key_value = nn.Linear(video_width, 2 * self.width)
        self.event = nn.Linear(HISTORY_WIDTH, 2 * self.width, bias=False)
        self.gap = nn.Embedding(GAP_BUCKETS, 2 * self.width)
        nn.init.normal_(self.gap.weight, std=0.02)
        self.sharpness = nn.Parameter(torch.full((self.heads,), START_SHARPNESS))
        # Keys start equal to queries, so attention starts as "what became of videos like this one".
        nn.init.normal_(self.query.weight, std=self.width**-0.5)
        with torch.no_grad():
            self.key_value.weight[: self.width].copy_(self.query.weight)

    def forward(self, video_UF: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Attended history of each candidate (N, A), and the plain mean of each context's values (B, A)."""
        n_contexts, length = batch.history_BL.shape
        events_BLS = torch.cat([batch.history_signals_BLS, batch.history_watch_BL.unsqueeze(-1)], dim=-1)
        # index_select: its gradient on a CPU is several times faster than that of indexing or of an embedding.
        videos_BLA = self.key_value(video_UF).index_select(0, batch.history_BL.flatten()).unflatten(0, (-1, length))
        tokens_BLA = videos_BLA + self.event(events_BLS) + self.gap(batch.history_gap_BL)
        key_BLA, value_BLA = tokens_BLA.split(self.width, dim=-1)
        value_BLA = nn.functional.silu(value_BLA)
        mask_BL = torch.arange(length, device=tokens_BLA.device) < batch.history_length_B[:, None]
        share_BL = mask_BL / batch.history_length_B.clamp(min=1)[:, None]
        taste_BA = torch.einsum("bl,bla->ba", share_BL.to(value_BLA.dtype), value_BLA)
        query_NA = self.query(video_UF).index_select(0, batch.candidate_N)
        place_N, most = _places(batch.owner_N, n_contexts)
        query_BMA = query_NA.new_zeros(n_contexts, most, self.width)
        query_BMA = query_BMA.index_put((batch.owner_N, place_N), query_NA)
        attended_BMA = self._attend(query_BMA, key_BLA, value_BLA, mask_BL)
        return attended_BMA[batch.owner_N, place_N], taste_BA

    def _attend(
        self, query_BMA: torch.Tensor, key_BLA: torch.Tensor, value_BLA: torch.Tensor, mask_BL: torch.Tensor
    ) -> torch.Tensor:
        def by_head(x_BXA: torch.Tensor) -> torch.Tensor:
            return x_BXA.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        scores_BHML = by_head(query_BMA) @ by_head(key_BLA).transpose(-1, -2) * self.sharpness[:, None, None]
        scores_BHML = scores_BHML.masked_fill(~mask_BL[:, None, None, :], -1e9)
        weights_BHML = scores_BHML.softmax(-1) * mask_BL[:, None, None, :]
        return (weights_BHML @ by_head(value_BLA)).transpose(1, 2).flatten(2)


class LowRankCross(nn.Module):
    """DCN-v2: x <- x0 * (U V x + b) + x, with U V of low rank (Wang et al., WWW 2021)."""

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, x0_NF: torch.Tensor) -> torch.Tensor:
        x_NF = x0_NF
        for down, up in zip(self.down, self.up, strict=True):
            x_NF = x0_NF * up(down(x_NF)) + x_NF
        return x_NF


class ExpertMixture(nn.Module):
    """MMoE: experts with normalisation and SiLU (HoME's cure for dead experts), a gate and a head for each task."""

    def __init__(self, width: int, n_tasks: int, config: RankerConfig) -> None:
        super().__init__()
        hidden, out = config.expert_widths
        self.n_experts, self.n_tasks = config.n_experts, n_tasks
        self.normalise = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, config.n_experts * hidden)
        self.dropout = RowDropout(config.dropout)
        self.out_EHO = nn.Parameter(torch.randn(config.n_experts, hidden, out) * hidden**-0.5)
        self.normalise_out = nn.LayerNorm(out)
        self.gate = nn.Linear(width, n_tasks * config.n_experts)
        self.head_TO = nn.Parameter(torch.randn(n_tasks, out) * 0.1 * out**-0.5)

    def forward(self, x_NF: torch.Tensor, key_N: torch.Tensor | None) -> torch.Tensor:
        """(N, T) logits without bias."""
        x_NF = self.normalise(x_NF)
        hidden_NEH = self.dropout(nn.functional.silu(self.hidden(x_NF)), key_N).unflatten(-1, (self.n_experts, -1))
        experts_NEO = torch.bmm(hidden_NEH.transpose(0, 1), self.out_EHO).transpose(0, 1)
        experts_NEO = nn.functional.silu(self.normalise_out(experts_NEO))
        gates_NTE = self.gate(x_NF).unflatten(-1, (self.n_tasks, self.n_experts)).softmax(-1)
        opinions_NTE = torch.einsum("neo,to->nte", experts_NEO, self.head_TO)
        return (gates_NTE * opinions_NTE).sum(-1)


class SurfaceContext(nn.Module):
    """The request's surface as a feature of the main tower: an embedding to cross, and a plain shift of each logit."""

    def __init__(self, sizes: RankerSizes, config: RankerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.surface_rows, config.side_width)
        self.shift = nn.Embedding(sizes.surface_rows, len(sizes.tasks) + 1)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.zeros_(self.shift.weight)

    def forward(self, surface_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embedding(surface_B), self.shift(surface_B)


class SideTower(nn.Module):
    """What slot and surface alone do to each task: added in training, left out at serving (position debias)."""

    def __init__(self, sizes: RankerSizes, config: RankerConfig) -> None:
        super().__init__()
        self.slot = nn.Embedding(sizes.slot_rows, config.side_width)
        self.surface = None if config.surface_as_context else nn.Embedding(sizes.surface_rows, config.side_width)
        self.out = nn.Linear(config.side_width, len(sizes.tasks), bias=False)
        self.dropout = config.side_dropout
        for table in (self.slot, self.surface):
            if table is not None:
                nn.init.normal_(table.weight, std=0.1)

    def forward(self, slot_N: torch.Tensor, surface_N: torch.Tensor, key_N: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T) logits; in training a share of the rows, drawn by their keys, gets zeros."""
        place_NS = self.slot(slot_N)
        if self.surface is not None:
            place_NS = place_NS + self.surface(surface_N)
        logits_NT = self.out(place_NS)
        if not self.training:
            return logits_NT
        return logits_NT * keep_mask(required(key_N), 1, self.dropout)


def _embeddings(
    names: tuple[str, ...], rows: tuple[int, ...], config: RankerConfig, device: torch.device | None
) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=name,
                embedding_dim=config.embedding_dim,
                num_embeddings=table_rows,
                feature_names=[name],
                pooling=PoolingType.MEAN,
                data_type=DataType.FP16 if config.half_tables else DataType.FP32,
                weight_init_min=-config.embedding_init,
                weight_init_max=config.embedding_init,
            )
            for name, table_rows in zip(names, rows, strict=True)
        ],
    )


def _lookup(ebc: nn.Module, bags: KeyedJaggedTensor, names: tuple[str, ...]) -> torch.Tensor:
    """One embedding a feature, side by side; a sharded collection may give them in another order."""
    pooled = ebc(bags).to_dict()
    return torch.cat([pooled[name] for name in names], dim=1).float()


def _places(owner_N: torch.Tensor, n_contexts: int) -> tuple[torch.Tensor, int]:
    """Running number of each candidate among its context's, and the largest number of candidates of a context."""
    counts_B = torch.bincount(owner_N, minlength=n_contexts)
    order_N = torch.argsort(owner_N, stable=True)
    starts_B = counts_B.cumsum(0) - counts_B
    place_N = torch.empty_like(owner_N)
    place_N[order_N] = torch.arange(len(owner_N), device=owner_N.device) - starts_B[owner_N[order_N]]
    return place_N, int(counts_B.max()) if n_contexts else 0
