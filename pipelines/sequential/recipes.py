"""Named recipes of the sequential benchmarks: a public file's columns, the model, and what others reached on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from candidate_gen.encoder import EncoderConfig
from pipelines.recipes import override
from pipelines.sequential.data import SourceConfig
from pipelines.sequential.metrics import Exclude
from pipelines.sequential.model import NextItemConfig
from pipelines.sequential.train import SequentialTrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Somebody's figures on the same data and a comparable protocol."""

    name: str
    hr10: float
    ndcg10: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SequentialRecipe:
    """Everything a run needs beside the file."""

    name: str
    source: SourceConfig = field(default_factory=SourceConfig)
    model: NextItemConfig = field(default_factory=NextItemConfig)
    train: SequentialTrainConfig = field(default_factory=SequentialTrainConfig)
    exclude: Exclude = "seen"
    """Which items are no candidates: all that the user has seen before, those in the model's window, or none."""
    refit: bool = False
    """Before the test, train anew on the validation items too, for as many epochs as the best one took."""
    published: tuple[Published, ...] = ()


ESASREC = "eSASRec, arXiv 2508.06450, blondered/transformer_benchmark"


def ml_1m() -> SequentialRecipe:
    """MovieLens-1M `ratings.dat`, every rating, stable tie order."""
    return SequentialRecipe(
        name="ml-1m",
        source=SourceConfig(time_unit="s"),
        model=NextItemConfig(encoder=EncoderConfig(dim=64, layers=2, heads=2, dropout=0.2), length=200),
        train=SequentialTrainConfig(epochs=100, patience=10),
        published=(
            Published(name="SASRec + sampled softmax", hr10=0.2929, ndcg10=0.1684, source=ESASREC),
            Published(name="HSTU", hr10=0.3037, ndcg10=0.1719, source=ESASREC),
            Published(name="eSASRec", hr10=0.3133, ndcg10=0.1772, source=ESASREC),
            Published(name="FuXi-alpha", hr10=0.3164, ndcg10=0.1813, source=ESASREC),
        ),
    )


def amazon_beauty() -> SequentialRecipe:
    """Amazon Beauty 5-core as S3-Rec distributes it (`Beauty.txt`: user item item ...)."""
    return SequentialRecipe(
        name="amazon-beauty",
        source=SourceConfig(order=""),
        model=NextItemConfig(encoder=EncoderConfig(dim=64, layers=1, heads=2, dropout=0.3), length=50),
        train=SequentialTrainConfig(epochs=200, patience=20),
        published=(
            Published(name="S3-Rec", hr10=0.0647, ndcg10=0.0327, source="S3-Rec, as reported"),
            Published(name="HSTU", hr10=0.0788, ndcg10=0.0439, source=ESASREC),
            Published(name="eSASRec", hr10=0.0928, ndcg10=0.0523, source=ESASREC),
        ),
    )


def kuairand_pure() -> SequentialRecipe:
    """KuaiRand-Pure: long views of 04-09 .. 04-24 in time order, from `train_impressions_last50.parquet`."""
    return SequentialRecipe(
        name="kuairand-pure",
        source=SourceConfig(user="user_id", item="video_id", order="seq_pos", where="long_view=1"),
        model=NextItemConfig(encoder=EncoderConfig(dim=64, layers=2, heads=2, dropout=0.2), length=50),
        train=SequentialTrainConfig(epochs=40, patience=4),
    )


RECIPES: dict[str, Callable[[], SequentialRecipe]] = {
    "ml-1m": ml_1m,
    "amazon-beauty": amazon_beauty,
    "kuairand-pure": kuairand_pure,
}


def sequential_recipe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    user: str | None = None,
    item: str | None = None,
    order: str | None = None,
    where: str | None = None,
) -> SequentialRecipe:
    """A named recipe for a file with these columns, with dotted overrides; ValueError names what is wrong."""
    if name not in RECIPES:
        raise ValueError(f"no sequential recipe {name!r}; there are {', '.join(RECIPES)}")
    chosen = RECIPES[name]()
    columns = {"user": user, "item": item, "order": order, "where": where}
    given = {key: value for key, value in columns.items() if value is not None}
    return override(replace(chosen, source=replace(chosen.source, **given)), overrides)
