"""Named recipes: each is a function that returns the full configuration of a run.

A recipe says which features are read, how both models are built and trained, how the index is made, what the feed
does and what a candidate must show before it is published. The command line takes a recipe and a few dotted
overrides: `--set ranker_train.epochs=3`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from candidate_gen.index import IndexConfig
from candidate_gen.model import TowerConfig
from features.spec import Bucketed, Categorical, Content, FeatureSpec, MultiValued, Numeric
from pipelines.gate.config import GateConfig
from pipelines.training.incremental import IncrementalConfig
from pipelines.training.trainer import TrainConfig
from ranking.config import RankerConfig
from ranking.tables import Precision
from serving.config import FeedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Days by role, counted from the end of the log: training | validation | test."""

    test_days: int = 1
    """Never trained on, never used for a choice; what is reported is measured here."""
    validation_days: int = 1
    """Before the test days: early stopping and calibration."""

    def resolve(self, dates: tuple[str, ...]) -> Split:
        """Dates of each role; raises ValueError when the log is too short."""
        held_out = self.test_days + self.validation_days
        if len(dates) <= held_out:
            raise ValueError(
                f"the log has {len(dates)} days ({', '.join(dates)}), the recipe holds out {held_out} of them "
                "(split.test_days + split.validation_days): bring more days or hold out fewer"
            )
        first_test = len(dates) - self.test_days
        first_validation = first_test - self.validation_days
        return Split(
            train=dates[:first_validation], validation=dates[first_validation:first_test], test=dates[first_test:]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The dates of each role."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a run needs beside the data."""

    name: str
    spec: FeatureSpec
    max_bad_share: float = 0.05
    """Rows of a table that may break the schema, as a share; beyond it ingest refuses."""
    split: SplitConfig = field(default_factory=SplitConfig)
    retrieval_signal: str = "long_view"
    """What the towers retrieve and recall is measured on."""
    recall_at: tuple[int, ...] = (100, 500)
    towers: TowerConfig = field(default_factory=TowerConfig)
    towers_train: TrainConfig = field(default_factory=TrainConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    ranker_train: TrainConfig = field(default_factory=TrainConfig)
    incremental: IncrementalConfig = field(default_factory=IncrementalConfig)
    """How `reelrank run --since` trains both models on."""
    tables: Precision = "int8"
    """The ranker's embedding tables in a bundle."""
    index: IndexConfig = field(default_factory=IndexConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    popular_days: int | None = 3
    """Days of the log that the popular source counts; None counts all of it."""
    popularity_baselines: tuple[int, ...] = (1, 3)
    """Days of the popularity lists that retrieval is measured against, beside the whole log; the best one counts."""


def _user_features(*names: str, rows: int = 64) -> tuple[Categorical, ...]:
    return tuple(Categorical(name=name, column=name, rows=rows) for name in names)


def world_spec(*, user_rows: int, video_rows: int, author_rows: int) -> FeatureSpec:
    """Features of the simulated world."""
    return FeatureSpec(
        user=(
            Categorical(name="user_id", column="user_id", rows=user_rows, known_only=True),
            *_user_features("region", "age_bucket", "device", "declared_topic"),
            Numeric(name="register_days", column="register_days", log=True),
        ),
        video=(
            Categorical(name="video_id", column="video_id", rows=video_rows, known_only=True),
            Categorical(name="author_id", column="author_id", rows=author_rows),
            MultiValued(name="tags", column="tags", rows=256, max_values=4),
            Numeric(name="duration", column="duration_ms", log=True),
            Bucketed(name="duration_bucket", column="duration_ms", buckets=16),
            Content(name="content", column="content", dim=32),
        ),
    )


def world_smoke() -> Recipe:
    """The simulated world in seconds: 1,500 users, 4,000 videos, 8 days."""
    return Recipe(
        name="world-smoke",
        spec=world_spec(user_rows=1 << 15, video_rows=1 << 16, author_rows=1 << 14),
        feed=FeedConfig(surfaces=("feed",), popular_segment="declared_topic"),
        # On the validation day sampled negatives find more than the exact softmax (.838 against .827), and the mean of
        # a history more than its order (.844): this world's users drift, they have no sequences.
        towers=TowerConfig(full_softmax_up_to=0, encoder="none"),
        towers_train=TrainConfig(epochs=2, batch_size=32, lr_dense=3e-3, patience=1),
        ranker=RankerConfig(id_dropout=0.1),
        ranker_train=TrainConfig(epochs=2, batch_size=256, lr_dense=3e-3, lr_sparse=0.02, lr_final=0.05, patience=1),
        popular_days=1,
    )


def world_tiny() -> Recipe:
    """The simulated world at a test's size: 400 users, 800 videos, 5 days; its gate is wide, for noise rules there."""
    return replace(
        world_smoke(),
        name="world-tiny",
        spec=world_spec(user_rows=1 << 12, video_rows=1 << 12, author_rows=1 << 10),
        recall_at=(20, 100),
        # Ten seeds have recall@100 of .24 to .56: thirty steps of training.
        gate=GateConfig(min_recall_over_popularity=0.2, max_calibration_error=0.35, max_recall_drop=0.6),
        # So few steps that a falling rate of learning would leave the side tower half-way.
        ranker_train=TrainConfig(epochs=2, batch_size=128, lr_dense=3e-3, lr_sparse=0.02, patience=1),
    )


def world_small() -> Recipe:
    """The simulated world in minutes: 10,000 users, 50,000 videos, 14 days."""
    return replace(
        world_smoke(),
        name="world-small",
        spec=world_spec(user_rows=1 << 18, video_rows=1 << 19, author_rows=1 << 16),
        towers_train=TrainConfig(epochs=2, batch_size=64, lr_dense=3e-3, patience=1),
        ranker_train=TrainConfig(epochs=2, batch_size=1024, lr_dense=3e-3, lr_sparse=0.02, lr_final=0.05, patience=1),
    )


def world_full() -> Recipe:
    """The simulated world as an afternoon's training: 100,000 users, a million videos, 14 days."""
    return replace(
        world_small(),
        name="world-full",
        spec=world_spec(user_rows=1 << 20, video_rows=1 << 22, author_rows=1 << 18),
    )


KUAIRAND_ONEHOT = tuple(f"onehot_feat{i}" for i in range(18))
KUAIRAND_TOWER_ONLY = ("user_active_degree", "is_live_streamer", "is_video_author", "register_days_range",
                       *KUAIRAND_ONEHOT, "music_id", "video_type", "upload_type")  # fmt: skip
"""Features that the ranker is no better with (chosen on 04-27 and 04-28, `benchmarks.long_view`)."""


def kuairand_spec() -> FeatureSpec:
    """Features of KuaiRand's own files."""
    counts = ("register_days", "follow_user_num", "fans_user_num", "friend_user_num")
    return FeatureSpec(
        user=(
            Categorical(name="user_id", column="user_id", rows=1 << 18, known_only=True),
            *_user_features(*KUAIRAND_TOWER_ONLY[:4]),
            *_user_features(*KUAIRAND_ONEHOT, rows=2048),
            *(Numeric(name=name, column=name, log=True) for name in counts),
        ),
        video=(
            Categorical(name="video_id", column="video_id", rows=1 << 17, known_only=True),
            Categorical(name="author_id", column="author_id", rows=1 << 16),
            Categorical(name="music_id", column="music_id", rows=1 << 16),
            Categorical(name="video_type", column="video_type", rows=16),
            Categorical(name="upload_type", column="upload_type", rows=64),
            MultiValued(name="tags", column="tags", rows=256, max_values=4),
            Numeric(name="duration", column="duration_ms", log=True),
        ),
    )


def kuairand_pure() -> Recipe:
    """KuaiRand-Pure: train 04-25 .. 04-29, choose and calibrate on 04-30, test 05-01 .. 05-04."""
    return Recipe(
        name="kuairand-pure",
        spec=kuairand_spec(),
        split=SplitConfig(test_days=4, validation_days=1),
        feed=FeedConfig(
            surfaces=tuple(f"tab{i}" for i in (1, 0, 2, 4, 5, 6, 3, 7, 8, 9, 10, 11, 12, 13, 14)),
            popular_segment="onehot_feat0",
        ),
        towers_train=TrainConfig(epochs=4, batch_size=64, lr_dense=2e-3, patience=1),
        ranker=RankerConfig(
            embedding_dim=16,
            bottom_widths=(32, 16),
            cross_layers=1,
            cross_rank=16,
            n_experts=3,
            expert_widths=(32, 16),
            dropout=0.2,
            counters=False,
            undated=True,
            history=False,
            surface_as_context=True,
            leave_out=KUAIRAND_TOWER_ONLY,
            # Known of the few dated rows alone, and so loud in the sum that it would choose the epoch for all heads.
            task_weights=(("quick_skip", 0.1),),
        ),
        ranker_train=TrainConfig(epochs=3, batch_size=512, lr_sparse=0.01, patience=1),
        popular_days=None,
    )


def custom() -> Recipe:
    """Any logs in the canonical tables: ids, authors, tags and durations; add your own columns in a recipe of yours."""
    return Recipe(
        name="custom",
        spec=FeatureSpec(
            user=(Categorical(name="user_id", column="user_id", rows=1 << 20, known_only=True),),
            video=(
                Categorical(name="video_id", column="video_id", rows=1 << 20, known_only=True),
                Categorical(name="author_id", column="author_id", rows=1 << 18),
                MultiValued(name="tags", column="tags", rows=1 << 12, max_values=8),
                Numeric(name="duration", column="duration_ms", log=True),
            ),
        ),
        towers_train=TrainConfig(epochs=6, batch_size=128, patience=2),
        ranker_train=TrainConfig(epochs=2, batch_size=1024, patience=1),
    )


R = typing.TypeVar("R")

RECIPES: dict[str, Callable[[], Recipe]] = {
    "world-tiny": world_tiny,
    "world-smoke": world_smoke,
    "world-small": world_small,
    "world-full": world_full,
    "kuairand-pure": kuairand_pure,
    "custom": custom,
}


def recipe(name: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A named recipe with dotted overrides (`towers_train.epochs=3`); raises ValueError naming what is wrong."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(sorted(RECIPES))}")
    return override(RECIPES[name](), overrides)


def override(chosen: R, overrides: typing.Sequence[str]) -> R:
    """A configuration with dotted overrides (`towers_train.epochs=3`); raises ValueError naming what is wrong."""
    for change in overrides:
        path, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"override {change!r}: write it as section.field=value")
        chosen = _override(chosen, path.split("."), text, change)
    return chosen


def to_json(value: Recipe) -> str:
    """Readable JSON of the whole recipe, for the run's folder and the bundle."""
    return json.dumps(dataclasses.asdict(value), indent=2, sort_keys=True)


def _override(config: Any, path: list[str], text: str, whole: str) -> Any:
    known = {f.name for f in fields(config)}
    if path[0] not in known:
        raise ValueError(
            f"override {whole!r}: {type(config).__name__} has no field {path[0]!r}; it has {sorted(known)}"
        )
    current = getattr(config, path[0])
    if len(path) > 1:
        if not is_dataclass(current):
            raise ValueError(f"override {whole!r}: {path[0]} has no fields of its own")
        return replace(config, **{path[0]: _override(current, path[1:], text, whole)})
    hint = typing.get_type_hints(type(config))[path[0]]
    return replace(config, **{path[0]: _parse(text, hint, whole)})


def _parse(text: str, hint: Any, whole: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, list):
        value = tuple(value)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"override {whole!r}: choose from {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if hint is str:  # "3" may be a name
        return text
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if isinstance(value, int) and not isinstance(value, bool) and float in plain and int not in plain:
        value = float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        raise ValueError(f"override {whole!r}: expected {hint}, found {text!r}")
    return value
