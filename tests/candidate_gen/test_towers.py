"""What the towers promise: they learn, see no future, treat users alone, know new videos, and export exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from candidate_gen.encoder import LAYERS
from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig, TowersModel
from candidate_gen.train import TowersTask, features_at, index_instant
from features.batch import to_batch, to_kjt
from features.dataset import Dataset
from features.history import HistoryLog
from features.inputs import Inputs, UserRows, assemble
from features.schema import SIGNALS

DATES = ("2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04")


def contexts(dataset: Dataset, user_rows: np.ndarray, now_ms: int, history: HistoryLog | None = None) -> Inputs:
    """Requests of these users at one instant, without candidates, as serving asks."""
    none = np.zeros(0, np.int64)
    log = history or dataset.history
    now = np.full(len(user_rows), now_ms)
    return assemble(
        user=UserRows.take(dataset.users, user_rows),
        user_counters_BC=dataset.counters.user(np.full(len(user_rows), 3), user_rows),
        surface_B=np.zeros(len(user_rows), np.int64),
        now_ms_B=now,
        history=log.windows(user_rows, log.ends_at(user_rows, now), dataset.encoder.spec.history_length),
        videos=dataset.videos,
        candidate_rows_N=none,
        owner_N=none,
        candidate_counters_NC=dataset.counters.video(none, none),
        candidate_upload_ts_ms_N=none,
        slot_N=none,
    )


def target_vectors(task: TowersTask, towers: Towers, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(user vectors at every target of the units, history position of each), as training computes them."""
    collated = task.collate(units, seed=0)
    batch, model = to_batch(collated.inputs), towers._model
    t = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
    with torch.inference_mode():
        video_UD = model.encode_videos(batch.video, batch.video_dense_UD)
        users = model.encode_users(batch, video_UD, batch.owner_N, t["position_N"], t["surface_N"])
        users = model.place_users(users)
    return users.numpy(), collated.targets["position_N"]


