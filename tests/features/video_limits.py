"""Random limits of videos and random viewers, and the rule written as one would say it: the oracle of other tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from features.eligibility import Viewer
from features.schema import LIMITS

REGIONS, LANGUAGES = ("DE", "fr", "US", "jp"), ("pt", "pt-BR", "en", "de_AT")
AGES, HOUR_MS = (0, 12, 13, 16, 18), 3_600_000


def random_limits(rng: np.random.Generator, n: int, now_ms: int, *, open_share: float = 0.5) -> dict[str, pa.Array]:
    """The columns of LIMITS; each leaves a share of the videos open. Windows begin and end within days of `now_ms`,
    many at one instant."""

    def some(values: list) -> list:
        return [None if rng.random() < open_share else value for value in values]

    begin = now_ms + rng.integers(-72, 24, n) * HOUR_MS
    end = begin + rng.integers(1, 72, n) * HOUR_MS + rng.integers(0, 2, n)
    columns = {
        "regions": some([rng.choice(REGIONS, rng.integers(0, 4)).tolist() for _ in range(n)]),
        "language": some(rng.choice(LANGUAGES, n).tolist()),
        "min_age": some(rng.choice(AGES, n).tolist()),
        "safety_level": some(rng.integers(0, 4, n).tolist()),
        "available_from_ms": some(begin.tolist()),
        "available_until_ms": some(end.tolist()),
    }
    return {field.name: pa.array(columns[field.name], field.type) for field in LIMITS}


def random_viewer(rng: np.random.Generator) -> Viewer:
    """Any part may be unknown; regions and languages that no video names occur."""
    age, safety = int(rng.integers(0, 25)), int(rng.integers(0, 5))
    return Viewer(
        region=(None, "", "de", "FR", "us", "xx")[int(rng.integers(6))],
        languages=tuple(rng.choice(["PT", "pt_br", "en", "DE", "tlh"], rng.integers(0, 3)).tolist()),
        age_years=None if rng.random() < 0.3 else age,
        max_safety_level=None if rng.random() < 0.3 else safety,
    )


def may_be_shown(video: dict, viewer: Viewer, now_ms: int) -> bool:
    """Of one row of the canonical table, `eligible` and `upload_ts_ms` apart."""
    regions = {region.lower() for region in video["regions"] or []}
    tag = (video["language"] or "").lower().replace("_", "-")
    spoken = [language.lower().replace("_", "-") for language in viewer.languages]
    return (
        (not regions or (viewer.region or "").lower() in regions)
        and (not tag or not spoken or any(f"{tag}-".startswith(f"{language}-") for language in spoken))
        and (video["min_age"] or 0) <= (viewer.age_years or 0)
        and (video["safety_level"] or 0) <= (viewer.max_safety_level or 0)
        and (video["available_from_ms"] is None or video["available_from_ms"] <= now_ms)
        and (video["available_until_ms"] is None or now_ms < video["available_until_ms"])
    )
