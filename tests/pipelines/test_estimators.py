"""Estimators against a world small enough to enumerate, and against arithmetic: no test here depends on chance.

Four videos, two slots, a Plackett-Luce logger of strengths 4, 3, 2, 1. Every slate's chance is a multiple of 1/5040,
so a log of 5040 requests holds each slate exactly as often as it is expected: an estimator that is linear in the log
gives its expectation on it, to the last digit.
"""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from pipelines.replay.bootstrap import Resamples, Totals, by_user, interval, paired, summarise
from pipelines.replay.estimators import CLIPS, Modelled, SlateSums, available, value, weigh
from pipelines.replay.keys import poisson_counts, text_keys
from pipelines.replay.slates import Slates
from pipelines.replay.trust import Thresholds, WeightTally

VIDEOS, SLOTS = 4, 2
LOGGER = np.array([4.0, 3.0, 2.0, 1.0])
TARGET = np.array([0.3, 1.0, 0.5, 0.9])
"""Plackett-Luce strengths of the four videos."""
BASE = np.array([0.7, 0.2, 0.5, 0.3])
SLATES = list(permutations(range(VIDEOS), SLOTS))


def reward_of(first: int, second: int) -> tuple[float, float]:
    """Chances of a long view in both slots; the second depends on the first: a cascade with satiation."""
    return BASE[first], BASE[second] * (0.4 if BASE[first] > 0.4 else 1.0)


def chances(strength, first: int, second: int) -> tuple[float, float]:
    return strength[first] / strength.sum(), strength[second] / (strength.sum() - strength[first])


def true_value(strength) -> float:
    """Reward a shown row, over all slates."""
    return sum(np.prod(chances(strength, *slate)) * sum(reward_of(*slate)) / SLOTS for slate in SLATES)


def log_of(slates: list[tuple[int, int]], users: int | None = None):
    """A log of these slates: rows, the target's probabilities, its argmax share, expected rewards, videos."""
    n = len(slates)
    logged = np.array([chances(LOGGER, *s) for s in slates]).ravel()
    target = np.array([chances(TARGET, *s) for s in slates]).ravel()
    best = np.argsort(-TARGET)
    greedy = [(a == best[0], b == next(v for v in best if v != a)) for a, b in slates]
    reward = np.array([reward_of(*s) for s in slates]).ravel()
    rows = Slates(
        request=np.repeat(np.arange(n), SLOTS),
        slot=np.tile(np.arange(SLOTS), n),
        user=np.repeat(np.arange(n) % (users or n), SLOTS),
        logged=logged,
        candidate=np.array(slates).ravel(),
    )
    return rows, target, np.array(greedy, dtype=float).ravel(), reward


@pytest.fixture(scope="module")
def expected_log():
    """Every slate as often as it is expected in 5040 requests."""
    copies = [round(5040 * np.prod(chances(LOGGER, *slate))) for slate in SLATES]
    assert sum(copies) == 5040
    return log_of([slate for slate, n in zip(SLATES, copies, strict=True) for _ in range(n)], users=40)


def judge(rows, target, greedy, reward, resamples: int = 2, model: Modelled | None = None):
    """Every estimator's estimate and resamples, as replay computes them."""
    users = int(rows.user.max()) + 1
    counts, sums = Resamples(resamples, 0).counts(np.arange(users)), SlateSums(rows, users)
    weights, logged, policy = weigh(rows, target, greedy), Totals(), Totals()
    logged.add(counts, sums.logged({"r": reward}))
    policy.add(counts, sums.weights(weights, CLIPS) | sums.earned(weights, "r", reward, CLIPS))
    if model is not None:
        policy.add(counts, sums.modelled(weights, "r", reward, model, CLIPS))
    return {name: value(name, "r", policy, logged) for name in ("logged", *available("r", policy, CLIPS))}


