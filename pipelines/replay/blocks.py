"""What can be said without propensities: how values order what was shown, and what the slates look like.

Ranking metrics need whole users in memory, so a long log is judged on a sample of its users, chosen by a hash.
N rows, R slates, K slots, D width of a content vector.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from pipelines import metrics as m
from pipelines.replay.keys import uniforms
from pipelines.replay.rewards import WATCH_METRIC
from pipelines.replay.slates import Floats, Ints, Shard

SLATES_SAMPLED = 20_000
"""Slates that list metrics are taken on."""
MIN_POSITIVES = 20
"""A signal with fewer positives has no AUC worth printing."""
DURATION_EDGES_S = (10.0, 20.0, 40.0, 80.0)
_SALT = 33


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingBlock:
    """How a policy's values and predictions fit the shown rows."""

    rows: int
    users: int
    sampled: float
    """Share of the users that these are."""
    by_metric: list[dict[str, Any]]
    """auc, both GAUCs, and of predictions normalised entropy, calibration, ece, by metric."""
    watch: list[dict[str, Any]]
    """MAE and XAUC of predicted seconds, by duration bucket."""
    reliability: dict[str, dict[str, list[float]]]


@dataclass(slots=True)
class RankingRows:
    """Collects the sampled users' rows of one policy."""

    _kept: list[dict[str, np.ndarray]] = field(default_factory=list)
    _sampled: float = 1.0

    def add(self, shard: Shard, values_C: Floats, predicted: dict[str, Floats]) -> None:
        self._sampled = 1.0 / shard.requests.part.of  # a part's worth of rows: AUC is then known to about .001
        rows = np.flatnonzero((uniforms(shard.user_ids_U, _SALT) < self._sampled)[shard.slates.user])
        shown = shard.slates.candidate[rows]
        part = {"user": shard.user_ids_U[shard.slates.user[rows]], "value": values_C[shown]}
        part |= {f"reward/{name}": reward[rows] for name, reward in shard.rewards.items()}
        part |= {f"predicted/{name}": prediction[shown] for name, prediction in predicted.items()}
        if "duration_ms" in shard.rows.columns:
            part["duration_s"] = shard.rows["duration_ms"].cast(pl.Float64).to_numpy()[rows] / 1000
        self._kept.append(part)

    def block(self, names: tuple[str, ...]) -> RankingBlock:
        """The metrics of `names` (signals and `watch_s`) over all rows collected."""
        columns = {key: np.concatenate([part[key] for part in self._kept]) for key in self._kept[0]}
        by_metric, reliability = [], {}
        for name in names:
            reward, prediction = columns[f"reward/{name}"], columns.get(f"predicted/{name}")
            row = _ordering(name, reward, columns["value"], columns["user"])
            if prediction is not None and name != WATCH_METRIC:
                row |= _predictions(reward, prediction)
                reliability[name] = {k: v.tolist() for k, v in asdict(m.reliability(reward, prediction)).items()}
            by_metric.append(row)
        return RankingBlock(
            rows=len(columns["user"]),
            users=len(np.unique(columns["user"])),
            sampled=self._sampled,
            by_metric=by_metric,
            watch=_watch(columns),
            reliability=reliability,
        )


def _ordering(name: str, reward: Floats, value: Floats, user: Ints) -> dict[str, Any]:
    row: dict[str, Any] = {"metric": name, "rows": len(reward)}
    if name == WATCH_METRIC:
        return row | {"xauc": m.xauc(reward, value)}
    positives = int(reward.sum())
    row["positives"] = positives
    if MIN_POSITIVES <= positives <= len(reward) - MIN_POSITIVES:
        row |= {
            "auc": m.auc(reward, value),
            "gauc_positives": m.gauc(reward, value, user, weight="positives"),
            "gauc_impressions": m.gauc(reward, value, user, weight="impressions"),
        }
    return row


def _predictions(reward: Floats, prediction: Floats) -> dict[str, Any]:
    return {
        "normalised_entropy": m.normalised_entropy(reward, prediction),
        "calibration": m.calibration(reward, prediction),
        "ece": m.expected_calibration_error(reward, prediction),
    }


