"""Allowed rows: at any instant, and with any lists left out, exactly what a bitmap made for the request would hold."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from candidate_gen.allowed import Allowed, Eligibility
from candidate_gen.timeline import HOUR_MS, Timeline, Windows
from candidate_gen.uploads import Uploads
from candidate_gen.viewers import ViewerBitmaps
from features.eligibility import Attributes, Viewer

sys.path.insert(0, str(Path(__file__).parents[1] / "features"))
from video_limits import random_limits, random_viewer

V, NOW_MS = 1_001, 1_700_000_400_000  # where ten minutes begin


@dataclass(frozen=True)
class World:
    """Uploads hours around now, one in ten of unknown time, many of the same minute; windows likewise."""

    eligible: np.ndarray
    upload_ms: np.ndarray
    attributes: Attributes
    folder: Path

    @classmethod
    def of(cls, seed: int, folder: Path, *, limited: bool = True) -> World:
        rng = np.random.default_rng(seed)
        upload_ms = (
            NOW_MS + rng.integers(-100, 10, V) * HOUR_MS + rng.integers(0, 30, V) * 120_000 - rng.integers(0, 2, V)
        )
        upload_ms[rng.random(V) < 0.1] = -1
        eligible = rng.random(V) < 0.8
        eligible[0] = False
        limits = pa.table(random_limits(rng, V - 1, NOW_MS, open_share=0.7)) if limited else pa.table({})
        attributes = Attributes.of(limits, first_row=1 if limited else V)
        Uploads.build(rng.integers(0, 20, V), upload_ms, eligible).save(folder)
        Windows.build(attributes, eligible).save(folder)
        ViewerBitmaps.write(folder, attributes)
        return cls(eligible, upload_ms, attributes, folder)

    def eligibility(self, max_age_h: float | None) -> Eligibility:
        uploads, windows = Uploads.load(self.folder, self.upload_ms), Windows.load(self.folder)
        timeline = Timeline(self.eligible, uploads, self.attributes, windows, max_age_h)
        return Eligibility(timeline, ViewerBitmaps.load(self.folder, self.attributes))


@pytest.mark.parametrize("max_age_h", [None, 0.0, 30.0, 1e6])
def test_allowed_rows_and_counts_are_those_of_masks_made_for_the_request(max_age_h: float | None, tmp_path) -> None:
    world, rng, rows_V = World.of(1, tmp_path), np.random.default_rng(2), np.arange(V)
    eligibility, viewers = world.eligibility(max_age_h), [random_viewer(rng) for _ in range(6)]
    windows = (world.attributes.window_from_ms, world.attributes.window_until_ms)
    changes_ms = np.concatenate([world.upload_ms, *windows, world.upload_ms + round((max_age_h or 0) * HOUR_MS)])
    changes_ms = changes_ms[np.abs(changes_ms - NOW_MS) < 200 * HOUR_MS]
    for number in range(400):
        # Minutes apart as in serving, then days apart as for logs of the past: at the instant of a change or beside it.
        now_ms = NOW_MS - HOUR_MS + number * 123_456 if number < 150 else int(rng.choice(changes_ms))
        now_ms += int(rng.integers(-1, 2))
        viewer = viewers[int(rng.integers(len(viewers)))] if number % 2 else random_viewer(rng)
        lists = [np.unique(rng.integers(1, V, size)) for size in rng.choice([0, 3, 400], 3)]
        age_ms = now_ms - world.upload_ms
        rules = {
            "not_yet_uploaded": age_ms < 0,
            "too_old": (world.upload_ms >= 0) & (max_age_h is not None and age_ms > (max_age_h or 0) * HOUR_MS),
            **world.attributes.broken(viewer, rows_V, now_ms),
        }
        expected, removed, taken = world.eligible.copy(), {}, []
        for name, broken in rules.items():
            removed[name] = int((expected & broken).sum())
            expected &= ~broken
        shared = eligibility.at(now_ms, viewer)
        assert shared.removed == removed
        assert shared.count == expected.sum()
        for rows in lists:
            taken.append(int(expected[rows].sum()))
            expected[rows] = False
        allowed, counts = shared.without(*lists)
        assert np.array_equal(allowed.has(rows_V), expected)
        assert counts == taken
        assert allowed.count == expected.sum()
        unpacked = np.unpackbits(allowed.bits, bitorder="little", count=V).astype(bool)
        unpacked[allowed.excluded_rows] = False
        assert np.array_equal(unpacked, expected)  # what an index that scans the bitmap would return


def test_viewers_with_the_same_limits_share_one_bitmap_that_nobody_changes(tmp_path) -> None:
    world, rng = World.of(3, tmp_path), np.random.default_rng(3)
    eligibility = world.eligibility(30.0)
    adult = Viewer(region="de", languages=("en", "pt"), age_years=18, max_safety_level=1)
    first = eligibility.at(NOW_MS, adult)
    same = Viewer(region="DE", languages=("PT", "en", "tlh"), age_years=64, max_safety_level=1)
    assert eligibility.at(NOW_MS + 1, same).bits is first.bits
    assert eligibility.at(NOW_MS, Viewer(region="xx")).bits is eligibility.at(NOW_MS, Viewer()).bits
    for other in ({"age_years": 17}, {"region": "fr"}, {"languages": ("en",)}, {"max_safety_level": 2}):
        assert eligibility.at(NOW_MS, replace(adult, **other)).bits is not first.bits
    before = first.bits.copy()
    for minutes in range(0, 3_000, 7):
        eligibility.at(NOW_MS - minutes * 60_000, random_viewer(rng))
    assert np.array_equal(first.bits, before)
    assert eligibility.at(NOW_MS, adult).bits is not first.bits, "what is not kept is made again"
    assert np.array_equal(eligibility.at(NOW_MS, adult).bits, before)


def test_without_limits_all_viewers_share_the_bitmap_of_the_time(tmp_path) -> None:
    world, rng = World.of(6, tmp_path, limited=False), np.random.default_rng(6)
    eligibility = world.eligibility(None)
    bits = eligibility.at(NOW_MS, Viewer()).bits
    for _ in range(20):
        shared = eligibility.at(NOW_MS, random_viewer(rng))
        assert shared.bits is bits
        assert shared.count == (world.eligible & (world.upload_ms <= NOW_MS)).sum()
    assert ViewerBitmaps.load(tmp_path, world.attributes).bits_BV.size == 0


def test_bitmaps_of_other_videos_are_refused(tmp_path) -> None:
    world = World.of(7, tmp_path)
    with pytest.raises(ValueError, match=r"viewer_bits.npy: bitmaps of shape .* publish again"):
        ViewerBitmaps.load(world.folder, Attributes.unlimited(V))


def test_threads_that_ask_about_many_instants_get_what_one_thread_gets(tmp_path) -> None:
    world, rng = World.of(4, tmp_path), np.random.default_rng(5)
    alone, together = world.eligibility(20.0), world.eligibility(20.0)
    asked = [(NOW_MS - int(rng.integers(0, 100 * HOUR_MS)), random_viewer(rng)) for _ in range(200)]
    expected = [alone.at(*one).without()[0].has(np.arange(V)) for one in asked]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(asked)).tolist():
            if not np.array_equal(together.at(*asked[i]).without()[0].has(np.arange(V)), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bool_a_row_becomes_the_same_rows() -> None:
    for size in (1, 8, 9, 64, 1_001):
        mask = np.random.default_rng(size).random(size) < 0.5
        allowed = Allowed.of(mask)
        assert np.array_equal(allowed.has(np.arange(size)), mask)
        assert allowed.count == mask.sum()
