"""Examples see the past and nothing else, survive a save, and are the same however they are gathered."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.batch import to_batch
from features.counters import WIDTH_PER_KEY
from features.dataset import Dataset
from features.inputs import INSTANT_WIDTH, Inputs
from features.schema import SIGNALS

sys.path.insert(0, str(Path(__file__).parent))
from feature_world import SPEC, tables


def build(t: dict[str, pa.Table], undated: pa.Table | None = None, train_days: int = 3) -> Dataset:
    dates = tuple(sorted(set(t["events"]["date"].to_pylist())))
    return Dataset.build(
        SPEC, users=t["users"], videos=t["videos"], events=t["events"], undated=undated, train_dates=dates[:train_days]
    )


def assert_equal(a: Inputs, b: Inputs) -> None:
    for name in Inputs.__slots__:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.floats(0.3, 0.9))
def test_deleting_the_future_changes_no_feature(seed: int, cut: float):
    # The encoder is fitted on the first of four days; every cut lies after it, as every served request does.
    t = tables(seed)
    instant = np.quantile(t["events"]["ts_ms"].to_numpy(), cut)
    past = t | {"events": t["events"].filter(pc.less_equal(t["events"]["ts_ms"], int(instant)))}
    with_future, without = build(t, train_days=1), build(past, train_days=1)
    rows = np.arange(len(without.examples))
    assert_equal(with_future.inputs(rows), without.inputs(rows))


def test_history_is_the_last_events_strictly_before_the_impression():
    t = tables(3)
    dataset = build(t)
    user, video, ts = (t["events"][name].to_numpy() for name in ("user_id", "video_id", "ts_ms"))
    rows = np.random.default_rng(0).choice(len(ts), 60, replace=False)
    e = dataset.examples
    windows = dataset.history.windows(e.user_row[rows], e.history_end[rows], SPEC.history_length)
    for i, row in enumerate(rows):
        expected = video[(user == user[row]) & (ts < ts[row])][-SPEC.history_length :]
        found = dataset.videos.ids_of(windows.video_row_BL[i, : windows.length_B[i]])
        assert found.tolist() == expected.tolist()


def test_undated_impressions_come_first_in_every_history_and_their_gap_is_unknown():
    t = tables(4)
    users, videos = t["users"]["user_id"].to_numpy(), t["videos"]["video_id"].to_numpy()
    signals = {f.name: pa.nulls(2, f.type) for f in t["events"].schema if f.type == pa.int8()}
    undated = pa.table(
        {"user_id": [users[0]] * 2, "video_id": videos[[7, 3]], "position": pa.array([1, 0], pa.int32()), **signals}
    )
    dataset = build(t, undated)
    row = np.flatnonzero(t["events"]["user_id"].to_numpy() == users[0])[:1]
    inputs = dataset.inputs(row)
    window = dataset.history.windows(dataset.examples.user_row[row], dataset.examples.history_end[row], 8)
    assert dataset.videos.ids_of(window.video_row_BL[0, :2]).tolist() == videos[[3, 7]].tolist()
    assert inputs.history_gap_BL[0, :2].tolist() == [0, 0]


def test_an_undated_impression_sees_those_before_it_and_no_time_surface_or_counter():
    t, rng = tables(6), np.random.default_rng(1)
    users, videos, n = t["users"]["user_id"].to_numpy(), t["videos"]["video_id"].to_numpy(), 90
    user, video, position = rng.choice(users[:6], n), rng.choice(videos, n), rng.permutation(n)
    signals = {f.name: pa.nulls(n, f.type) for f in t["events"].schema if f.type == pa.int8()}
    liked = pa.array(rng.integers(0, 2, n), pa.int8())
    undated = pa.table({"user_id": user, "video_id": video, "position": pa.array(position, pa.int32())} | signals)
    dataset = build(t, undated.set_column(undated.column_names.index("like"), "like", liked))
    past = dataset.undated
    windows = dataset.history.windows(past.user_row, past.history_end, SPEC.history_length)
    inputs = dataset.inputs_of(past)
    assert len(past) == n
    for row in range(n):
        of_user = np.flatnonzero(user == dataset.users.ids[past.user_row[row] - 1])
        in_order = of_user[np.argsort(position[of_user])]
        at = int(np.count_nonzero(past.user_row[:row] == past.user_row[row]))
        assert dataset.videos.ids[past.video_row[row] - 1] == video[in_order[at]]
        assert past.signals[row, SIGNALS.index("like")] == liked[in_order[at]].as_py()
        seen = dataset.videos.ids_of(windows.video_row_BL[row, : windows.length_B[row]])
        assert seen.tolist() == video[in_order[:at]][-SPEC.history_length :].tolist()
    of_video, instant = 3 * WIDTH_PER_KEY, -INSTANT_WIDTH  # between them what the user did before, which is known
    counters = (
        inputs.candidate_dense_NC[:, :of_video],
        inputs.candidate_dense_NC[:, instant:],
        inputs.user_dense_BD[:, -WIDTH_PER_KEY:],
    )
    assert [float(np.abs(part).max()) for part in (*counters, inputs.surface_B, inputs.slot_N)] == [0, 0, 0, 0, 0]
    assert np.isnan(past.signals[:, SIGNALS.index("click")]).all()


def test_counters_know_earlier_days_only():
    t = tables(5)
    dataset = build(t)
    day, like = dataset.examples.day, t["events"]["like"].to_numpy()
    video = int(dataset.examples.video_row[-1])
    earlier = (dataset.examples.video_row == video) & (day < 2)
    overall = like[day < 2]
    prior = (overall.sum() + 1) / (len(overall) + 2)
    rate = (like[earlier].sum() + prior * 20) / (earlier.sum() + 20)
    expected = np.log(rate / (1 - rate)) - np.log(prior / (1 - prior))
    found = dataset.counters.video(np.array([2]), np.array([video]))[0]
    assert found[2] == pytest.approx(expected, abs=1e-6)  # click, long_view, like, support
    assert found[3] == pytest.approx(np.log1p(earlier.sum()) / 5, abs=1e-6)


def test_save_and_load_give_the_same_batches(tmp_path: Path):
    dataset = build(tables(6))
    dataset.save(tmp_path)
    rows = np.arange(50)
    assert_equal(Dataset.load(tmp_path).inputs(rows), dataset.inputs(rows))


def test_ids_without_training_data_become_row_zero():
    t = tables(7)
    dataset = build(t, train_days=1)
    first_day = t["events"]["date"].to_numpy() == dataset.dates[0]
    trained = np.unique(t["events"]["video_id"].to_numpy()[first_day])
    id_rows = dataset.videos.sparse[1:, dataset.videos.columns.slice("video_id")][:, 0]
    np.testing.assert_array_equal(id_rows > 0, np.isin(dataset.videos.ids, trained))


def test_padding_a_batch_adds_unknown_videos_and_moves_nothing():
    inputs = build(tables(8)).inputs(np.arange(20))
    plain, padded = to_batch(inputs), to_batch(inputs).pad_videos(100)
    assert padded.video_dense_UD.shape[0] == 100
    for key in plain.video.keys():  # noqa: SIM118 - a KeyedJaggedTensor is no dict
        bags = plain.video[key].lengths().tolist()
        assert padded.video[key].lengths().tolist()[: len(bags)] == bags
        assert padded.video[key].values().tolist() == plain.video[key].values().tolist()
    with pytest.raises(ValueError, match="more than the 3 it should be padded to"):
        plain.pad_videos(3)
