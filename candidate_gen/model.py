"""Two towers: a video's features become one vector, a user's features and history another; their dot product ranks.

Affinity is the cosine of both. What holds for every user alike, a video's age and how it did lately, is a scalar beside
it, the prior: score(user, video, instant) = cosine + prior. Both become one inner product of unit vectors (`place_*`).

B users, L history, U distinct videos of the batch, N positions that want a user vector, M (video, instant) pairs with
C features, E width of the towers, D = E + 2 width of the vectors, F joined embeddings. Position p of a history has seen
its first p events, so 0 is the user without any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from candidate_gen.encoder import GAP_BUCKETS, LAYERS, EncoderConfig, SequenceEncoder, gap_buckets
from candidate_gen.loss import full_softmax, sampled_softmax
from features.batch import Batch
from features.dataset import Dataset
from features.history import UNDATED_TS_MS
from features.inputs import AGE_WIDTH
from features.schema import SIGNALS
from features.spec import Categorical

FEEDBACK = len(SIGNALS) + 2
"""Feedback columns of an event: the signals, skipped (none of them), and the watch fraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Architecture, loss and sampling of the towers."""

    dim: int = 64
    """Width of the vectors that are indexed and searched; two of it carry the prior, the rest the towers' output."""
    embedding_dim: int = 32
    """Width of every embedding table; TorchRec's CPU kernels want a multiple of 4."""
    hidden: int = 256
    """Width of the hidden layer in either tower's MLP."""
    encoder: str = "ligr"
    """Over the history, beside the mean of its events' tokens (as in Covington et al., RecSys 2016): a kind of
    `candidate_gen.encoder`, or "none" for the mean alone, whatever the events' order and times."""
    layers: int = 2
    """Of the encoder; "none" has no layers, heads or dropout."""
    heads: int = 2
    dropout: float = 0.1
    content: bool = True
    """Videos are known by author, tags, duration and content beside their ids; off, by their ids alone (the prior then
    still counts what author and tags did)."""
    id_dropout: float = 0.15
    """Share of ids (of video and user) that each training step treats as unknown, so that content alone must do."""
    temperature: float = 0.05
    """Cosines are divided by this before the softmax."""
    prior_bound: float = 0.5
    """The prior lies between minus and plus this, beside cosines between -1 and 1."""
    prior_hidden: int = 32
    """Width of the hidden layer in the prior's MLP."""
    positives: tuple[str, ...] = ("long_view",)
    """An impression with any of these signals is something to retrieve."""
    full_softmax_up_to: int = 10_000
    """Catalogues of at most this many eligible videos are trained on exactly, without sampling: every positive against
    all videos there were at its instant. The rest of the sampling settings then goes unused."""
    uniform_ratio: float = 0.5
    """Negatives drawn uniformly for each in-batch one (the positives of the batch's other users)."""
    correct_sampling: bool = True
    """logQ: weigh negatives by how often they are drawn. Off, popular videos are pushed down."""
    frequencies: str = "day"
    """What logQ takes for that: "day", a count of the video's day, or "streaming", a moving average that needs no look
    ahead, for logs that are trained on as they come."""
    window_stride: int = 50
    """Training windows of one user begin this many events apart; a target then sees at least history - stride."""

    def __post_init__(self) -> None:
        if unknown := set(self.positives) - set(SIGNALS):
            raise ValueError(f"TowerConfig.positives: {sorted(unknown)} are no signals; choose from {SIGNALS}")
        if not self.positives:
            raise ValueError("TowerConfig.positives is empty: name at least one signal to retrieve by")
        if self.encoder not in (*LAYERS, "none"):
            raise ValueError(f"TowerConfig.encoder {self.encoder!r}: choose from {', '.join(LAYERS)} and none")
        if self.inner_dim < 1 or self.inner_dim % self.heads:
            raise ValueError(f"TowerConfig.dim {self.dim} less 2 is not a multiple of heads {self.heads}")
        if self.frequencies not in ("day", "streaming"):
            raise ValueError(f"TowerConfig.frequencies {self.frequencies!r}: choose day or streaming")
        if self.uniform_ratio < 0:
            raise ValueError(f"TowerConfig.uniform_ratio is {self.uniform_ratio}, it must not be below 0")
        if self.prior_bound <= 0:
            raise ValueError(f"TowerConfig.prior_bound is {self.prior_bound}, it must be above 0")

    @property
    def inner_dim(self) -> int:
        """E: width of the towers' output."""
        return self.dim - 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerSizes:
    """What of the data the weights depend on; exported beside them."""

    user_tables: tuple[tuple[str, int], ...]
    """(feature, rows of its table), in the order of the batch."""
    video_tables: tuple[tuple[str, int], ...]
    id_features: tuple[str, ...]
    """Tables whose row 0 means an id without training data."""
    user_dense: int
    """Leading dense columns of a user that are read; the counters behind them are of one day, a window spans many."""
    video_dense: int
    candidate_dense: int
    """Features of (video, instant) that the prior reads: counters and age."""
    surface_rows: int
    history_length: int

    @classmethod
    def of(cls, dataset: Dataset) -> TowerSizes:
        """The sizes of a dataset's encoder."""
        encoder = dataset.encoder
        user, video = encoder.columns("user"), encoder.columns("video")
        known_only = [f for f in (*encoder.spec.user, *encoder.spec.video) if isinstance(f, Categorical)]
        return cls(
            user_tables=tuple(zip(user.names, user.table_rows, strict=True)),
            video_tables=tuple(zip(video.names, video.table_rows, strict=True)),
            id_features=tuple(f.name for f in known_only if f.known_only),
            user_dense=encoder.dense_width("user"),
            video_dense=encoder.dense_width("video"),
            candidate_dense=dataset.counters.video_day[0].shape[1] + AGE_WIDTH,
            surface_rows=encoder.spec.surface_rows,
            history_length=encoder.spec.history_length,
        )


