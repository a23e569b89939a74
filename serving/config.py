"""Everything about a feed that is a choice: it travels in the bundle as `feed.json`, and names the policy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import xxhash

from candidate_gen.blend import BlendConfig
from candidate_gen.covisit import CovisitConfig
from candidate_gen.sources import PopularSource
from features.eligibility import Viewer
from ranking.arrange import ArrangeConfig
from ranking.value import ValueConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """What is never shown, beyond the rules that cannot be turned off (own, blocked, ineligible, not yet
    uploaded, and the limits of the videos)."""

    seen: bool = True
    """Leave out what the user has an impression of, in the bundle's history or in the event log."""
    max_age_h: float | None = None
    """Leave out older uploads; a video of unknown upload time is never too old."""
    viewer: Viewer = field(default_factory=lambda: Viewer(age_years=0, max_safety_level=0))
    """Stands in for what a request does not say of its viewer. Unless this says otherwise, such a viewer is shown no
    video with a minimum age, a safety level or a list of regions, and videos of every language."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DislikeConfig:
    """What a viewer's negative feedback takes from videos of the same author and topic. 0: off."""

    author: float = 0.0
    """Share of a (positive) value lost at once by the author's other videos; 1 puts them behind all others."""
    topic: float = 0.0
    """Likewise for the topic of `FeedConfig.topic_feature`."""
    half_life_h: float = 168.0
    """Hours after which half of that is forgiven."""

    def __post_init__(self) -> None:
        if not (0 <= self.author <= 1 and 0 <= self.topic <= 1 and self.half_life_h > 0):
            raise ValueError("DislikeConfig: author and topic must lie in 0 .. 1, half_life_h must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedConfig:
    """One feed."""

    name: str = "feed"
    """First part of the policy id."""
    surfaces: tuple[str, ...] = ("main",)
    """Surfaces a request may name; the first is the default."""
    blend: BlendConfig = field(default_factory=BlendConfig)
    """Sources without a quota are not asked."""
    covisit: CovisitConfig = field(default_factory=CovisitConfig)
    popular_segment: str | None = None
    """A categorical user feature: the popular source then counts by surface and its value."""
    topic_feature: str | None = None
    """A categorical or multi-valued video feature; its first value is a video's topic, for fatigue and dislikes."""
    dislikes: DislikeConfig = field(default_factory=DislikeConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    arrange: ArrangeConfig = field(default_factory=ArrangeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        if not self.surfaces or "" in self.surfaces:
            raise ValueError(f"FeedConfig.surfaces: at least one name, none empty; found {self.surfaces}")
        if PopularSource.name not in [quota.source for quota in self.blend.quotas]:
            raise ValueError("FeedConfig.blend.quotas: the popular source needs one, it answers when retrieval cannot")

    @property
    def policy_id(self) -> str:
        """Changes with any field: two policies with one id would corrupt replay."""
        return f"{self.name}-{xxhash.xxh64_hexdigest(self.to_json().encode())[:8]}"

    def to_json(self) -> str:
        """Readable JSON, keys sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FeedConfig:
        """Inverse of `to_json`; raises ValueError naming a field that does not exist."""
        return _decode(cls, json.loads(text), "feed.json")


def _decode(kind: Any, value: Any, path: str) -> Any:
    """JSON back to nested dataclasses, tuples and dicts, as the type hints say."""
    arguments = get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        known = [f.name for f in fields(kind)]
        if unknown := sorted(value.keys() - set(known)):
            raise ValueError(f"{path}: unknown fields {unknown}, expected some of {known}")
        return kind(**{name: _decode(hints[name], entry, f"{path}: {name}") for name, entry in value.items()})
    if get_origin(kind) is tuple and value is not None:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(k, entry, path) for k, entry in zip(kinds, value, strict=True))
    if get_origin(kind) is dict and value is not None:
        return {name: _decode(arguments[1], entry, f"{path}: {name}") for name, entry in value.items()}
    return value
