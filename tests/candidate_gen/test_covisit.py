"""Co-visitation: what is counted is what a plain double loop counts, nothing of the future, in any block size."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.covisit import HOUR_MS, CovisitConfig, Covisits, liked
from features.history import UNDATED_TS_MS, HistoryLog
from features.schema import SIGNALS

USERS, VIDEOS, NOW_MS = 40, 60, 1_700_000_000_000
CONFIG = CovisitConfig(window=4, window_h=30.0, decay=0.8, half_life_h=20.0, shrinkage=2.0, neighbours=7)


def random_log(seed: int, n: int = 1500) -> HistoryLog:
    """Ties in time, videos liked twice, undated events, one user in ten without any."""
    rng = np.random.default_rng(seed)
    ts_ms = NOW_MS - rng.integers(1, 100, n) * HOUR_MS
    return HistoryLog.build(
        n_users=USERS,
        user_row=rng.integers(0, 9 * USERS // 10, n),
        video_row=(VIDEOS * rng.random(n) ** 2).astype(np.int64) + 1,
        ts_ms=np.where(rng.random(n) < 0.2, UNDATED_TS_MS, ts_ms),
        signals=rng.integers(0, 2, n) << rng.integers(0, len(SIGNALS), n),
        watch_fraction=np.zeros(n, np.float32),
    )[0]


def eligible(seed: int) -> np.ndarray:
    allowed = np.random.default_rng(seed).random(VIDEOS + 1) < 0.8
    allowed[0] = False
    return allowed


def likes_of(log: HistoryLog, user: int, config: CovisitConfig, before_ms: float) -> list[tuple[int, int]]:
    """(time, video) by time, each video at the last time it was liked."""
    last: dict[int, tuple[int, int]] = {}
    for at in range(log.user_start[user], log.user_start[user + 1]):
        given = [SIGNALS[s] for s in range(len(SIGNALS)) if log.signals[at] >> s & 1]
        if log.ts_ms[at] < before_ms and any(signal in config.feedback for signal in given):
            last[int(log.video_row[at])] = (at, int(log.ts_ms[at]))
    return [(ts_ms, video) for video, (_, ts_ms) in sorted(last.items(), key=lambda entry: entry[1][0])]


def counted_plainly(log: HistoryLog, config: CovisitConfig, before_ms: int) -> dict[tuple[int, int], float]:
    """Scores of every pair (video, neighbour) by loops over users and their likes."""
    likes = [likes_of(log, user, config, before_ms) for user in range(1, USERS + 1)]
    oldest = min(ts for of_user in likes for ts, _ in of_user if ts != UNDATED_TS_MS)
    users: dict[int, int] = defaultdict(int)
    summed: dict[tuple[int, int], float] = defaultdict(float)
    for of_user in likes:
        for i, (ts_i, video_i) in enumerate(of_user):
            users[video_i] += 1
            for j in range(i + 1, min(i + config.window + 1, len(of_user))):
                ts_j, video_j = of_user[j]
                if ts_i != UNDATED_TS_MS and ts_j - ts_i > config.window_h * HOUR_MS:
                    continue
                age_h = (before_ms - max(ts_j, oldest)) / HOUR_MS
                weight = config.decay ** (j - i - 1) * 0.5 ** (age_h / config.half_life_h)
                summed[video_i, video_j] += weight
                summed[video_j, video_i] += weight
    power = config.popularity_power
    return {
        (a, b): weight / (users[a] ** (1 - power) * users[b] ** power + config.shrinkage)
        for (a, b), weight in summed.items()
    }


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_a_plain_double_loop(seed: int) -> None:
    log, allowed = random_log(seed), eligible(seed)
    config = replace(CONFIG, popularity_power=[0.0, 0.3, 1.0][seed % 3])
    found = Covisits.count(log, allowed, config, before_ms=NOW_MS)
    expected = counted_plainly(log, config, NOW_MS)
    for video in range(VIDEOS + 1):
        rows, scores = (part[found.start[video] : found.start[video + 1]] for part in (found.neighbour, found.score))
        pairs = sorted((-score, b) for (a, b), score in expected.items() if a == video and allowed[b])
        assert scores == pytest.approx([-score for score, _ in pairs[: config.neighbours]], rel=1e-5)
        exact = {b: -score for score, b in pairs}
        assert scores == pytest.approx([exact[int(row)] for row in rows], rel=1e-5)
        assert len(set(rows)) == len(rows)
    assert len(found.start) == VIDEOS + 2
    assert (found.neighbour.dtype, found.score.dtype) == (np.int64, np.float32)


def test_two_users_by_hand() -> None:
    """1 and 2 are liked together by both users, 3 by one of them, two events away from 1: 2/2, 1/2 and .8/2."""
    log = HistoryLog.build(
        n_users=2,
        user_row=np.array([1, 1, 1, 2, 2]),
        video_row=np.array([1, 2, 3, 1, 2]),
        ts_ms=np.full(5, NOW_MS),
        signals=np.full(5, 1 << SIGNALS.index("like")),
        watch_fraction=np.zeros(5, np.float32),
    )[0]
    config = replace(CONFIG, shrinkage=0.0, popularity_power=0.0)
    found = Covisits.count(log, np.ones(4, bool), config, before_ms=NOW_MS + 1)
    assert found.start.tolist() == [0, 0, 2, 4, 6]
    assert found.neighbour.tolist() == [2, 3, 1, 3, 2, 1]
    assert found.score == pytest.approx([2 / 2, 0.8 / 2, 2 / 2, 1 / 2, 1 / 1, 0.8 / 1], rel=1e-5)
    rows, scores = found.similar(np.array([1, 2]), np.array([1.0, 10.0]))
    assert rows.tolist() == [1, 2, 3]
    assert scores == pytest.approx([10 * 2 / 2, 1 * 2 / 2, 1 * 0.8 / 2 + 10 * 1 / 2], rel=1e-5)


def test_the_size_of_a_block_changes_nothing() -> None:
    log, allowed = random_log(11), eligible(11)
    whole = Covisits.count(log, allowed, CONFIG)
    for pairs_at_once in (1, 100, 1_000):
        blocks: list[int] = []
        config = replace(CONFIG, pairs_at_once=pairs_at_once)
        pieces = Covisits.count(log, allowed, config, on_progress=blocks.append)
        assert sum(blocks) == VIDEOS + 1
        assert len(blocks) > 1
        assert np.array_equal(whole.start, pieces.start)
        assert whole.score == pytest.approx(pieces.score, rel=1e-6)
        same = whole.neighbour == pieces.neighbour
        assert same.mean() > 0.99  # equal scores may change places where sums were added in another order


def test_deleting_the_future_changes_no_count() -> None:
    log, allowed, cut_ms = random_log(12), eligible(12), NOW_MS - 40 * HOUR_MS
    owner = np.repeat(np.arange(USERS + 1), np.diff(log.user_start))
    past = log.ts_ms < cut_ms
    kept = HistoryLog.build(
        n_users=USERS,
        user_row=owner[past],
        video_row=log.video_row[past],
        ts_ms=log.ts_ms[past],
        signals=log.signals[past],
        watch_fraction=log.watch_fraction[past],
    )[0]
    with_future = Covisits.count(log, allowed, CONFIG, before_ms=cut_ms)
    without = Covisits.count(kept, allowed, CONFIG, before_ms=cut_ms)
    assert len(without.neighbour) < len(Covisits.count(log, allowed, CONFIG).neighbour)
    for name in ("start", "neighbour", "score"):
        assert np.array_equal(getattr(with_future, name), getattr(without, name))


def test_a_log_without_likes_has_no_neighbours() -> None:
    log = replace(random_log(13), signals=np.zeros(0, np.uint8))
    nobody = replace(log, signals=np.zeros(len(log.ts_ms), np.uint8))
    found = Covisits.count(nobody, eligible(13), CONFIG)
    assert found.start.tolist() == [0] * (VIDEOS + 2)
    assert [len(part) for part in found.similar(np.array([3, 4]), np.array([1.0, 1.0]))] == [0, 0]
    assert [len(part) for part in found.similar(np.zeros(0, np.int64), np.zeros(0))] == [0, 0]


def test_a_query_asks_with_the_users_likes_newest_first() -> None:
    like, hate, long_view = (1 << SIGNALS.index(name) for name in ("like", "hate", "long_view"))
    log = HistoryLog.build(
        n_users=1,
        user_row=np.ones(5, np.int64),
        video_row=np.array([5, 0, 7, 8, 9]),
        ts_ms=NOW_MS + np.arange(5),
        signals=np.array([like | long_view, like, hate, long_view, 0]),
        watch_fraction=np.zeros(5, np.float32),
    )[0]
    window = log.windows(np.array([1]), np.array([5]), 8)
    rows, weights = liked(window, replace(CONFIG, feedback={"long_view": 1.0, "like": 2.0}, recency=0.5))
    assert rows.tolist() == [8, 5]
    assert weights.tolist() == [1.0, 2.0 * 0.5]
    nobody = log.windows(np.array([1]), np.array([0]), 8)
    assert [len(part) for part in liked(nobody, CONFIG)] == [0, 0]


def test_arrays_come_back_memory_mapped_and_those_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    counted = Covisits.count(random_log(14), eligible(14), CONFIG)
    counted.save(tmp_path)
    loaded = Covisits.load(tmp_path)
    for name in ("start", "neighbour", "score"):
        assert np.array_equal(getattr(counted, name), getattr(loaded, name))
        assert not getattr(loaded, name).flags.owndata
    np.save(tmp_path / "covisit_score.npy", counted.score[:-1])
    with pytest.raises(ValueError, match="count them again"):
        Covisits.load(tmp_path)


def test_mistakes_in_the_configuration_are_named() -> None:
    with pytest.raises(ValueError, match=r"names \['applause'\]; the signals are click"):
        CovisitConfig(feedback={"applause": 1.0})
    for wrong in ({"window": 0}, {"decay": 1.5}, {"half_life_h": 0.0}, {"neighbours": 0}):
        with pytest.raises(ValueError, match=f"CovisitConfig.*{next(iter(wrong))}"):
            CovisitConfig(**wrong)