class TowersModel(nn.Module):
    """Both towers and their loss; each EmbeddingBagCollection is looked up once a forward."""

    def __init__(self, config: TowerConfig, sizes: TowerSizes, tables_on: torch.device | None = None) -> None:
        """`tables_on`: the meta device where sharding fills the tables later."""
        super().__init__()
        self.config, self.sizes = config, sizes
        self.user_ebc = _embeddings(sizes.user_tables, config.embedding_dim, tables_on)
        video_tables, video_dense = sizes.video_tables, sizes.video_dense
        if not config.content:
            video_tables, video_dense = tuple(t for t in video_tables if t[0] in sizes.id_features), 0
        self.video_ebc = _embeddings(video_tables, config.embedding_dim, tables_on)
        self.user_features = JoinedFeatures(sizes.user_tables, sizes.id_features, sizes.user_dense, config)
        self.video_features = JoinedFeatures(video_tables, sizes.id_features, video_dense, config)
        self.video_mlp = _mlp(self.video_features.width, config.hidden, config.inner_dim)
        self.prior_mlp = _mlp(sizes.candidate_dense, config.prior_hidden, 1)
        self.history = HistoryEncoder(config, sizes.history_length)
        self.surface = nn.Embedding(sizes.surface_rows, config.embedding_dim)
        self.gap = nn.Embedding(GAP_BUCKETS, config.embedding_dim)
        for table in (self.surface, self.gap):
            nn.init.normal_(table.weight, std=0.02)
        query_width = config.inner_dim + self.user_features.width + 2 * config.embedding_dim
        self.user_mlp = _mlp(query_width, config.hidden, config.inner_dim)

    def forward(self, batch: Batch, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`targets`: each candidate's history position and surface; then what its loss needs. Sampled: features of the
        uniform negatives at the instants they are drawn for, and the log of how often each column is drawn. Exact:
        features of all G x X (day, video), the candidate's day among G, and how many videos there were by then."""
        video_UE = self.encode_videos(batch.video, batch.video_dense_UD)
        user_NE = self.encode_users(batch, video_UE, batch.owner_N, targets["position_N"], targets["surface_N"])
        unit_UE = functional.normalize(video_UE, dim=-1)
        if "catalogue_dense_GXC" in targets:
            return full_softmax(
                user_NE,
                unit_UE,
                positive_N=batch.candidate_N,
                owner_N=batch.owner_N,
                catalogue_X=batch.extra_X,
                uploaded_N=targets["uploaded_N"],
                prior_N=self.prior(batch.candidate_dense_NC),
                prior_NX=self.prior(targets["catalogue_dense_GXC"])[targets["day_N"]],
                temperature=self.config.temperature,
            )
        prior_M = self.prior(torch.cat([batch.candidate_dense_NC, targets["extra_dense_XC"]]))
        return sampled_softmax(
            user_NE,
            unit_UE,
            positive_N=batch.candidate_N,
            owner_N=batch.owner_N,
            uniform_X=batch.extra_X,
            prior_N=prior_M[: len(batch.candidate_N)],
            prior_X=prior_M[len(batch.candidate_N) :],
            log_draws_N=targets["log_draws_N"],
            log_draws_X=targets["log_draws_X"],
            temperature=self.config.temperature,
            correct=self.config.correct_sampling,
        )

    def encode_videos(self, video: KeyedJaggedTensor, dense_UD: torch.Tensor) -> torch.Tensor:
        """(U, E) before normalisation: what the history reads, and what normalised is the video's direction."""
        return self.video_mlp(self.video_features(self.video_ebc(video), video, dense_UD))

    def prior(self, candidate_dense_MC: torch.Tensor) -> torch.Tensor:
        """(M,) in -prior_bound .. prior_bound: what a video's age and counters say of it, whoever asks."""
        return self.config.prior_bound * torch.tanh(self.prior_mlp(candidate_dense_MC).squeeze(-1))

    def place_videos(self, unit_ME: torch.Tensor, prior_M: torch.Tensor) -> torch.Tensor:
        """(M, D) unit vectors (v, prior, c) / sqrt(1 + bound^2); c makes up what the prior lacks in length."""
        bound = self.config.prior_bound
        slack_M = (bound**2 - prior_M**2).clamp(min=0).sqrt()
        placed_MD = torch.cat([unit_ME, prior_M.unsqueeze(1), slack_M.unsqueeze(1)], dim=1)
        return placed_MD / math.sqrt(1 + bound**2)

    def place_users(self, unit_NE: torch.Tensor) -> torch.Tensor:
        """(N, D) unit vectors (u, 1, 0) / sqrt(2): their products with placed videos order as cosine + prior do."""
        one_N1 = torch.ones_like(unit_NE[:, :1])
        return torch.cat([unit_NE, one_N1, torch.zeros_like(one_N1)], dim=1) / math.sqrt(2)

    def encode_users(
        self,
        batch: Batch,
        video_UE: torch.Tensor,
        owner_N: torch.Tensor,
        position_N: torch.Tensor,
        surface_N: torch.Tensor,
    ) -> torch.Tensor:
        """(N, E) normalised: user `owner` after `position` events, asking on a surface.

        A position is asked at the time of the event that followed it, the last one at the request's own. That is no
        look ahead: what followed was shown in answer to this very request, so training and serving know the same."""
        user_BF = self.user_features(self.user_ebc(batch.user), batch.user, batch.user_dense_BD)
        event_ms_BP, asked_ms_BP = history_times(batch)
        state_BPE = self.history(
            video_UE[batch.history_BL], batch.history_signals_BLS, batch.history_watch_BL, event_ms_BP, asked_ms_BP
        )
        state_NE = state_BPE[owner_N, position_N]
        gap_N11 = gap_buckets(asked_ms_BP[owner_N, position_N, None], event_ms_BP[owner_N, position_N, None])
        if self.training:  # row 0, "no surface", must be of use to whoever asks without one
            keep_N = torch.rand(len(surface_N), device=surface_N.device) >= self.config.id_dropout
            surface_N = surface_N * keep_N
        query_NQ = torch.cat([state_NE, user_BF[owner_N], self.surface(surface_N), self.gap(gap_N11.flatten())], dim=-1)
        return functional.normalize(state_NE + self.user_mlp(query_NQ), dim=-1)


def history_times(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P = L + 1) int64 twice: when the event of each token was, the start token's unknown; and when each position
    asked, which is the time of the event behind it, the request's where there is none."""
    event_ms_BL, now_ms_B1 = batch.history_ts_ms_BL, batch.now_ms_B[:, None]
    at_L = torch.arange(event_ms_BL.shape[1], device=event_ms_BL.device)
    followed_BL = at_L < batch.history_length_B[:, None]
    asked_ms_BP = torch.cat([torch.where(followed_BL, event_ms_BL, now_ms_B1), now_ms_B1], dim=1)
    return torch.cat([torch.full_like(now_ms_B1, UNDATED_TS_MS), event_ms_BL], dim=1), asked_ms_BP


class JoinedFeatures(nn.Module):
    """Pooled embeddings and dense features side by side; an unknown or dropped id becomes one learned vector."""

    def __init__(
        self, tables: tuple[tuple[str, int], ...], id_features: tuple[str, ...], dense: int, config: TowerConfig
    ) -> None:
        super().__init__()
        self.names = tuple(name for name, _ in tables)
        self.unknown = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(config.embedding_dim)) for name in self.names if name in id_features}
        )
        self.dense, self.id_dropout = dense, config.id_dropout
        self.width = len(tables) * config.embedding_dim + dense

    def forward(self, pooled: KeyedTensor, rows: KeyedJaggedTensor, dense_ND: torch.Tensor) -> torch.Tensor:
        parts = []
        for name in self.names:
            part = pooled[name]
            if name in self.unknown:
                known_N1 = self._known(rows, name).unsqueeze(1)
                part = torch.where(known_N1, part, self.unknown[name])
            parts.append(part)
        return torch.cat([*parts, dense_ND[:, : self.dense]], dim=-1)

    def _known(self, rows: KeyedJaggedTensor, name: str) -> torch.Tensor:
        """(N,) bool: the id has a trained row, and this step's dropout spares it."""
        bags = rows[name]
        lengths_N = bags.lengths()
        known_N = torch.zeros(len(lengths_N), dtype=torch.bool, device=lengths_N.device)
        known_N[lengths_N > 0] = bags.values() > 0
        if self.training and self.id_dropout > 0:
            known_N &= torch.rand(len(known_N), device=known_N.device) >= self.id_dropout
        return known_N


