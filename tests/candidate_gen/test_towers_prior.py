"""The prior: age and counters decide where they should, at the instant that is asked for, inside unit vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from candidate_gen.train import features_at, index_instant
from features.counters import WIDTH_PER_KEY
from features.inputs import age_features

DAY_MS = 86_400_000
LAST_DAY = ("2026-01-04",)


def at_last_day(uploads) -> tuple[np.ndarray, np.ndarray]:
    """(features of every video, age in ms) as of the first instant of the last day."""
    d, rows = uploads.dataset, np.arange(len(uploads.dataset.videos) + 1)
    day, now_ms = index_instant(d, LAST_DAY)
    return features_at(d, rows, day, now_ms), now_ms - d.upload_ts_ms


def prior_of(uploads, features_MC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return uploads.towers._model.prior(torch.from_numpy(features_MC)).numpy()


def test_fresh_videos_and_hits_come_before_the_rest(uploads) -> None:
    features, age_ms = at_last_day(uploads)
    prior = prior_of(uploads, features)
    present = age_ms[1:] > 0
    fresh, hit = present & (age_ms[1:] < DAY_MS), uploads.hit[1:] & (age_ms[1:] > DAY_MS)
    rest = present & ~fresh & ~hit
    assert min(fresh.sum(), hit.sum(), rest.sum()) > 25
    assert np.quantile(prior[1:][fresh], 0.1) > np.quantile(prior[1:][rest], 0.9)
    assert np.quantile(prior[1:][hit], 0.2) > np.quantile(prior[1:][rest], 0.8)


def test_a_new_upload_without_any_counters_comes_before_old_videos_that_few_watch(uploads) -> None:
    features, age_ms = at_last_day(uploads)
    prior, old = prior_of(uploads, features)[1:], age_ms[1:] > 2 * DAY_MS
    new = features[1:].copy()
    new[:, :WIDTH_PER_KEY] = 0
    new[:, -2:] = age_features(np.full(len(new), DAY_MS), np.full(len(new), DAY_MS - DAY_MS // 8))
    assert prior_of(uploads, new).min() > np.quantile(prior[old & ~uploads.hit[1:]], 0.9)


def test_what_counts_yesterday_moves_a_vector_and_the_days_own_events_do_not(uploads) -> None:
    d, rows = uploads.dataset, np.arange(1, len(uploads.dataset.videos) + 1)
    day, now_ms = index_instant(d, LAST_DAY)
    assert (day, now_ms) == (3, d.examples.ts_ms[d.rows_on(LAST_DAY)].min())
    vectors = uploads.towers.video_vectors(d.videos, rows, features_at(d, rows, day, now_ms))
    views = np.array(d.counters.video_day)
    for changed, same in ((4, True), (3, False)):  # view 4 counts the last day too, view 3 the days before it
        other = views.copy()
        other[changed] += 1.0
        again = replace(d, counters=type(d.counters)(d.counters.user_day, other))
        moved = uploads.towers.video_vectors(d.videos, rows, features_at(again, rows, day, now_ms))
        assert np.array_equal(vectors, moved) == same
    assert index_instant(d, ()) == (4, d.examples.ts_ms.max() + 1)


def test_vectors_have_length_1_and_their_products_order_as_cosine_plus_prior(uploads) -> None:
    d, rows, model = uploads.dataset, np.arange(len(uploads.dataset.videos) + 1), uploads.towers._model
    features, _ = at_last_day(uploads)
    extreme = features.copy()
    extreme[::2] *= 50.0  # saturates the bound on both sides
    users = uploads.towers.user_vectors(d.inputs(d.rows_on(LAST_DAY)[:200]))
    bound = model.config.prior_bound
    for asked in (features, extreme):
        videos, prior = uploads.towers.video_vectors(d.videos, rows, asked), prior_of(uploads, asked)
        assert users.shape[1] == videos.shape[1] == uploads.towers.dim == model.config.dim
        assert np.allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)
        assert np.allclose(np.linalg.norm(videos, axis=1), 1, atol=1e-5)
        towers_u, towers_v = (x[:, :-2] / np.linalg.norm(x[:, :-2], axis=1, keepdims=True) for x in (users, videos))
        score = towers_u @ towers_v.T + prior
        assert np.allclose(users @ videos.T, score / np.sqrt(2 * (1 + bound**2)), atol=1e-5)
    assert np.abs(prior).max() > 0.99 * bound


def test_training_reads_the_features_that_the_index_of_the_targets_day_has(uploads) -> None:
    d, task = uploads.dataset, uploads.task
    units = np.concatenate([task.train_units()[:40], task.validation_units()[:10]])
    collated = task.collate(units, seed=3)
    first, last = (w.targets.take(np.arange(w.start[n])) for w, n in ((task._train, 40), (task._validation, 10)))
    t = first + last
    negatives, like = task._draw_negatives(t.asked_ms, 3)
    for day, date in enumerate(d.dates):
        frozen = features_at(d, np.arange(len(d.videos) + 1), *index_instant(d, (date,)))
        at, extra_at = t.day == day, t.day[like] == day
        assert at.sum() > 5
        assert np.array_equal(collated.inputs.candidate_dense_NC[at], frozen[t.video_row[at]])
        assert np.array_equal(collated.targets["extra_dense_XC"][extra_at], frozen[negatives[extra_at]])


def test_a_negative_is_drawn_only_for_instants_after_its_upload(uploads) -> None:
    d, task = uploads.dataset, uploads.task
    ts_ms = task._train.targets.asked_ms
    drawn = [task._draw_negatives(ts_ms, seed) for seed in range(50)]
    assert all((d.upload_ts_ms[rows] <= ts_ms[like]).all() for rows, like in drawn)
    every = np.unique(np.concatenate([rows for rows, _ in drawn]))
    could = np.flatnonzero(d.eligible & (d.upload_ts_ms <= np.quantile(ts_ms, 0.5)))
    assert len(every) > 200
    assert np.isin(could, every).all()
