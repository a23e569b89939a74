"""Every transform does what its docstring says, and says which column is wrong when one is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.hashing import bucket, hash_int64
from features.history import GAP_BUCKETS, UNDATED_TS_MS, gap_bucket, signal_bits, unpack_signals, watch_fraction
from features.schema import SIGNALS
from features.spec import Bucketed, Categorical, FeatureSpec
from features.transforms import Encoder

sys.path.insert(0, str(Path(__file__).parent))
from feature_world import SPEC, tables


def fitted(t: dict[str, pa.Table]) -> Encoder:
    return Encoder.fit(
        SPEC, t["users"], t["videos"], seen_users=t["users"]["user_id"].to_numpy(), seen_videos=t["videos"]["video_id"]
    )


def test_rows_are_hashes_of_ids_and_lists_are_cut_and_padded():
    t = tables(1)
    videos = fitted(t).videos(t["videos"])
    by_id = t["videos"].sort_by("video_id")
    authors = videos.sparse[1:, videos.columns.slice("author_id")][:, 0]
    np.testing.assert_array_equal(authors, bucket(hash_int64(by_id["author_id"].to_numpy(), SPEC.seed), 64))
    tags = videos.sparse[1:, videos.columns.slice("tags")]
    for row, values in zip(tags, by_id["tags"].to_pylist(), strict=True):
        expected = bucket(hash_int64(np.array(values[:3], dtype=np.int64), SPEC.seed), 32).tolist()
        assert row.tolist() == expected + [-1] * (3 - len(expected))


def test_numbers_are_standardised_and_content_is_normalised_and_nulls_are_neutral():
    t = tables(2)
    videos = t["videos"].set_column(3, "duration_ms", pa.array([None, *t["videos"]["duration_ms"].to_pylist()[1:]]))
    content = t["videos"]["content"].to_pylist()
    videos = videos.set_column(8, "content", pa.array([None, *content[1:]], pa.list_(pa.float32())))
    encoder = fitted(t | {"videos": videos})
    entities = encoder.videos(videos)
    null_row = entities.rows_of(videos["video_id"].to_numpy()[:1])[0]
    assert entities.dense[null_row].tolist() == [0.0] * 5
    others = np.delete(entities.dense[1:], null_row - 1, axis=0)
    assert abs(others[:, 0].mean()) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(others[:, 1:], axis=1), 1.0, rtol=1e-5)


def test_an_encoder_loads_to_the_same_rows(tmp_path: Path):
    t = tables(3)
    encoder = fitted(t)
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.spec == SPEC
    assert loaded.spec.fingerprint() == SPEC.fingerprint()
    np.testing.assert_array_equal(loaded.users(t["users"]).sparse, encoder.users(t["users"]).sparse)


def test_a_missing_column_is_named():
    t = tables(4)
    with pytest.raises(ValueError, match=r"table of users: missing columns \['region'\]"):
        fitted(t).users(t["users"].drop_columns("region"))


def test_specs_refuse_double_names_and_empty_tables():
    feature = Categorical(name="user_id", column="user_id", rows=10)
    with pytest.raises(ValueError, match="unique"):
        FeatureSpec(user=(feature, feature), video=())
    with pytest.raises(ValueError, match="rows must lie in"):
        FeatureSpec(user=(Categorical(name="user_id", column="user_id", rows=1),), video=())


def test_gap_buckets_are_log2_seconds_and_zero_when_unknown():
    now = np.array([10_000_000])
    earlier = np.array([[10_000_000, 9_999_000, 9_996_000, UNDATED_TS_MS, 0]])
    mask = np.array([[True, True, True, True, False]])
    assert gap_bucket(now[:, None], earlier, mask).tolist() == [[1, 1, 3, 0, 0]]  # 0 s, 1 s, 4 s, undated, padding
    assert gap_bucket(np.array([10**13]), np.array([0]), np.array([True])).tolist() == [GAP_BUCKETS - 1]


def test_signal_masks_round_trip_and_unlogged_counts_as_not_given():
    signals = np.array([[1, 0, np.nan, 1, 0, 0, 0, 1]], dtype=np.float32)
    assert unpack_signals(signal_bits(signals)).tolist() == [[1, 0, 0, 1, 0, 0, 0, 1]]
    assert signals.shape[1] == len(SIGNALS)


def test_watch_fraction_is_clipped_and_zero_where_unknown():
    found = watch_fraction(np.array([5.0, 50.0, np.nan, 5.0]), np.array([10.0, 10.0, 10.0, 0.0]))
    assert found.tolist() == [0.5, 2.0, 0.0, 0.0]


def test_a_bucketed_number_falls_into_buckets_of_equal_mass_and_a_null_into_row_zero(tmp_path: Path):
    t = tables(4, videos=200)
    spec = replace(SPEC, video=(*SPEC.video, Bucketed(name="length", column="duration_ms", buckets=4)))
    videos = t["videos"].set_column(3, "duration_ms", pa.array([None, *t["videos"]["duration_ms"].to_pylist()[1:]]))
    encoder = Encoder.fit(spec, t["users"], videos, seen_users=np.zeros(0), seen_videos=videos["video_id"].to_numpy())
    encoder.save(tmp_path)
    entities = Encoder.load(tmp_path).videos(videos)
    row = entities.sparse[:, entities.columns.slice("length")][:, 0]
    assert row[0] == 0, "the unknown video"
    by_id = videos.sort_by("video_id")["duration_ms"].to_numpy()
    assert np.array_equal(row[1:] == 0, np.isnan(by_id))
    counts = np.bincount(row[1:], minlength=5)
    assert counts[1:].min() >= 48
    assert counts[1:].max() <= 51
    assert (np.diff(row[1:][np.argsort(by_id)][:-1]) >= 0).all(), "buckets are in order of the number"
    assert entities.columns.table_rows[-1] == 5


def test_an_encoder_carried_on_keeps_what_was_fitted_and_lets_known_ids_come_and_go():
    t = tables(4)
    spec = replace(SPEC, video=(Categorical(name="video_id", column="video_id", rows=64, known_only=True),))
    ids = np.sort(t["videos"]["video_id"].to_numpy())
    old, forgotten, new = ids[:10], ids[:3], ids[12:16]
    users = t["users"]["user_id"].to_numpy()
    encoder = Encoder.fit(spec, t["users"], t["videos"], seen_users=users, seen_videos=old)
    carried, renewed = encoder.carried_on(
        t["users"],
        t["videos"],
        seen_users=users,
        seen_videos=new,
        recent_users=users,
        recent_videos=np.setdiff1d(ids, forgotten),
    )
    assert carried.stats == encoder.stats
    staying = np.setdiff1d(old, forgotten)
    assert carried.known["video.video_id"].tolist() == np.union1d(staying, new).tolist()

    def rows(some):
        return set(bucket(hash_int64(some, spec.seed), 64).tolist())

    assert set(renewed["video.video_id"].tolist()) == (rows(new) | rows(forgotten)) - rows(staying)
    encoded = carried.videos(t["videos"])
    assert encoded.sparse[encoded.rows_of(forgotten), 0].tolist() == [0, 0, 0]
    assert set(encoded.sparse[encoded.rows_of(new), 0].tolist()) == rows(new)