class HistoryEncoder(nn.Module):
    """Tokens of a start and L events, and two readings of them, added: their running mean, which holds a steady taste,
    and a sequence encoder, which holds order and time. State p has seen events 0 .. p-1."""

    def __init__(self, config: TowerConfig, history_length: int) -> None:
        super().__init__()
        dim = config.inner_dim
        self.start_E = nn.Parameter(torch.randn(dim) * 0.02)
        self.video = nn.Linear(dim, dim)
        self.feedback = nn.Linear(FEEDBACK, dim)
        self.regard = nn.Linear(FEEDBACK, dim)
        self.mean_norm = nn.LayerNorm(dim)
        self.encoder = None
        if config.encoder != "none":
            sequence = EncoderConfig(
                kind=config.encoder,  # pyright: ignore[reportArgumentType]
                dim=dim,
                layers=config.layers,
                heads=config.heads,
                dropout=config.dropout,
                time_gaps=True,
            )
            self.encoder = SequenceEncoder(sequence, positions=history_length + 1)

    def forward(
        self,
        video_BLE: torch.Tensor,
        signals_BLS: torch.Tensor,
        watch_BL: torch.Tensor,
        event_ms_BP: torch.Tensor,
        asked_ms_BP: torch.Tensor,
    ) -> torch.Tensor:
        """(B, L + 1, E). Padding stands behind the last event, where no state that is read can see it."""
        skipped_BL1 = (signals_BLS == 0).all(dim=-1, keepdim=True).to(signals_BLS.dtype)
        feedback_BLF = torch.cat([signals_BLS, skipped_BL1, watch_BL.unsqueeze(-1)], dim=-1)
        # What was felt turns what was seen: a skipped video may count against its kind, a sum alone could not say so.
        regard_BLE = 2 * torch.tanh(self.regard(feedback_BLF))
        event_BLE = self.video(video_BLE) * regard_BLE + self.feedback(feedback_BLF)
        start_B1E = self.start_E.expand(len(event_BLE), 1, -1)
        token_BPE = torch.cat([start_B1E, event_BLE], dim=1)
        count_P1 = torch.arange(1, token_BPE.shape[1] + 1, device=token_BPE.device).unsqueeze(1)
        state_BPE = self.mean_norm(token_BPE.cumsum(dim=1) / count_P1)
        if self.encoder is not None:
            state_BPE = state_BPE + self.encoder(token_BPE, event_ms_BP, asked_ms_BP)
        return state_BPE


def _embeddings(tables: tuple[tuple[str, int], ...], dim: int, device: torch.device | None) -> EmbeddingBagCollection:
    """One table a feature, lists mean-pooled. Rows start near zero: an id seen once says little beside the content."""
    return EmbeddingBagCollection(
        device=device or torch.device("cpu"),
        tables=[
            EmbeddingBagConfig(
                name=name,
                feature_names=[name],
                num_embeddings=rows,
                embedding_dim=dim,
                pooling=PoolingType.MEAN,
                weight_init_min=-0.01,
                weight_init_max=0.01,
            )
            for name, rows in tables
        ],
    )


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
