"""The feature spec: which columns of users and videos become model inputs, and how.

A spec is plain data: it travels in the bundle as JSON, and its fingerprint says whether two artifacts fit together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import xxhash


@dataclass(frozen=True, kw_only=True, slots=True)
class Categorical:
    """One value a row, hashed into an embedding table of `rows` rows."""

    name: str
    """Name of the feature and of its table, unique in the spec."""
    column: str
    """Column of the canonical table; integers and strings are both hashed."""
    rows: int
    """Rows of the embedding table, row 0 included (missing or unknown)."""
    known_only: bool = False
    """Ids without training data go to row 0 instead of an untrained row; for ids, not for small vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiValued:
    """A list of integers a row, each hashed into one table; the model pools them."""

    name: str
    column: str
    rows: int
    max_values: int
    """Values beyond this many are cut; the cut is counted when the spec is fitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numeric:
    """A number, standardised with the training data's mean and deviation; a null becomes the mean."""

    name: str
    column: str
    log: bool = False
    """Take log1p of the non-negative value first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucketed:
    """A number as the bucket it falls in, buckets of equal mass in the training data: for what a model should learn
    by steps and cross with ids, where `Numeric` gives it a slope."""

    name: str
    """Name of the feature and of its table, unique in the spec."""
    column: str
    buckets: int

    @property
    def rows(self) -> int:
        """Rows of the embedding table: row 0 is a null, then the buckets in order."""
        return self.buckets + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """A content embedding of fixed width, used as it is (L2-normalised; a null row becomes zeros)."""

    name: str
    column: str
    dim: int


Feature = Categorical | MultiValued | Bucketed | Numeric | Content
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Categorical, MultiValued, Bucketed, Numeric, Content)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """Everything the models read of a user, a video and a history."""

    user: tuple[Feature, ...]
    video: tuple[Feature, ...]
    history_length: int = 50
    """L: the last events before the request that the models see."""
    surface_rows: int = 32
    """Rows of the surface table (hashed)."""
    max_slot: int = 31
    """Slots beyond this share one row; a null slot is row 0, slot s is row s+1."""
    seed: int = 20260101
    """Seed of every hash."""

    def __post_init__(self) -> None:
        for side in (self.user, self.video):
            names = [feature.name for feature in side]
            if len(set(names)) != len(names):
                raise ValueError(f"feature names must be unique, found {sorted(names)}")
            for feature in side:
                if isinstance(feature, (Categorical, MultiValued, Bucketed)) and not 2 <= feature.rows < 2**31:
                    raise ValueError(f"feature {feature.name}: rows must lie in 2 .. 2^31-1, found {feature.rows}")

    def to_json(self) -> str:
        """Readable JSON, keys sorted: equal specs give equal text."""
        fields: dict[str, Any] = asdict(self)
        for side in ("user", "video"):
            fields[side] = [{"kind": type(f).__name__, **asdict(f)} for f in getattr(self, side)]
        return json.dumps(fields, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """Inverse of `to_json`; raises ValueError on an unknown feature kind."""
        fields = json.loads(text)
        for side in ("user", "video"):
            fields[side] = tuple(_feature_from(entry) for entry in fields[side])
        return cls(**fields)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any feature, size or seed."""
        return xxhash.xxh64_hexdigest(self.to_json().encode())


def _feature_from(entry: dict[str, Any]) -> Feature:
    kind = entry.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"feature spec: unknown kind {kind!r}, expected one of {sorted(_KINDS)}")
    return _KINDS[kind](**entry)
