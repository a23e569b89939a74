"""Columns to model inputs: the one implementation of every transform, fitted once, used in training and serving.

N rows of a canonical table, W sparse slots, D dense width. What is fitted (means, deviations, known ids) is saved
beside the spec and travels in the bundle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.entities import Entities, SparseColumns
from features.hashing import bucket, hash_int64, hash_strings
from features.spec import Bucketed, Categorical, Content, Feature, FeatureSpec, MultiValued, Numeric


@dataclass(frozen=True, slots=True)
class Encoder:
    """A fitted feature spec."""

    spec: FeatureSpec
    stats: dict[str, tuple[float, ...]]
    """Mean and deviation of each numeric feature (after its log), edges of each bucketed one, keyed by SIDE.NAME."""
    known: dict[str, np.ndarray]
    """Sorted ids with training data, keyed by SIDE.NAME, for features that ask for `known_only`."""

    @classmethod
    def fit(
        cls, spec: FeatureSpec, users: pa.Table, videos: pa.Table, *, seen_users: np.ndarray, seen_videos: np.ndarray
    ) -> Encoder:
        """Fit on the entities that occur in training: `seen_*` are their ids (any order, repeats allowed)."""
        stats: dict[str, tuple[float, ...]] = {}
        known: dict[str, np.ndarray] = {}
        for side, features, table, key, seen in (
            ("user", spec.user, users, "user_id", seen_users),
            ("video", spec.video, videos, "video_id", seen_videos),
        ):
            fitting = _seen(table, key, seen)
            for feature in features:
                if isinstance(feature, Numeric):
                    stats[f"{side}.{feature.name}"] = _mean_and_deviation(_raw_number(fitting, feature))
                elif isinstance(feature, Bucketed):
                    stats[f"{side}.{feature.name}"] = _edges(_floats(fitting, feature.column), feature.buckets)
                elif isinstance(feature, Categorical) and feature.known_only:
                    known[f"{side}.{feature.name}"] = np.unique(_integers(fitting, feature.column)[0])
        return cls(spec=spec, stats=stats, known=known)

    def carried_on(
        self,
        users: pa.Table,
        videos: pa.Table,
        *,
        seen_users: np.ndarray,
        seen_videos: np.ndarray,
        recent_users: np.ndarray,
        recent_videos: np.ndarray,
    ) -> tuple[Encoder, dict[str, np.ndarray]]:
        """For a model that trains on with more days: what was fitted stays, the known ids move on.

        `seen_*`: ids in the new training days; `recent_*`: ids that may stay known, the new ones among them. Also
        gives, by SIDE.NAME, the embedding rows (R,) int64 that change hands: those of new ids and of forgotten ones,
        but for rows that an id which stays has by the hash as well."""
        known, renewed = {}, {}
        for side, table, seen_ids, recent_ids in (
            ("user", users, seen_users, recent_users),
            ("video", videos, seen_videos, recent_videos),
        ):
            seen, recent = (_seen(table, f"{side}_id", ids) for ids in (seen_ids, recent_ids))
            for feature in getattr(self.spec, side):
                if not (isinstance(feature, Categorical) and feature.known_only):
                    continue
                name, before = f"{side}.{feature.name}", np.asarray(self.known[f"{side}.{feature.name}"])
                here, there = (np.unique(_integers(part, feature.column)[0]) for part in (seen, recent))
                known[name] = np.intersect1d(np.union1d(before, here), there)
                changed, staying = np.setxor1d(before, known[name]), np.intersect1d(before, known[name])
                rows_changed, rows_staying = (
                    bucket(hash_int64(some, self.spec.seed), feature.rows) for some in (changed, staying)
                )
                renewed[name] = np.setdiff1d(rows_changed, rows_staying)
        return Encoder(spec=self.spec, stats=self.stats, known=known), renewed

    def users(self, table: pa.Table) -> Entities:
        """Encode a `users` table (any order) -> Entities sorted by user_id."""
        return self._entities("user", self.spec.user, table, "user_id")

    def videos(self, table: pa.Table) -> Entities:
        """Encode a `videos` table (any order) -> Entities sorted by video_id."""
        return self._entities("video", self.spec.video, table, "video_id")

    def columns(self, side: str) -> SparseColumns:
        """Layout of the sparse slots of `user` or `video` rows."""
        sparse = [f for f in getattr(self.spec, side) if isinstance(f, (Categorical, MultiValued, Bucketed))]
        return SparseColumns(
            names=tuple(f.name for f in sparse),
            widths=tuple(f.max_values if isinstance(f, MultiValued) else 1 for f in sparse),
            table_rows=tuple(f.rows for f in sparse),
        )

    def dense_width(self, side: str) -> int:
        """D of `user` or `video` rows."""
        widths = {Numeric: lambda f: 1, Content: lambda f: f.dim}
        return sum(widths[type(f)](f) for f in getattr(self.spec, side) if type(f) in widths)

    def surface_rows(self, surfaces: list[str | None]) -> np.ndarray:
        """Surface names -> rows of the surface table (N,) int64; None is row 0."""
        return _hash_text(surfaces, self.spec.surface_rows, self.spec.seed)

    def slot_rows(self, slots: np.ndarray) -> np.ndarray:
        """Slots counted from 0, -1 for "not logged" (N,) -> rows 0 .. max_slot+1 (N,) int64."""
        return np.clip(np.asarray(slots, dtype=np.int64) + 1, 0, self.spec.max_slot + 1)

    def save(self, folder: Path) -> None:
        """Write `spec.json`, `stats.json` and `known_SIDE.NAME.npy` into an existing folder."""
        (folder / "spec.json").write_text(self.spec.to_json())
        (folder / "stats.json").write_text(json.dumps(self.stats, indent=2, sort_keys=True))
        for name, ids in self.known.items():
            np.save(folder / f"known_{name}.npy", ids, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Inverse of `save`."""
        spec = FeatureSpec.from_json((folder / "spec.json").read_text())
        stats = {name: tuple(values) for name, values in json.loads((folder / "stats.json").read_text()).items()}
        known = {}
        for side in ("user", "video"):
            for feature in getattr(spec, side):
                if isinstance(feature, Categorical) and feature.known_only:
                    path = folder / f"known_{side}.{feature.name}.npy"
                    known[f"{side}.{feature.name}"] = np.load(path, mmap_mode="r", allow_pickle=False)
        return cls(spec=spec, stats=stats, known=known)

    def _entities(self, side: str, features: tuple[Feature, ...], table: pa.Table, key: str) -> Entities:
        _require_columns(table, side, features, key)
        table = table.sort_by(key)
        ids, _ = _integers(table, key)
        sparse, dense, unknown = [], [], []
        for feature in features:
            if isinstance(feature, Categorical):
                sparse.append(self._categorical(side, feature, table))
                unknown.append(0)
            elif isinstance(feature, MultiValued):
                sparse.append(_multi_valued(feature, table, self.spec.seed))
                unknown.extend([-1] * feature.max_values)
            elif isinstance(feature, Bucketed):
                edges, value = np.array(self.stats[f"{side}.{feature.name}"]), _floats(table, feature.column)
                row = 1 + np.searchsorted(edges, value, side="right")
                sparse.append(np.where(np.isnan(value), 0, row)[:, None])
                unknown.append(0)
            elif isinstance(feature, Numeric):
                mean, deviation = self.stats[f"{side}.{feature.name}"]
                raw = _raw_number(table, feature)
                dense.append(np.where(np.isnan(raw), 0.0, (raw - mean) / deviation)[:, None])
            else:
                dense.append(_content(feature, table))
        dense_ND = np.concatenate(dense, axis=1) if dense else np.zeros((len(ids), 0))
        return Entities(
            ids=ids,
            sparse=np.vstack([np.array(unknown)[None, :], np.concatenate(sparse, axis=1)]).astype(np.int32),
            dense=np.vstack([np.zeros((1, dense_ND.shape[1])), dense_ND]).astype(np.float32),
            columns=self.columns(side),
        )

    def _categorical(self, side: str, feature: Categorical, table: pa.Table) -> np.ndarray:
        column = table[feature.column]
        if pa.types.is_integer(column.type):
            ids, null = _integers(table, feature.column)
            rows = bucket(hash_int64(ids, self.spec.seed), feature.rows)
            if feature.known_only:
                rows = np.where(np.isin(ids, self.known[f"{side}.{feature.name}"]), rows, 0)
            rows = np.where(null, 0, rows)
        else:
            rows = _hash_text(column.cast(pa.string()).to_pylist(), feature.rows, self.spec.seed)
        return rows[:, None]


