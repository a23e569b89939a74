"""What a ranker is made of, apart from its weights: choices, and the sizes that the data decides. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from features.dataset import Dataset
from features.entities import SparseColumns
from ranking.tasks import TASKS


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerConfig:
    """Sizes and regularisation; the defaults score 1,000 candidates in about 10 ms on one core."""

    embedding_dim: int = 16
    """Width of every embedding."""
    half_tables: bool = False
    """Tables in fp16, their accumulators in fp32: half the memory of large ones."""
    leave_out: tuple[str, ...] = ()
    """Sparse features that are not looked up: user ids with a handful of impressions each are learnt by heart."""
    bottom_widths: tuple[int, ...] = (64, 32)
    """Layers of the MLP over the dense features of user, video and candidate."""
    cross_layers: int = 2
    """Cross layers (DCN-v2) over embeddings, bottom output and attended history."""
    cross_rank: int = 32
    """Rank of each cross layer's matrix."""
    attention_width: int = 32
    """Width of queries, keys and values of the attention over history."""
    attention_heads: int = 2
    """Heads that share the attention width."""
    n_experts: int = 4
    """Experts of the mixture (MMoE); each task has its own gate."""
    expert_widths: tuple[int, int] = (64, 32)
    """Hidden and output width of an expert."""
    dropout: float = 0.1
    """On the experts' hidden layer."""
    embedding_dropout: float = 0.1
    """On the looked-up embeddings, element by element."""
    id_dropout: float = 0.0
    """Share of the users and videos of a batch whose id is taken for unknown: it trains the row that unknown ids share,
    and the rest of the model to do without them."""
    embedding_l2: float = 0.0
    """Penalty on the squared norm of each looked-up embedding; part of the loss, so it works with fused optimisers."""
    embedding_init: float = 0.02
    """Embeddings start uniform in plus or minus this: small, so that an untrained row says almost nothing."""
    counters: bool = True
    """False leaves out the smoothed rates of user, video, author and tags, and those of the viewer with the author
    and the tags."""
    undated: bool = False
    """Also train on the impressions that precede the log: their surface, slot and time are unknown, and they have no
    counters of their own past."""
    history: bool = True
    """False leaves the attention over history out: for logs too small to learn it from."""
    surface_as_context: bool = False
    """The slot is not known when serving, the surface is. True moves the surface from the side tower, which serving
    leaves out, into the main tower: for logs whose surfaces differ in more than how far down a video stands."""
    side_width: int = 8
    """Width of the slot and surface embeddings."""
    side_dropout: float = 0.1
    """Share of examples trained without the side tower, so that the main logit stands on its own."""
    task_weights: tuple[tuple[str, float], ...] = ()
    """Loss weights of tasks that differ from 1."""
    watch_weight: float = 1.0
    """Loss weight of the watch-time quantile."""
    keep_negatives: float = 1.0
    """Share of the training impressions without any positive signal that is trained on. Those kept weigh as much more,
    so every head's loss has the expectation it had, and probabilities stay what they are without a correction."""

    def __post_init__(self) -> None:
        if self.attention_width % self.attention_heads:
            raise ValueError(
                f"RankerConfig: attention_width {self.attention_width} must be a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        if not 0.0 < self.keep_negatives <= 1.0:
            raise ValueError(
                f"RankerConfig: keep_negatives is {self.keep_negatives}, expected a share in 0 .. 1, not 0"
            )
        unknown = sorted({name for name, _ in self.task_weights} - set(TASKS))
        if unknown:
            raise ValueError(f"RankerConfig.task_weights: unknown tasks {unknown}, expected some of {TASKS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerSizes:
    """What the data decides: features, widths, tasks. Stored beside the weights."""

    user_names: tuple[str, ...]
    user_table_rows: tuple[int, ...]
    video_names: tuple[str, ...]
    video_table_rows: tuple[int, ...]
    user_dense: int
    """Dense features of a user, counters included."""
    video_dense: int
    candidate_dense: int
    surface_rows: int
    slot_rows: int
    tasks: tuple[str, ...]
    """Tasks with positives in training, in TASKS' order."""

    @classmethod
    def of(cls, dataset: Dataset, tasks: tuple[str, ...], leave_out: tuple[str, ...] = ()) -> Self:
        """Read the sizes off a dataset with at least one example."""
        one = dataset.inputs(np.zeros(1, np.int64))
        user, video = (_tables(columns, leave_out) for columns in (one.user_columns, one.video_columns))
        unknown = sorted(set(leave_out) - {*one.user_columns.names, *one.video_columns.names})
        if unknown or not user or not video:
            raise ValueError(
                f"RankerConfig.leave_out {leave_out}: unknown are {unknown}; users have {one.user_columns.names}, "
                f"videos {one.video_columns.names}, and one of each must stay"
            )
        return cls(
            user_names=tuple(user),
            user_table_rows=tuple(user.values()),
            video_names=tuple(video),
            video_table_rows=tuple(video.values()),
            user_dense=one.user_dense_BD.shape[1],
            video_dense=one.video_dense_UD.shape[1],
            candidate_dense=one.candidate_dense_NC.shape[1],
            surface_rows=dataset.encoder.spec.surface_rows,
            slot_rows=dataset.encoder.spec.max_slot + 2,
            tasks=tasks,
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        return cls(**_with_tuples(fields))


def config_fields(config: RankerConfig) -> dict[str, Any]:
    """For JSON; `config_from` is the inverse."""
    return asdict(config)


def config_from(fields: dict[str, Any]) -> RankerConfig:
    """A config from what JSON gave back."""
    fields = _with_tuples(fields)
    fields["task_weights"] = tuple((name, weight) for name, weight in fields["task_weights"])
    return RankerConfig(**fields)


def _tables(columns: SparseColumns, leave_out: tuple[str, ...]) -> dict[str, int]:
    tables = zip(columns.names, columns.table_rows, strict=True)
    return {name: rows for name, rows in tables if name not in leave_out}


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