def modelled(rows, q_VS: np.ndarray, below: float = 0.0) -> Modelled:
    """A reward model by video and slot, right or wrong, as the estimator wants it."""
    first = np.repeat(rows.candidate[0::2], SLOTS)
    policy = np.empty(len(rows.slot))
    for i, (slot, above) in enumerate(zip(rows.slot, first, strict=True)):
        p = TARGET.copy()
        p[above] = 0.0 if slot else p[above]
        policy[i] = p @ q_VS[:, slot] / p.sum()
    shown = q_VS[rows.candidate, rows.slot]
    return Modelled(shown=shown, policy=policy, below=np.where(rows.slot == 0, below, 0.0), drawn=shown)


def test_rips_and_slate_ips_are_unbiased_in_the_cascade_and_slot_by_slot_ips_is_not(expected_log):
    found = {name: drawn[0] for name, drawn in judge(*expected_log).items()}
    truth = true_value(TARGET)
    for name in ("rips", "sips", "snrips", "snsips"):
        assert found[name] == pytest.approx(truth, rel=1e-12)
    # What theory says slot-by-slot weights estimate: the logger's first video, the target's second given that.
    mixed = sum(
        p_first * (w_first * reward_of(*s)[0] + p_second * reward_of(*s)[1])
        for s in SLATES
        for p_first, w_first, p_second in [
            (chances(LOGGER, *s)[0], chances(TARGET, *s)[0] / chances(LOGGER, *s)[0] / 3, chances(TARGET, *s)[1])
        ]
    )  # a third: each first video stands above three second ones
    assert found["ips"] == pytest.approx(mixed / SLOTS, rel=1e-12)
    assert abs(found["ips"] - truth) > 0.01


def test_the_doubly_robust_estimator_is_unbiased_whatever_the_reward_model(expected_log):
    rows, truth = expected_log[0], true_value(TARGET)
    good = np.stack([BASE, BASE * 0.7], axis=1)
    wrong = np.random.default_rng(3).normal(0, 5, (VIDEOS, SLOTS))
    for q_VS, below in ((good, 0.3), (wrong, -7.0), (np.zeros((VIDEOS, SLOTS)), 0.0)):
        found = judge(*expected_log, model=modelled(rows, q_VS, below))["dr"][0]
        assert found == pytest.approx(truth, rel=1e-10)
    assert judge(*expected_log, model=modelled(rows, wrong))["dm"][0] != pytest.approx(truth, rel=0.1)


def test_without_a_model_the_doubly_robust_estimator_is_rips(expected_log):
    found = judge(*expected_log, resamples=20, model=modelled(expected_log[0], np.zeros((VIDEOS, SLOTS))))
    for suffix in ("", "@100", "@3"):
        assert found[f"dr{suffix}"] == pytest.approx(found[f"rips{suffix}"], rel=1e-12)


def test_rips_varies_less_than_slate_ips_and_a_good_model_less_still(expected_log):
    """Exact variances of one request's contribution, over the enumerated log."""
    rows, target, greedy, reward = expected_log
    w = weigh(rows, target, greedy)
    model = modelled(rows, np.stack([BASE, BASE * 0.7], axis=1), below=0.3)
    above = np.where(rows.slot == 0, 1.0, np.roll(w.cascade, 1))
    doubly = w.cascade * (reward - model.shown - model.below) + above * (model.policy + model.below)
    # Rewards are coins: to the spread of their expectation comes p (1 - p), weighted by the squared weight.
    coin = reward * (1 - reward)
    spread = {}
    for name, contribution, weight in (
        ("sips", w.slate * reward, w.slate),
        ("rips", w.cascade * reward, w.cascade),
        ("dr", doubly, w.cascade),
    ):
        per_request = contribution.reshape(-1, SLOTS).sum(axis=1)
        spread[name] = per_request.var() + (weight**2 * coin).reshape(-1, SLOTS).sum(axis=1).mean()
    assert spread["dr"] < spread["rips"] < spread["sips"]