def _seen(table: pa.Table, key: str, ids: np.ndarray) -> pa.Table:
    """Rows of the entities with these ids (any order, repeats allowed)."""
    return table.filter(pa.array(np.isin(_integers(table, key)[0], np.unique(np.asarray(ids, dtype=np.int64)))))


def _require_columns(table: pa.Table, side: str, features: tuple[Feature, ...], key: str) -> None:
    missing = [name for name in [key, *(f.column for f in features)] if name not in table.column_names]
    if missing:
        raise ValueError(
            f"table of {side}s: missing columns {sorted(set(missing))}; it has {table.column_names}. "
            "Add them to the adapter's output or take the features out of the spec."
        )


def _integers(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    values = table[column].combine_chunks()
    null = values.is_null().to_numpy(zero_copy_only=False)
    return values.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False), null


def _hash_text(values: list[str | None], rows: int, seed: int) -> np.ndarray:
    hashed = bucket(hash_strings(values, seed), rows)
    return np.where(np.array([value is None for value in values], dtype=bool), 0, hashed)


def _multi_valued(feature: MultiValued, table: pa.Table, seed: int) -> np.ndarray:
    lists = table[feature.column].combine_chunks()
    lengths = np.minimum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), feature.max_values)
    starts = lists.offsets.to_numpy(zero_copy_only=False)[:-1].astype(np.int64)
    flat = lists.values.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
    slots = np.arange(feature.max_values)
    present = slots[None, :] < lengths[:, None]
    at = np.where(present, starts[:, None] + slots[None, :], 0)
    if len(flat) == 0:
        return np.full(at.shape, -1, dtype=np.int64)
    hashed = bucket(hash_int64(flat[at.ravel()], seed), feature.rows).reshape(at.shape)
    return np.where(present, hashed, -1)


def _content(feature: Content, table: pa.Table) -> np.ndarray:
    lists = table[feature.column].combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((lengths != 0) & (lengths != feature.dim))
    if wrong.size:
        raise ValueError(f"column {feature.column}: row {wrong[0]} has {lengths[wrong[0]]} values, not {feature.dim}")
    out = np.zeros((len(lists), feature.dim), dtype=np.float32)
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    out[lengths == feature.dim] = flat.reshape(-1, feature.dim)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return out / np.where(norms > 0, norms, 1.0)


def _floats(table: pa.Table, column: str) -> np.ndarray:
    return table[column].cast(pa.float64()).to_numpy().astype(np.float64)


def _edges(values: np.ndarray, buckets: int) -> tuple[float, ...]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return ()
    return tuple(np.unique(np.quantile(finite, np.linspace(0, 1, buckets + 1)[1:-1])).tolist())


def _raw_number(table: pa.Table, feature: Numeric) -> np.ndarray:
    values = _floats(table, feature.column)
    return np.log1p(np.maximum(values, 0.0)) if feature.log else values


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    return float(finite.mean()), float(max(finite.std(), 1e-6))
