"""Limits of videos: what each viewer may be shown at each instant, and what is read into what is not known."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.eligibility import Attributes, Viewer
from features.schema import LIMITS

sys.path.insert(0, str(Path(__file__).parent))
from video_limits import HOUR_MS, may_be_shown, random_limits, random_viewer

NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize("seed", range(3))
def test_random_viewers_are_permitted_what_the_rule_in_words_permits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = pa.table(random_limits(rng, 120, NOW_MS))
    attributes, videos = Attributes.of(table), table.to_pylist()
    permitted = set()
    for _ in range(60):
        viewer, now_ms = random_viewer(rng), NOW_MS + int(rng.integers(-90, 90)) * HOUR_MS + int(rng.integers(-1, 2))
        found = attributes.permits(viewer, np.arange(120), now_ms)
        assert found.tolist() == [may_be_shown(video, viewer, now_ms) for video in videos], (viewer, now_ms)
        permitted.add(int(found.sum()))
    assert len(permitted) > 10


@pytest.mark.parametrize(
    ("viewer", "shown"),
    [
        (Viewer(), "open lang"),
        (Viewer(age_years=18), "open lang adult"),
        (Viewer(max_safety_level=9), "open lang unsafe"),
        (Viewer(region="DE"), "open lang german"),
        (Viewer(region="atlantis"), "open lang"),
        (Viewer(languages=("fr",)), "open"),
        (Viewer(languages=("fr", "PT")), "open lang"),
        (Viewer(languages=("pt-PT",)), "open"),
    ],
)
def test_what_a_request_does_not_say_is_read_with_caution_except_for_the_language(viewer: Viewer, shown: str) -> None:
    nothing = dict.fromkeys(field.name for field in LIMITS)
    rows = {
        "open": {},
        "lang": {"language": "pt-BR"},
        "adult": {"min_age": 18},
        "unsafe": {"safety_level": 1},
        "german": {"regions": ["de"]},
    }
    table = pa.Table.from_pylist([{**nothing, **row} for row in rows.values()], schema=pa.schema(LIMITS))
    permitted = Attributes.of(table).permits(viewer, np.arange(len(rows)), NOW_MS)
    assert [name for name, may in zip(rows, permitted, strict=True) if may] == shown.split()


def test_a_request_that_says_something_is_filled_in_and_not_overruled() -> None:
    house = Viewer(region="de", languages=("de",), age_years=13, max_safety_level=2)
    assert Viewer().or_else(house) == house
    said = Viewer(region="fr", languages=("fr",), age_years=0, max_safety_level=0)
    assert said.or_else(house) == said


def test_without_columns_of_limits_everybody_may_be_shown_everything() -> None:
    attributes = Attributes.of(pa.table({"video_id": [1, 2, 3]}), first_row=1)
    assert len(attributes) == 4
    assert attributes.permits(Viewer(), np.arange(4), 0).all()
    assert len(Attributes.unlimited(7)) == 7


def test_uploads_appended_in_pieces_permit_what_one_table_of_all_permits() -> None:
    rng = np.random.default_rng(12)
    table = pa.table(random_limits(rng, 90, NOW_MS))
    whole, grown = Attributes.of(table), Attributes.unlimited(0)
    for start in (0, 1, 2, 20, 60):
        grown = grown.append(table.slice(start, {0: 1, 1: 1, 2: 18, 20: 40, 60: 30}[start]))
    for _ in range(40):
        viewer, now_ms = random_viewer(rng), NOW_MS + int(rng.integers(-90, 90)) * HOUR_MS
        expected = whole.permits(viewer, np.arange(90), now_ms)
        assert np.array_equal(grown.permits(viewer, np.arange(90), now_ms), expected)


def test_saved_and_mapped_they_permit_the_same(tmp_path) -> None:
    rng = np.random.default_rng(9)
    made = Attributes.of(pa.table(random_limits(rng, 80, NOW_MS)), first_row=1)
    made.save(tmp_path)
    mapped = Attributes.load(tmp_path)
    for field in fields(Attributes):
        before, after = getattr(made, field.name), getattr(mapped, field.name)
        assert type(before) is type(after)
        assert np.array_equal(before, after)
        assert not isinstance(before, np.ndarray) or before.dtype == after.dtype
    assert sum(getattr(made, name).itemsize for name in ("region_set", "language", "min_age", "safety_level")) == 4


def test_more_than_256_sets_of_regions_keep_apart() -> None:
    regions = [[f"r{i}", f"r{i + 1}"] for i in range(700)]
    attributes = Attributes.of(pa.table({"regions": regions}))
    assert attributes.region_set.dtype == np.uint16
    for i in (0, 1, 255, 256, 300, 699):
        permitted = attributes.permits(Viewer(region=f"R{i}"), np.arange(700), NOW_MS)
        assert np.flatnonzero(permitted).tolist() == sorted({max(i - 1, 0), i})