def _watch(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    actual, predicted = columns.get(f"reward/{WATCH_METRIC}"), columns.get(f"predicted/{WATCH_METRIC}")
    if actual is None or predicted is None:
        return []
    found = [
        {"duration": "all", "rows": len(actual), "mae_s": m.mae(actual, predicted), "xauc": m.xauc(actual, predicted)}
    ]
    if "duration_s" in columns:
        bucket = np.digitize(columns["duration_s"], DURATION_EDGES_S)
        bounds = (0.0, *DURATION_EDGES_S, float("inf"))
        for i in np.unique(bucket):
            mine = bucket == i
            row = {"duration": f"{bounds[i]:g}-{bounds[i + 1]:g} s", "rows": int(mine.sum())}
            found.append(
                row | {"mae_s": m.mae(actual[mine], predicted[mine]), "xauc": m.xauc(actual[mine], predicted[mine])}
            )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ListBlock:
    """What the slates look like, over the first slates of full length."""

    slates: int
    author_repeats: float | None
    """Share of the slots below the first whose author stands above them."""
    topic_entropy_nats: float | None
    """Entropy of the first tags within a slate, averaged."""
    intra_list_distance: float | None
    """Mean 1 - cosine of the content vectors of two videos of a slate."""


class Catalogue:
    """What is known of videos, by row of the videos table."""

    def __init__(self, videos: pl.DataFrame) -> None:
        self._ids = videos["video_id"].to_numpy() if len(videos) else np.zeros(0, dtype=np.int64)
        self._order = np.argsort(self._ids)
        self.authors = 0
        self.author_V: Ints | None = None
        if "author_id" in videos.columns and videos["author_id"].is_not_null().any():
            ids, code = np.unique(videos["author_id"].fill_null(0).to_numpy(), return_inverse=True)
            self.author_V = np.where(videos["author_id"].is_null().to_numpy(), -1, code)
            self.authors = len(ids)
        self.topic_V: Ints | None = None
        if "tags" in videos.columns and videos["tags"].is_not_null().any():
            first = videos["tags"].list.first()
            self.topic_V = np.unique(first.fill_null(-1).to_numpy(), return_inverse=True)[1]
        self.content_VD: np.ndarray | None = None
        if "content" in videos.columns and len(videos) and videos["content"].null_count() == 0:
            flat = videos["content"].explode(empty_as_null=False).to_numpy().reshape(len(videos), -1)
            self.content_VD = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    def rows(self, video_ids: Ints) -> Ints:
        """Row of each video; -1 for those the table does not hold."""
        if not len(self._ids):
            return np.full(len(video_ids), -1, dtype=np.int64)
        ordered = self._ids[self._order]
        place = np.minimum(np.searchsorted(ordered, video_ids), len(ordered) - 1)
        return np.where(ordered[place] == video_ids, self._order[place], -1)

    def authors_of(self, video_ids: Ints) -> Ints:
        """Author code of each video, -1 where it is not known."""
        if self.author_V is None:
            return np.full(len(video_ids), -1, dtype=np.int64)
        row = self.rows(video_ids)
        return np.where(row >= 0, self.author_V[row], -1)

    def list_block(self, shard: Shard, candidate_N: Ints) -> ListBlock | None:
        """List metrics of the slates that have `candidate_N` in place of the logged rows; None without two slots."""
        slots = int(shard.slates.slot.max()) + 1
        last = np.flatnonzero(shard.slates.slot == slots - 1)[:SLATES_SAMPLED]
        if slots < 2 or not last.size:
            return None
        rows_RK = last[:, None] - np.arange(slots - 1, -1, -1)
        row_RK = self.rows(shard.requests.video_ids[candidate_N[rows_RK.ravel()]]).reshape(rows_RK.shape)
        row_RK = row_RK[(row_RK >= 0).all(axis=1)]
        if not len(row_RK):
            return None
        return ListBlock(
            slates=len(row_RK),
            author_repeats=None if self.author_V is None else _repeats(self.author_V[row_RK]),
            topic_entropy_nats=None if self.topic_V is None else _entropy(self.topic_V[row_RK]),
            intra_list_distance=None if self.content_VD is None else _distance(self.content_VD[row_RK]),
        )


def _repeats(author_RK: Ints) -> float:
    slots = author_RK.shape[1]
    again = [(author_RK[:, k, None] == author_RK[:, :k]).any(axis=1) for k in range(1, slots)]
    return float(np.mean(again))


def _entropy(topic_RK: Ints) -> float:
    """-sum p log p with p = c / K for c slots of a topic: the mean over slots of -log(c / K)."""
    count_RK = (topic_RK[:, :, None] == topic_RK[:, None, :]).sum(axis=2)
    return float(-np.log(count_RK / topic_RK.shape[1]).mean())


def _distance(content_RKD: np.ndarray) -> float:
    """Of unit vectors: the sum of all pairs is (|sum|^2 - K) / 2."""
    slots = content_RKD.shape[1]
    pairs = ((content_RKD.sum(axis=1) ** 2).sum(axis=1) - slots) / (slots * (slots - 1))
    return float(1 - pairs.mean())