def test_the_bias_of_self_normalisation_shrinks_with_the_log():
    """Every log of n one-slot requests is enumerated, with its probability: the bias is exact."""
    p, q = LOGGER / LOGGER.sum(), TARGET / TARGET.sum()
    truth, bias = float(q @ BASE), []
    for n in (1, 2, 4, 6):
        expected = 0.0
        for videos in product(range(VIDEOS), repeat=n):
            v = np.array(videos)
            rows = Slates(
                request=np.arange(n), slot=np.zeros(n, dtype=int), user=np.arange(n), logged=p[v], candidate=v
            )
            w = weigh(rows, q[v], np.ones(n)).step
            expected += np.prod(p[v]) * (w @ BASE[v]) / w.sum()
        bias.append(abs(expected - truth))
    assert bias == sorted(bias, reverse=True)
    assert bias[3] < bias[1] / 2
    assert bias[0] == pytest.approx(abs(p @ BASE - truth))  # one row: its own reward, whoever shows it


def test_target_equal_to_logger_has_weight_1_and_the_logged_mean_exactly():
    rng = np.random.default_rng(1)
    rows, _, greedy, _ = log_of([SLATES[i] for i in rng.integers(0, len(SLATES), 400)], users=50)
    reward = rng.random(len(greedy))
    weights = weigh(rows, rows.logged.copy(), greedy)
    assert (weights.step == 1).all()
    assert (weights.cascade == 1).all()
    assert (weights.slate == 1).all()
    found = judge(rows, rows.logged, greedy, reward, resamples=50)
    for name, drawn in found.items():
        if name != "replay":
            assert drawn[0] == found["logged"][0]
            assert (paired(drawn, found["logged"]) == 0).all()
            assert summarise(drawn, found["logged"]).probability_better == 0.5
    assert found["logged"][0] == pytest.approx(reward.mean(), rel=1e-12)


def test_estimates_by_hand():
    """Two requests of two slots. Ratios: (2, 1/2) and (1/2, 4); cascade weights: (2, 1) and (1/2, 2)."""
    rows = Slates(
        request=np.array([0, 0, 1, 1]),
        slot=np.array([0, 1, 0, 1]),
        user=np.array([0, 0, 1, 1]),
        logged=np.full(4, 0.2),
        candidate=np.arange(4),
    )
    target, greedy = np.array([0.4, 0.1, 0.1, 0.8]), np.array([1.0, 0.0, 0.0, 0.5])
    model = Modelled(
        shown=np.array([0.5, 0.2, 0.5, 0.2]),
        policy=np.array([0.4, 0.3, 0.4, 0.3]),
        below=np.array([0.3, 0.0, 0.3, 0.0]),
        drawn=np.array([0.6, 0.1, 0.2, 0.3]),
    )
    reward = np.array([1.0, 0.0, 1.0, 3.0])
    found = {name: drawn[0] for name, drawn in judge(rows, target, greedy, reward, model=model).items()}
    assert found["logged"] == pytest.approx((1 + 0 + 1 + 3) / 4)
    assert found["replay"] == pytest.approx((1 * 1 + 0.5 * 3) / (1 + 0.5))
    assert found["ips"] == pytest.approx((2 * 1 + 0.5 * 0 + 0.5 * 1 + 4 * 3) / 4)
    assert found["rips"] == pytest.approx((2 * 1 + 1 * 0 + 0.5 * 1 + 2 * 3) / 4)
    assert found["sips"] == pytest.approx((1 * (1 + 0) + 2 * (1 + 3)) / 4)
    assert found["snsips"] == pytest.approx((1 * (1 + 0) + 2 * (1 + 3)) / (1 + 1 + 2 + 2))
    assert found["ips@3"] == pytest.approx((2 * 1 + 0.5 * 0 + 0.5 * 1 + 3 * 3) / 4)
    slot_0, slot_1 = (2 * 1 + 0.5 * 1) / (2 + 0.5), (1 * 0 + 2 * 3) / (1 + 2)
    assert found["snrips"] == pytest.approx((2 * slot_0 + 2 * slot_1) / 4)
    assert found["dm"] == pytest.approx((0.6 + 0.1 + 0.2 + 0.3) / 4)
    first = 2 * (1 - 0.5 - 0.3) + (0.4 + 0.3) + 1 * (0 - 0.2) + 2 * 0.3
    second = 0.5 * (1 - 0.5 - 0.3) + (0.4 + 0.3) + 2 * (3 - 0.2) + 0.5 * 0.3
    assert found["dr"] == pytest.approx((first + second) / 4)


