"""The benchmark of viewers' limits measures what it says, on a small catalogue."""

from __future__ import annotations

import numpy as np

from benchmarks.viewers import AGES, LANGUAGES, LEVELS, NOW_MS, REGIONS, measure, random_attributes, random_viewer


def test_figures_are_of_the_catalogue_that_was_asked_for(tmp_path) -> None:
    n = 200_003
    found = measure(n, 40, tmp_path)
    assert found["bitmaps"] == (1 + REGIONS) + (1 + LANGUAGES) + (len(AGES) - 1) + (LEVELS - 1)
    assert found["bitmap_bytes_on_disk"] == found["bitmaps"] * found["kept_bytes_a_kind"]
    assert found["kept_bytes_a_kind"] == 25_001
    assert 5 < found["attribute_bytes_a_video"] < 6, "300 sets of regions take two bytes, a window in 200 a tenth"
    assert all(value > 0 for value in found.values())


def test_its_viewers_differ_in_what_they_may_be_shown() -> None:
    rng = np.random.default_rng(3)
    attributes = random_attributes(rng, 5_000)
    permitted = [attributes.permits(random_viewer(rng), np.arange(5_000), NOW_MS).mean() for _ in range(20)]
    assert 0.2 < min(permitted) < max(permitted) < 0.9
    assert len(set(permitted)) > 15
