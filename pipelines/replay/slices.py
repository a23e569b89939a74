"""Who and what a difference comes from: the first metric by slice, with intervals and a false-discovery correction.

A slice is a user's or a shown video's bucket, known before the window; its value is the weighted mean over its rows.
N rows, U users, S buckets of a dimension.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipelines.replay.bootstrap import Estimate, Totals, by_user, paired, summarise
from pipelines.replay.policies import History
from pipelines.replay.slates import Floats, Ints, Shard

FALSE_DISCOVERIES = 0.1
"""Of the slices called different, at most a tenth are expected to be chance (Benjamini and Hochberg, 1995)."""
_HOUR_MS = 3_600_000
_AGES_H = (24.0, 72.0, 168.0, 720.0)
_DURATIONS_S = (10.0, 20.0, 40.0, 80.0)
_DECILES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceResult:
    """The first metric in one slice."""

    dimension: str
    bucket: str
    rows: int
    found: Estimate
    q_value: float
    """Smallest false-discovery rate at which this slice is called different, among the policy's slices."""
    different: bool


class Slicer:
    """Cuts a part's rows by what the history and the catalogue say."""

    def __init__(self, history: History) -> None:
        self.labels: dict[str, list[str]] = {}
        self._surfaces: dict[str, int] = {}
        events = history.events
        self._users = _deciles(events, "user_id", "activity") if "user_id" in _names(events) else None
        self._videos = _deciles(events, "video_id", "popularity") if "video_id" in _names(events) else None
        self._authors = _deciles(events, "author_id", "author_size") if "author_id" in _names(events) else None

    def codes(self, shard: Shard) -> dict[str, Ints]:
        """A bucket a row for every dimension the log knows, -1 where it does not know it; `labels` names them."""
        rows = shard.rows
        found: dict[str, Ints] = {}
        for table, key, name in (
            (self._users, "user_id", "activity"),
            (self._videos, "video_id", "popularity"),
            (self._authors, "author_id", "author_size"),
        ):
            if table is not None and len(table) and key in rows.columns:
                code = rows.select(key).join(table, on=key, how="left", maintain_order="left")[name]
                found[name] = code.fill_null(_DECILES).to_numpy().astype(np.int64)
                unseen = "new" if key == "user_id" else "unseen"
                self.labels[name] = [*(f"decile {i + 1}" for i in range(_DECILES)), unseen]
        if "activity" in found:
            found["tenure"] = (found["activity"] == _DECILES).astype(np.int64)
            self.labels["tenure"] = ["seen before", "new user"]
        if "upload_ts_ms" in rows.columns:
            age_h = (rows["ts_ms"].cast(pl.Float64) - rows["upload_ts_ms"].cast(pl.Float64)).to_numpy() / _HOUR_MS
            self._cut(found, "video_age", age_h, _AGES_H, "h")
        if "duration_ms" in rows.columns:
            self._cut(found, "duration", rows["duration_ms"].cast(pl.Float64).to_numpy() / 1000, _DURATIONS_S, "s")
        if "connected" in rows.columns:
            found["connected"] = rows["connected"].cast(pl.Int64).fill_null(-1).to_numpy()
            self.labels["connected"] = ["unconnected", "connected"]
        if "surface" in rows.columns:
            found["surface"] = self._surface(rows["surface"])
        return {name: code for name, code in found.items() if (code >= 0).any()}

    def _cut(self, found: dict[str, Ints], name: str, x: Floats, edges: tuple[float, ...], unit: str) -> None:
        known = np.isfinite(x)
        found[name] = np.where(known, np.digitize(np.where(known, x, 0.0), edges), -1)
        bounds = [f"{a:g}-{b:g} {unit}" for a, b in itertools.pairwise(edges)]
        self.labels[name] = [f"under {edges[0]:g} {unit}", *bounds, f"over {edges[-1]:g} {unit}"]

    def _surface(self, surface: pl.Series) -> Ints:
        for name in surface.drop_nulls().unique().sort():
            self._surfaces.setdefault(str(name), len(self._surfaces))
        self.labels["surface"] = list(self._surfaces)
        return surface.replace_strict(self._surfaces, default=-1, return_dtype=pl.Int64).to_numpy()


def slice_sums(
    shard: Shard, codes: dict[str, Ints], reward: Floats, weights: Floats | None, users: int
) -> dict[str, Floats]:
    """Blocks (U, S) of weights and weighted rewards by bucket; without weights, rows and rewards as logged."""
    blocks = {}
    for name, code in codes.items():
        width = int(code.max()) + 2  # rows that belong to no bucket fall in column 0
        w = np.ones(len(reward)) if weights is None else weights
        for kind, values in (("w", w), ("wr", w * reward)):
            blocks[f"slice/{name}/{kind}"] = by_user(values, code + 1, shard.slates.user, users, width)
    return blocks


def judge_slices(policy: Totals, logged: Totals, labels: dict[str, list[str]]) -> list[SliceResult]:
    """Every slice with rows, in the order of its dimension; the q-values are over all of them."""
    found: list[tuple[str, str, int, Estimate, float]] = []
    for name, buckets in labels.items():
        if f"slice/{name}/w" not in policy:
            continue
        for i, bucket in enumerate(buckets):
            column = i + 1
            if column >= logged[f"slice/{name}/w"].shape[1]:
                continue
            rows = logged[f"slice/{name}/w"][:, column]
            if rows[0] <= 0 or policy[f"slice/{name}/w"][0, column] <= 0:
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                base = logged[f"slice/{name}/wr"][:, column] / rows
                value = policy[f"slice/{name}/wr"][:, column] / policy[f"slice/{name}/w"][:, column]
            found.append((name, bucket, int(rows[0]), summarise(value, base), _p_value(paired(value, base))))
    q = q_values(np.array([p for *_, p in found]))
    return [
        SliceResult(
            dimension=name,
            bucket=bucket,
            rows=rows,
            found=estimate,
            q_value=float(q[i]),
            different=bool(q[i] <= FALSE_DISCOVERIES),
        )
        for i, (name, bucket, rows, estimate, _) in enumerate(found)
    ]


def q_values(p: Floats) -> Floats:
    """Benjamini and Hochberg's adjusted p-values: smallest rate of false discoveries at which each is one."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.minimum.accumulate(scaled[::-1])[::-1]
    q = np.empty(len(p))
    q[order] = np.minimum(adjusted, 1.0)
    return q


def _p_value(difference: Floats) -> float:
    """Two-sided, of a normal whose spread is the resamples'; 1 when nothing varies or nothing can be said."""
    resampled = difference[1:][np.isfinite(difference[1:])]
    spread = float(resampled.std(ddof=1)) if len(resampled) > 1 else 0.0
    if spread <= 0 or not np.isfinite(difference[0]):
        return 1.0
    return math.erfc(abs(float(difference[0])) / spread / math.sqrt(2))


def _names(events: pl.LazyFrame) -> list[str]:
    return events.collect_schema().names()


def _deciles(events: pl.LazyFrame, key: str, name: str) -> pl.DataFrame:
    """Each key's decile (0 to 9) by its events in the history; ties are ordered by key."""
    counts = events.drop_nulls(key).group_by(key).agg(n=pl.len()).sort("n", key).collect()
    place = pl.int_range(pl.len()) * _DECILES // pl.len().clip(lower_bound=1)
    return counts.select(key, place.cast(pl.Int64).alias(name))