def test_diagnostics_by_hand():
    rows = Slates(
        request=np.arange(4),
        slot=np.zeros(4, dtype=int),
        user=np.arange(4),
        logged=np.array([0.5, 0.5, 0.1, 0.5]),
        candidate=np.arange(4),
    )
    tally = WeightTally("snips", CLIPS, clip=3)
    tally.add(weigh(rows, np.array([0.5, 0.5, 0.5, 0.5]), np.array([1.0, 0, 0, 0])))
    found = tally.diagnostics(interval(np.zeros(3)))
    assert found.effective_sample_size == pytest.approx((1 + 1 + 5 + 1) ** 2 / (1 + 1 + 25 + 1))
    assert found.effective_share == pytest.approx(found.effective_sample_size / 4)
    assert (found.mean_weight, found.max_weight, found.share_clipped) == (pytest.approx(8 / 4), 5, 1 / 4)
    assert found.top_percent_share == pytest.approx(5 / 8)
    assert found.match_rate == 1 / 4
    assert found.effective_by_clip["3"] == pytest.approx((1 + 1 + 3 + 1) ** 2 / (1 + 1 + 9 + 1))
    shown = dict(zip(found.histogram["weight"], found.histogram["rows"], strict=True))
    assert (shown[1.0], shown[4.0]) == (3, 1)  # 5 lies between 4 and 8
    assert sum(found.histogram["mass"]) == pytest.approx(1)


def test_each_threshold_refuses_and_says_what_would_mend_it():
    rng = np.random.default_rng(0)
    n = 4000

    def reasons(step):
        i = np.arange(n)
        rows = Slates(request=i, slot=np.zeros(n, dtype=int), user=i, logged=np.ones(n), candidate=i)
        tally = WeightTally("snips", CLIPS, clip=100)
        tally.add(weigh(rows, step, np.ones(n)))
        totals, counts = Totals(), Resamples(200, 0).counts(np.arange(n))
        zero = np.zeros(n, dtype=int)
        totals.add(counts, {"w": by_user(step, zero, np.arange(n), n, 1), "n": by_user(None, zero, np.arange(n), n, 1)})
        return " | ".join(Thresholds().reasons(tally.diagnostics(interval(1 - totals.total("w") / totals.total("n")))))

    assert reasons(rng.uniform(0.5, 1.5, n)) == ""
    half = np.where(np.arange(n) % 2 == 0, 1.0, 0.0)  # half of what the target shows is never logged
    assert "mean weight 0.5" in reasons(half)
    assert "50% of what the policy shows has no support in the log" in reasons(half)
    few = np.where(np.arange(n) < 20, n / 20, 0.0)
    for said in ("effective sample size 20 is below 200", "only 0.50% of 4,000 rows", "1% of the rows carry 100%"):
        assert said in reasons(few)
    assert reasons(few).count("mend:") == 3