def vectors_of(towers: Towers, dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Videos as of the first instant of the last day."""
    day, now_ms = index_instant(dataset, DATES[3:])
    return towers.video_vectors(dataset.videos, rows, features_at(dataset, rows, day, now_ms))


def last_day_ms(dataset: Dataset) -> int:
    return int(dataset.examples.ts_ms[dataset.rows_on(DATES[3:])].min())


def test_trained_towers_bring_the_users_topic_to_the_top(planted) -> None:
    d, rows = planted.dataset, np.arange(1, len(planted.dataset.users) + 1)
    users = planted.towers.user_vectors(contexts(d, rows, last_day_ms(d)))
    videos = vectors_of(planted.towers, d, np.arange(len(d.videos) + 1))
    assert np.allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(videos, axis=1), 1, atol=1e-5)
    top = np.argsort(-(users @ videos[1:].T), axis=1)[:, :20] + 1
    right = (planted.video_topic[top] == planted.user_topic[rows][:, None]).mean()
    assert right > 0.7  # five topics: chance is 0.2; four seeds of training gave 0.78 to 0.82


def test_a_video_without_any_event_is_found_by_its_content(planted) -> None:
    d = planted.dataset
    unseen = np.arange(len(d.videos) - 29, len(d.videos) + 1)
    assert (d.videos.sparse[unseen, 0] == 0).all()  # the ids arrive as unknown
    users = planted.towers.user_vectors(contexts(d, np.arange(1, len(d.users) + 1), last_day_ms(d)))
    scores = users @ vectors_of(planted.towers, d, unseen).T
    same = planted.user_topic[1:, None] == planted.video_topic[unseen][None, :]
    scale = np.sqrt(2 * (1 + planted.towers._model.config.prior_bound**2))  # products are cosines over this
    assert scores[same].mean() > scores[~same].mean() + 0.3 / scale


def test_a_known_only_row_0_and_a_dropped_id_mean_the_same(planted) -> None:
    d, model = planted.dataset, planted.towers._model
    rows = np.arange(1, 40)
    sparse = d.videos.sparse.copy()
    sparse[:, d.videos.columns.slice("video_id")] = 0
    as_unknown = vectors_of(planted.towers, replace(d, videos=replace(d.videos, sparse=sparse)), rows)
    kept = model.video_features.id_dropout
    try:
        model.train()
        model.video_features.id_dropout = 1.0
        with torch.inference_mode():
            video = to_kjt(np.asarray(d.videos.sparse[rows]), d.videos.columns)
            vector_NE = model.encode_videos(video, torch.from_numpy(d.videos.dense[rows]))
        dropped = torch.nn.functional.normalize(vector_NE, dim=-1).numpy()
    finally:
        model.eval()
        model.video_features.id_dropout = kept
    direction = as_unknown[:, :-2] / np.linalg.norm(as_unknown[:, :-2], axis=1, keepdims=True)
    np.testing.assert_allclose(direction, dropped, atol=1e-6)
    assert not np.allclose(as_unknown, vectors_of(planted.towers, d, rows), atol=1e-3)


def scattered_towers(task: TowersTask) -> Towers:
    """Untrained towers none of whose weights is 0, as time biases are at first."""
    torch.manual_seed(3)
    model = cast(TowersModel, task.build())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Towers(model)


@pytest.mark.parametrize("encoder", [*LAYERS, "none"])
def test_changing_events_at_or_after_a_target_changes_nothing_before_it(planted, encoder: str) -> None:
    d = planted.dataset
    task = TowersTask(d, replace(planted.task.config, encoder=encoder), DATES[:3], DATES[3:])
    towers, units = scattered_towers(task), task.train_units()
    vectors, position = target_vectors(task, towers, units)
    e, log = d.examples, d.history
    # Every event from the cut on becomes another video with other feedback.
    cut_ms = int(np.quantile(e.ts_ms, 0.4))
    later = log.ts_ms >= cut_ms
    changed = replace(
        log,
        video_row=np.where(later, 1 + (log.video_row * 7) % len(d.videos), log.video_row),
        signals=np.where(later, 255 - log.signals, log.signals).astype(np.uint8),
        watch_fraction=np.where(later, 1.5, log.watch_fraction).astype(np.float32),
    )
    other = TowersTask(replace(d, history=changed), task.config, DATES[:3], DATES[3:])
    after, _ = target_vectors(other, towers, units)
    ts_ms = task._train.targets.asked_ms
    assert position.max() > 0
    assert (ts_ms <= cut_ms).sum() > 100
    assert np.allclose(vectors[ts_ms <= cut_ms], after[ts_ms <= cut_ms], atol=1e-6)
    well_after = ts_ms > cut_ms + 43_200_000
    assert not np.allclose(vectors[well_after], after[well_after], atol=1e-2)


def test_events_of_one_instant_do_not_see_each_other(planted) -> None:
    e, task = planted.dataset.examples, planted.task
    collated = task.collate(task.train_units(), seed=0)
    start_ms = e.ts_ms.min()
    at_start = task._train.targets.asked_ms == start_ms
    assert at_start.sum() > 20
    assert (collated.targets["position_N"][at_start] == 0).all()


@pytest.mark.parametrize("encoder", [*LAYERS, "none"])
def test_training_and_serving_compute_the_same_user_vector(planted, encoder: str) -> None:
    d = planted.dataset
    task = TowersTask(d, replace(planted.task.config, encoder=encoder), DATES[:3], DATES[3:])
    towers = scattered_towers(task)
    vectors, held = target_vectors(task, towers, task.validation_units())
    e, rows = d.examples, d.rows_on(DATES[3:])
    rows = rows[e.signals[rows, SIGNALS.index("long_view")] == 1]
    rows = rows[np.lexsort((e.history_end[rows], e.user_row[rows]))]  # as the windows hold them
    served = towers.user_vectors(d.inputs(rows))
    # A window of training may hold up to `stride` events less than the L that serving sees.
    available = e.history_end[rows] - d.history.user_start[e.user_row[rows]]
    full = held == np.minimum(available, d.encoder.spec.history_length)
    assert full.sum() > 20
    assert np.allclose(vectors[full], served[full], atol=1e-5)


@pytest.mark.parametrize("encoder", ["ligr", "hstu"])
def test_gaps_between_events_and_to_the_request_move_the_user_vector(planted, encoder: str) -> None:
    d = planted.dataset
    towers = scattered_towers(TowersTask(d, replace(planted.task.config, encoder=encoder), DATES[:3], DATES[3:]))
    rows, end_ms = np.arange(1, 30), int(d.examples.ts_ms.max()) + 1
    asked = towers.user_vectors(contexts(d, rows, end_ms))
    later = towers.user_vectors(contexts(d, rows, end_ms + 3 * 86_400_000))
    # The same events, the last of them at its time, those before it ten times as far back from it.
    log = d.history
    last_ms = log.ts_ms[np.repeat(log.user_start[1:] - 1, np.diff(log.user_start))]
    spread = replace(log, ts_ms=last_ms - 10 * (last_ms - log.ts_ms))
    stretched = towers.user_vectors(contexts(d, rows, end_ms, history=spread))
    for moved in (later, stretched):
        assert (np.abs(moved - asked).max(axis=1) > 1e-4).all()


def test_two_users_in_a_batch_get_what_each_gets_alone(planted) -> None:
    d = planted.dataset
    rows = np.array([3, 0, 9])  # row 0: a user nobody knows, without history
    together = planted.towers.user_vectors(contexts(d, rows, last_day_ms(d)))
    alone = [planted.towers.user_vectors(contexts(d, rows[i : i + 1], last_day_ms(d)))[0] for i in range(3)]
    assert np.allclose(together, np.stack(alone), atol=1e-6)
    assert np.isfinite(together).all()
    assert abs(np.linalg.norm(together[1]) - 1) < 1e-5


def test_an_exported_model_answers_as_the_trained_one(planted) -> None:
    d = planted.dataset
    inputs = contexts(d, np.arange(1, 30), last_day_ms(d))
    live = Towers(planted.model)
    rows = np.arange(len(d.videos) + 1)
    assert np.allclose(live.user_vectors(inputs), planted.towers.user_vectors(inputs), atol=1e-6)
    assert np.allclose(vectors_of(live, d, rows), vectors_of(planted.towers, d, rows), atol=1e-6)
    assert vectors_of(planted.towers, d, rows[:0]).shape == (0, planted.towers.dim)


def test_files_that_do_not_belong_together_are_refused_by_name(planted, tmp_path) -> None:
    for name in ("towers.json", "towers.safetensors"):
        (tmp_path / name).write_bytes((planted.folder / name).read_bytes())
    described = json.loads((tmp_path / "towers.json").read_text())
    described["config"]["dim"] = 32
    (tmp_path / "towers.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"towers\.safetensors does not fit towers\.json"):
        Towers.load(tmp_path)
    (tmp_path / "towers.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"towers\.json does not describe towers.*format 99"):
        Towers.load(tmp_path)
    d = planted.dataset
    other = replace(d.videos.columns, table_rows=(1, 2, 3))
    with pytest.raises(ValueError, match="not those the towers were trained on"):
        vectors_of(planted.towers, replace(d, videos=replace(d.videos, columns=other)), np.array([1]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\), these towers want \(1, 14\)"):
        planted.towers.video_vectors(d.videos, np.array([1]), np.zeros((1, 2), np.float32))


def test_a_batch_is_a_function_of_its_units_and_seed(planted) -> None:
    task, units = planted.task, planted.task.train_units()[:9]
    first, again, other = (task.collate(units, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.inputs.video_sparse_UW, again.inputs.video_sparse_UW)
    assert np.array_equal(first.inputs.extra_X, again.inputs.extra_X)
    assert not np.array_equal(first.inputs.video_sparse_UW, other.inputs.video_sparse_UW)


def test_every_positive_impression_of_the_dates_is_a_target_once_and_only_eligible_videos_are_negatives(
    planted,
) -> None:
    d, task = planted.dataset, planted.task
    e, long_view = d.examples, 1
    for units, dates in ((task.train_units(), DATES[:3]), (task.validation_units(), DATES[3:])):
        collated = task.collate(units, seed=0)
        rows = d.rows_on(dates)
        positive = rows[e.signals[rows, long_view] == 1]
        found = collated.inputs.video_sparse_UW[collated.inputs.candidate_N]
        expected = d.videos.sparse[e.video_row[positive]]
        assert np.array_equal(np.sort(found[:, 0]), np.sort(expected[:, 0]))
        assert (collated.targets["position_N"] <= d.encoder.spec.history_length).all()
        assert (np.bincount(collated.inputs.owner_N) > 0).all()
    ineligible = set(np.flatnonzero(~d.eligible))
    assert not ineligible & {int(row) for seed in range(20) for row in task._draw_negatives(e.ts_ms[:9], seed)[0]}


def test_the_full_softmax_trains_the_very_scores_that_the_index_ranks_by(planted) -> None:
    d = planted.dataset
    exact = TowersTask(d, replace(planted.task.config, full_softmax_up_to=300), DATES[:3], DATES[3:])
    units = exact.validation_units()[:40]
    collated, t = exact.collate(units, seed=0), exact._validation.targets
    model = planted.towers._model
    with torch.inference_mode():
        targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
        found = float(model(to_batch(collated.inputs), targets)["loss"])
    users, _ = target_vectors(exact, planted.towers, units)
    scale = np.sqrt(2 * (1 + model.config.prior_bound**2)) / model.config.temperature  # products are cosines over this
    scores = scale * users @ vectors_of(planted.towers, d, np.arange(len(d.videos) + 1)).T
    losses = []
    for n in range(exact._validation.start[40]):
        own = t.video_row[: len(scores)][t.user_row[: len(scores)] == t.user_row[n]]
        others = np.setdiff1d(np.flatnonzero(d.eligible), own)
        positive = scores[n, t.video_row[n]]
        losses.append(np.log(np.exp(positive) + np.exp(scores[n, others]).sum()) - positive)
    assert len(losses) > 40
    assert abs(found - np.mean(losses)) < 1e-4


def test_without_content_a_video_is_its_id_alone(planted) -> None:
    d, rows = planted.dataset, np.arange(len(planted.dataset.videos) + 1)
    towers = scattered_towers(TowersTask(d, replace(planted.task.config, content=False), DATES[:3], DATES[3:]))
    sparse = d.videos.sparse.copy()
    sparse[:, d.videos.columns.slice("author_id")] = 1
    other = replace(d, videos=replace(d.videos, sparse=sparse, dense=d.videos.dense + 1))
    assert np.array_equal(vectors_of(towers, d, rows), vectors_of(towers, other, rows))
    assert not np.allclose(vectors_of(planted.towers, d, rows), vectors_of(planted.towers, other, rows), atol=1e-2)


def test_a_config_names_the_field_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"positives.*no signals"):
        TowerConfig(positives=("applause",))
    with pytest.raises(ValueError, match=r"encoder 'lstm'.*ligr"):
        TowerConfig(encoder="lstm")
    with pytest.raises(ValueError, match="not a multiple of heads"):
        TowerConfig(dim=12, heads=4)
