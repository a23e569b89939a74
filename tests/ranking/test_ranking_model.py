"""The ranker on a planted log: learns it, scores candidates alone, is blind to slots, survives export and strangers.

The log: a click is likelier when the user's topic is the video's, and less likely further down; the watched share
grows with the match, whatever the duration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from features.batch import to_batch
from features.counters import BEFORE
from features.dataset import Dataset
from features.history import UNDATED_TS_MS, empty_window
from features.inputs import Inputs, UserRows, assemble
from features.schema import EVENTS, SIGNALS, VIDEOS
from features.spec import Categorical, FeatureSpec, MultiValued, Numeric
from ranking.config import RankerConfig
from ranking.infer import Ranker
from ranking.loss import task_losses
from ranking.model import RankerModel
from ranking.tasks import TASKS, task_labels
from ranking.train import RankerTask

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
DAY_0_MS, DAY_MS = 1_767_225_600_000, 86_400_000
SLOT_EFFECT = np.array([0.8, 0.3, 0.0, -0.4, -0.9])
TOPICS, USERS, VIDEO_COUNT, EVENT_COUNT = 4, 200, 150, 7_500


@dataclass(frozen=True)
class Trained:
    dataset: Dataset
    task: RankerTask
    model: RankerModel
    ranker: Ranker
    folder: Path
    match_E: np.ndarray


def planted() -> tuple[Dataset, np.ndarray]:
    rng = np.random.default_rng(5)
    user_topic, video_topic = rng.integers(0, TOPICS, USERS), rng.integers(0, TOPICS, VIDEO_COUNT)
    duration = np.exp(rng.uniform(np.log(5_000), np.log(120_000), VIDEO_COUNT)).astype(np.int64)
    users = pa.table({"user_id": np.arange(USERS) + 2**61, "topic": [f"t{t}" for t in user_topic]})
    columns = {
        "video_id": np.arange(VIDEO_COUNT) + 2**60,
        "author_id": rng.integers(1, 30, VIDEO_COUNT),
        "upload_ts_ms": np.full(VIDEO_COUNT, DAY_0_MS - DAY_MS),
        "duration_ms": duration,
        "tags": [[int(t)] for t in video_topic],
        "eligible": np.ones(VIDEO_COUNT, bool),
    }
    videos = _table(columns, VIDEOS, VIDEO_COUNT)
    user, video = rng.integers(0, USERS, EVENT_COUNT), rng.integers(0, VIDEO_COUNT, EVENT_COUNT)
    ts_ms = np.sort(DAY_0_MS + rng.integers(0, len(DAYS) * DAY_MS, EVENT_COUNT))
    slot, match = rng.integers(0, len(SLOT_EFFECT), EVENT_COUNT), user_topic[user] == video_topic[video]
    click = rng.random(EVENT_COUNT) < 1 / (1 + np.exp(-(-1.2 + 2.4 * match + SLOT_EFFECT[slot])))
    share_watched = np.clip(0.3 + 0.4 * match + rng.normal(0, 0.15, EVENT_COUNT), 0.01, 1.0)
    events = {
        "request_id": [str(n) for n in range(EVENT_COUNT)],
        "user_id": user + 2**61,
        "video_id": video + 2**60,
        "ts_ms": ts_ms,
        "surface": ["feed"] * EVENT_COUNT,
        "slot": slot,
        "watch_ms": (share_watched * duration[video]).astype(np.int64),
        "duration_ms": duration[video],
        "click": click,
        "long_view": click & (share_watched > 0.5),
        "hate": np.zeros(EVENT_COUNT, np.int8),
    }
    date = pa.array(np.array(DAYS)[(ts_ms - DAY_0_MS) // DAY_MS])
    spec = FeatureSpec(
        user=(
            Categorical(name="user_id", column="user_id", rows=512, known_only=True),
            Categorical(name="topic", column="topic", rows=32),
        ),
        video=(
            Categorical(name="video_id", column="video_id", rows=512, known_only=True),
            Categorical(name="author_id", column="author_id", rows=64),
            MultiValued(name="tags", column="tags", rows=32, max_values=2),
            Numeric(name="duration", column="duration_ms", log=True),
        ),
        history_length=10,
    )
    dataset = Dataset.build(
        spec,
        users=users,
        videos=videos,
        events=_table(events, EVENTS, EVENT_COUNT).append_column("date", date),
        undated=None,
        train_dates=DAYS[:2],
    )
    return dataset, match


def _table(columns: dict, schema: pa.Schema, rows: int) -> pa.Table:
    arrays = [pa.array(columns[f.name]) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return pa.table([a.cast(f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    dataset, match_E = planted()
    config = RankerConfig(
        embedding_dim=8, bottom_widths=(16, 8), cross_rank=8, attention_width=8, expert_widths=(16, 8)
    )
    task = RankerTask(dataset, config, DAYS[:2], DAYS[2:])
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    order = np.random.default_rng(0)
    for _ in range(5):
        units = order.permutation(task.train_units())
        for start in range(0, len(units) - 255, 256):
            collated = task.collate(units[start : start + 256], seed=0)
            targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
            optimizer.zero_grad()
            model(to_batch(collated.inputs), targets)["loss"].backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("ranker")
    task.export(model.state_dict(), folder)
    return Trained(dataset, task, model, Ranker.load(folder), folder, match_E)


def request(dataset: Dataset, example: int, video_rows: np.ndarray, slots: np.ndarray | None = None) -> Inputs:
    """What serving would assemble: one context, many candidates."""
    e, n = dataset.examples, len(video_rows)
    row = np.array([example])
    return assemble(
        user=UserRows.take(dataset.users, e.user_row[row]),
        user_counters_BC=dataset.counters.user(e.day[row], e.user_row[row]),
        surface_B=e.surface[row],
        now_ms_B=e.ts_ms[row],
        history=dataset.history.windows(e.user_row[row], e.history_end[row], 10),
        videos=dataset.videos,
        candidate_rows_N=video_rows,
        owner_N=np.zeros(n, np.int64),
        candidate_counters_NC=dataset.counters.video(np.full(n, e.day[example]), video_rows),
        candidate_upload_ts_ms_N=dataset.upload_ts_ms[video_rows],
        slot_N=np.zeros(n, np.int64) if slots is None else slots,
    )


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    ahead = np.sign(score[label][:, None] - score[~label][None, :])
    return float((ahead + 1.0).mean() / 2.0)


def test_learns_the_planted_match_and_drops_tasks_without_positives(trained: Trained) -> None:
    rows = trained.task.validation_units()
    scores = trained.ranker.score(trained.dataset.inputs(rows, with_slot=False))
    labels = trained.dataset.examples.signals[rows]
    assert trained.ranker.tasks == ("click", "long_view", "quick_skip")
    assert set(trained.task.dropped_tasks) == set(TASKS) - {"click", "long_view", "quick_skip"}
    for t, task in enumerate(("click", "long_view")):
        label = labels[:, SIGNALS.index(task)] > 0
        assert auc(label, scores.probability_NT[:, t]) > auc(label, trained.match_E[rows] + 0.0) - 0.03 > 0.6


def test_calibrated_probabilities_have_the_mean_of_the_labels(trained: Trained) -> None:
    rows = trained.task.validation_units()
    scores = trained.ranker.score(trained.dataset.inputs(rows, with_slot=False))
    for t, task in enumerate(trained.ranker.tasks):
        label = task_labels(trained.dataset.examples.take(rows))[:, TASKS.index(task)]
        assert scores.probability_NT[:, t].mean() / label.mean() == pytest.approx(1.0, abs=0.02)


def test_predicted_watch_time_orders_matches_and_stays_in_the_range_of_its_duration(trained: Trained) -> None:
    rows = trained.task.validation_units()
    examples = trained.dataset.examples
    watch_ms = trained.ranker.score(trained.dataset.inputs(rows, with_slot=False)).watch_ms_N
    share = watch_ms / examples.duration_ms[rows]
    match = trained.match_E[rows]
    assert share[match].mean() > share[~match].mean() + 0.2  # planted: 0.7 against 0.3
    assert np.median(np.abs(watch_ms - examples.watch_ms[rows])) < 0.5 * np.median(examples.watch_ms[rows])


def test_a_candidate_scores_the_same_alone_as_among_500(trained: Trained) -> None:
    video_rows = np.random.default_rng(1).integers(1, VIDEO_COUNT + 1, 500)
    together = trained.ranker.score(request(trained.dataset, 7000, video_rows))
    for n in (0, 137, 499):
        alone = trained.ranker.score(request(trained.dataset, 7000, video_rows[n : n + 1]))
        np.testing.assert_allclose(alone.probability_NT[0], together.probability_NT[n], atol=1e-6)
        np.testing.assert_allclose(alone.watch_ms_N[0], together.watch_ms_N[n], rtol=1e-5)


def test_several_contexts_in_one_batch_score_as_each_alone(trained: Trained) -> None:
    inputs = trained.dataset.inputs(np.array([10, 4000, 7400]))
    owner = np.array([2, 0, 1, 0, 2, 2, 0])
    videos = inputs.candidate_N[[0, 1, 2, 2, 1, 0, 0]]
    dense = inputs.candidate_dense_NC[[0, 1, 2, 2, 1, 0, 0]]
    many = replace(inputs, owner_N=owner, candidate_N=videos, candidate_dense_NC=dense, slot_N=owner * 0)
    together = trained.ranker.score(many).probability_NT
    for n in range(len(owner)):
        one = replace(
            many, owner_N=owner[n : n + 1], candidate_N=videos[n : n + 1], candidate_dense_NC=dense[n : n + 1]
        )
        alone = trained.ranker.score(replace(one, slot_N=np.zeros(1, np.int64))).probability_NT
        np.testing.assert_allclose(alone[0], together[n], atol=1e-6)


def test_the_side_tower_finds_the_slot_effect_and_serving_never_sees_a_slot(trained: Trained) -> None:
    slot_rows = trained.dataset.encoder.slot_rows(np.arange(len(SLOT_EFFECT)))
    trained.model.eval()
    with torch.no_grad():
        surface = torch.from_numpy(trained.dataset.examples.surface[:5])
        shift = trained.model.side(torch.from_numpy(slot_rows), surface)[:, 0].numpy()
    trained.model.train()
    assert np.corrcoef(shift, SLOT_EFFECT)[0, 1] > 0.95
    video_rows = np.arange(1, 6)
    top = trained.ranker.score(request(trained.dataset, 7000, video_rows, np.full(5, 1)))
    bottom = trained.ranker.score(request(trained.dataset, 7000, video_rows, np.full(5, 5)))
    np.testing.assert_array_equal(top.probability_NT, bottom.probability_NT)


def test_strangers_get_finite_scores(trained: Trained) -> None:
    dataset = trained.dataset
    stranger = assemble(
        user=UserRows.take(dataset.users, np.array([0])),
        user_counters_BC=dataset.counters.user(np.array([2]), np.array([0])),
        surface_B=np.array([0]),
        now_ms_B=np.array([DAY_0_MS + 5 * DAY_MS]),
        history=empty_window(1, 10),
        videos=dataset.videos,
        candidate_rows_N=np.array([0, 3]),
        owner_N=np.array([0, 0]),
        candidate_counters_NC=dataset.counters.video(np.array([2, 2]), np.array([0, 3])),
        candidate_upload_ts_ms_N=dataset.upload_ts_ms[[0, 3]],
        slot_N=np.zeros(2, np.int64),
    )
    scores = trained.ranker.score(stranger)
    assert np.isfinite(scores.probability_NT).all()
    assert np.isfinite(scores.watch_ms_N).all()
    assert (scores.watch_ms_N >= 0).all()


def test_an_export_loads_to_the_same_scores(trained: Trained) -> None:
    inputs = trained.dataset.inputs(np.arange(50))
    trained.model.eval()
    with torch.no_grad():
        logits_NT, _ = trained.model.logits(to_batch(inputs))
    trained.model.train()
    np.testing.assert_allclose(trained.ranker.logits(inputs)[0], logits_NT.numpy(), atol=2e-6)
    again = Ranker.load(trained.folder)
    np.testing.assert_array_equal(again.score(inputs).probability_NT, trained.ranker.score(inputs).probability_NT)


def test_a_nan_feature_is_refused_by_name(trained: Trained) -> None:
    inputs = trained.dataset.inputs(np.arange(3))
    broken = inputs.candidate_dense_NC.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"candidate_dense_NC is nan at \(1, 2\)"):
        trained.ranker.score(replace(inputs, candidate_dense_NC=broken))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ranker\.safetensors is missing"):
        Ranker.load(tmp_path)


def test_labels_that_were_not_logged_give_no_gradient(trained: Trained) -> None:
    collated = trained.task.collate(np.arange(8), seed=0)
    model = trained.task.build()
    nothing = {name: torch.full(array.shape, torch.nan) for name, array in collated.targets.items()}
    nothing["weight_N"] = torch.ones(8)
    nothing["unit_N"] = torch.arange(8)
    model(to_batch(collated.inputs), nothing)["loss"].backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    assert max(float(g.abs().max()) for g in gradients if g is not None) == 0.0


def test_a_row_weighs_the_same_beside_rows_that_were_not_logged() -> None:
    logits, labels = torch.randn(6, 2), torch.tensor([[1.0, 0.0]] * 6)
    missing = labels.clone()
    missing[1:, 0] = torch.nan

    def first_row(labels_NT: torch.Tensor) -> torch.Tensor:
        x_NT = logits.clone().requires_grad_()
        task_losses(x_NT, labels_NT, torch.ones(6))[0].backward()
        assert x_NT.grad is not None
        return x_NT.grad[0]

    torch.testing.assert_close(first_row(missing), first_row(labels))


def test_down_sampled_negatives_stand_for_those_left_out_and_validation_for_itself(trained: Trained) -> None:
    whole = trained.task
    task = RankerTask(trained.dataset, RankerConfig(keep_negatives=0.3), DAYS[:2], DAYS[2:])
    units = task.train_units()
    full, drawn = (t.collate(t.train_units(), seed=0).targets for t in (whole, task))
    signals = trained.dataset.examples.signals
    positive, kept = (np.nansum(signals[u], axis=1) > 0 for u in (whole.train_units(), units))
    assert kept.sum() == positive.sum()
    assert (~kept).sum() == round(0.3 * (~positive).sum())
    assert drawn["weight_N"].sum() == pytest.approx(len(whole.train_units()), rel=1e-6)
    for t, name in enumerate(task.tasks[:2]):  # signals: their rate among what is trained on is the log's own, exactly
        rate = np.average(drawn["labels_NT"][:, t], weights=drawn["weight_N"])
        assert rate == pytest.approx(full["labels_NT"][:, t].mean(), rel=1e-5), name
    assert (task.collate(task.validation_units()[:500], seed=0).targets["weight_N"] == 1).all()
    assert task.base_rates == whole.base_rates


def test_the_loss_over_every_draw_of_negatives_is_the_loss_of_the_whole() -> None:
    torch.manual_seed(2)
    logits, labels = (
        torch.randn(6, 3),
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]),
    )
    negative, kept = [1, 3, 5], 2  # rows of no signal; the last task (a skip, say) may be positive among them
    whole = task_losses(logits, labels, torch.ones(6)) * 6
    draws = []
    for left_out in negative:
        rows = [row for row in range(6) if row != left_out]
        weight = torch.tensor([len(negative) / kept if row in negative else 1.0 for row in rows])
        draws.append(task_losses(logits[rows], labels[rows], weight) * len(rows))
    torch.testing.assert_close(torch.stack(draws).mean(0), whole)


@pytest.mark.parametrize(
    "options",
    [{"history": False, "leave_out": ("user_id",)}, {"surface_as_context": True}, {"counters": False}],
)
def test_every_dense_parameter_takes_part_in_each_step(trained: Trained, options: dict) -> None:
    task = RankerTask(trained.dataset, RankerConfig(side_dropout=0.0, **options), DAYS[:2], DAYS[2:])
    collated = task.collate(np.arange(64), seed=0)
    model = task.build()
    targets = {name: torch.from_numpy(array) for name, array in collated.targets.items()}
    model(to_batch(collated.inputs), targets)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_undated_impressions_are_trained_on_for_what_they_logged_and_validated_never() -> None:
    dataset, _ = planted()
    past = dataset.examples.take(np.arange(50))
    unlogged = np.full_like(past.signals, np.nan)
    unlogged[:, SIGNALS.index("long_view")] = past.signals[:, SIGNALS.index("long_view")]
    before = replace(past, day=np.full(50, BEFORE), ts_ms=np.full(50, UNDATED_TS_MS), signals=unlogged)
    before = replace(before, watch_ms=np.full(50, np.nan, np.float32))
    task = RankerTask(replace(dataset, undated=before), RankerConfig(undated=True), DAYS[:2], DAYS[2:])
    units = task.train_units()
    assert len(units) == 50 + len(dataset.rows_on(DAYS[:2]))
    assert task.validation_units().max() < len(dataset.examples)
    mixed = task.collate(units[45:55], seed=0)
    click, long_view = (task.tasks.index(name) for name in ("click", "long_view"))
    assert np.isnan(mixed.targets["labels_NT"][:, click]).tolist() == [False] * 5 + [True] * 5, "dated ones come first"
    assert not np.isnan(mixed.targets["labels_NT"][:, long_view]).any()
    assert np.isnan(mixed.targets["watch_quantile_N"]).sum() == 5