def test_intervals_are_the_same_in_one_part_and_in_many(expected_log):
    """Parts of whole requests in any order: the same sums, so the same estimates and resamples."""
    rows, target, greedy, reward = log_of([SLATES[i % 12] for i in range(300)], users=30)
    whole = judge(rows, target, greedy, reward, resamples=40)
    logged, policy, ids = Totals(), Totals(), np.arange(30)
    for part in (2, 0, 1):
        mine = rows.request % 3 == part
        users, user = np.unique(rows.user[mine], return_inverse=True)
        cut = Slates(
            request=np.repeat(np.arange(mine.sum() // 2), 2), slot=rows.slot[mine], user=user,
            logged=rows.logged[mine], candidate=rows.candidate[mine],
        )  # fmt: skip
        counts, sums = Resamples(40, 0).counts(ids[users]), SlateSums(cut, len(users))
        weights = weigh(cut, target[mine], greedy[mine])
        logged.add(counts, sums.logged({"r": reward[mine]}))
        policy.add(counts, sums.weights(weights, CLIPS) | sums.earned(weights, "r", reward[mine], CLIPS))
    for name, drawn in whole.items():
        assert value(name, "r", policy, logged) == pytest.approx(drawn, rel=1e-12)


def test_a_later_part_may_have_longer_slates():
    totals, counts = Totals(), Resamples(3, 0).counts(np.arange(2))
    totals.add(counts, {"x": np.array([[1.0], [2.0]])})
    totals.add(counts, {"x": np.array([[1.0, 5.0], [0.0, 7.0]])})
    assert totals["x"][0].tolist() == [4.0, 12.0]
    assert totals["x"][1:, 1].tolist() == (counts.T.astype(float) @ [5.0, 7.0]).tolist()


def test_counts_are_poisson_and_belong_to_the_user():
    keys = np.arange(2000) + 2**61
    counts = poisson_counts(keys, 500, seed=3)
    n = counts.size
    assert abs(counts.mean() - 1) < 5 / np.sqrt(n)
    assert abs(counts.var() - 1) < 5 * np.sqrt(3 / n)  # the fourth central moment of Poisson(1) is 4
    for k, p in enumerate([np.exp(-1), np.exp(-1), np.exp(-1) / 2, np.exp(-1) / 6]):
        assert abs((counts == k).mean() - p) < 5 * np.sqrt(p * (1 - p) / n)
    across = np.corrcoef(counts[:, :8].astype(float), rowvar=False)
    assert np.abs(across - np.eye(8)).max() < 5 / np.sqrt(2000)
    chosen = np.array([1999, 3, 700])
    assert (poisson_counts(keys[chosen], 500, seed=3) == counts[chosen]).all()
    assert (poisson_counts(keys, 120, seed=3) == counts[:, :120]).all()
    assert (poisson_counts(keys, 500, seed=4) != counts).any()


def test_text_keys_tell_strings_apart_and_know_equal_ones():
    import pyarrow as pa

    texts = ["", "a", "a\0", "ab", "ba", "w0123456789abcdef", "w0123456789abcdeg", "é", "a" * 100]
    key = text_keys(pa.array(texts))
    assert len(set(key.tolist())) == len(texts)
    assert text_keys(pa.array(["x", *texts])[1:]).tolist() == key.tolist()
    assert text_keys(pa.array(texts, type=pa.large_string())).tolist() == key.tolist()
    many = text_keys(pa.array([f"r{i}" for i in range(100_000)]))
    assert len(np.unique(many)) == 100_000


def test_users_who_come_often_widen_the_interval():
    """Ten users with a taste each, 200 rows a user: rows are not independent, so ten is what there is to learn from."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(10), 200)
    reward = (rng.random(2000) < np.linspace(0.1, 0.9, 10)[user]).astype(float)
    rows = Slates(
        request=np.arange(2000), slot=np.zeros(2000, dtype=int), user=user, logged=np.full(2000, 0.1),
        candidate=np.arange(2000),
    )  # fmt: skip
    found = interval(judge(rows, rows.logged, np.ones(2000), reward, resamples=400)["logged"])
    as_if_rows_were_independent = 2 * 1.96 * reward.std() / np.sqrt(2000)
    assert found.high - found.low > 4 * as_if_rows_were_independent
