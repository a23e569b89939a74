"""The slate: caps, diversity, and propensities that equal what brute force and repetition find."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from ranking.arrange import ArrangeConfig, arrange, slate_propensities

VALUE = np.array([1.0, 0.9, 0.8, 0.5, 0.3])
AUTHOR = np.array([7, 7, 8, 9, 7])
VECTOR = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
CONFIG = ArrangeConfig(author_cap=2, author_decay=0.5, diversity=0.4, window=1, temperature=0.3, epsilon=0.1, top_m=0)


def by_hand(order: tuple[int, ...]) -> list[float]:
    """Conditional probabilities of a slate under CONFIG, one slot after the other, in plain Python."""
    found = []
    for slot, item in enumerate(order):
        before = order[:slot]
        adjusted = {}
        for j in range(len(VALUE)):
            same_author = sum(AUTHOR[i] == AUTHOR[j] for i in before)
            if j in before or same_author >= 2:
                continue
            similarity = max(0.0, float(VECTOR[j] @ VECTOR[before[-1]])) if before else 0.0
            adjusted[j] = VALUE[j] * 0.5**same_author - 0.4 * similarity
        weights = {j: np.exp(a / 0.3) for j, a in adjusted.items()}
        soft = weights.get(item, 0.0) / sum(weights.values())
        found.append(0.9 * soft + 0.1 / len(adjusted) if item in adjusted else 0.0)
    return found


def test_propensities_equal_brute_force_and_all_slates_sum_to_one() -> None:
    total = 0.0
    for order in permutations(range(5), 3):
        propensity = slate_propensities(np.array(order), VALUE, AUTHOR, VECTOR, CONFIG)
        np.testing.assert_allclose(propensity, by_hand(order), rtol=1e-12)
        total += float(np.prod(propensity))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_logged_propensities_are_those_of_the_slate_and_match_the_frequencies() -> None:
    rng, draws = np.random.default_rng(3), 4000
    expected = {order: by_hand(order) for order in permutations(range(5), 2)}
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        slate = arrange(VALUE, AUTHOR, VECTOR, CONFIG, 2, rng)
        order = tuple(slate.order_S.tolist())
        counts[order] = counts.get(order, 0) + 1
        assert slate.propensity_S.tolist() == pytest.approx(expected[order], rel=1e-12)
    for order, conditional in expected.items():
        chance = float(np.prod(conditional))
        spread = np.sqrt(chance * (1 - chance) / draws)
        assert abs(counts.get(order, 0) / draws - chance) < 4.5 * spread


@pytest.mark.parametrize("explore", [True, False])
def test_the_author_cap_is_never_broken_and_nothing_comes_twice(explore: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        author = rng.integers(0, 12, 60)
        config = ArrangeConfig(author_cap=2, explore=explore, epsilon=0.5, top_m=int(rng.integers(0, 30)))
        slate = arrange(rng.normal(size=60), author, rng.normal(size=(60, 4)), config, 20, rng)
        assert len(set(slate.order_S.tolist())) == 20
        known = author[slate.order_S][author[slate.order_S] != 0]
        assert np.bincount(known).max(initial=0) <= 2


def test_without_exploration_the_best_is_shown_and_its_propensity_is_one() -> None:
    config = ArrangeConfig(explore=False, diversity=0.0, author_decay=1.0, author_cap=2)
    slates = [arrange(VALUE, AUTHOR, VECTOR, config, 4, np.random.default_rng(seed)) for seed in range(3)]
    for slate in slates:
        assert slate.order_S.tolist() == [0, 1, 2, 3]
        assert slate.propensity_S.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_diversity_and_decay_move_a_near_copy_down() -> None:
    value, vector = np.array([1.0, 0.95, 0.9]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    off = ArrangeConfig(explore=False, diversity=0.0, author_decay=1.0)
    diverse = ArrangeConfig(explore=False, diversity=0.2, author_decay=1.0)
    decayed = ArrangeConfig(explore=False, diversity=0.0, author_decay=0.5)
    rng = np.random.default_rng(0)
    assert arrange(value, np.array([1, 2, 3]), vector, off, 3, rng).order_S.tolist() == [0, 1, 2]
    assert arrange(value, np.array([1, 2, 3]), vector, diverse, 3, rng).order_S.tolist() == [0, 2, 1]
    assert arrange(value, np.array([1, 1, 3]), vector, decayed, 3, rng).order_S.tolist() == [0, 2, 1]
    # A decay must not lift a negative value towards zero: -0.5 - (1 - 0.5) * 0.5 = -0.75 < -0.6.
    negative = np.array([1.0, -0.5, -0.6])
    assert arrange(negative, np.array([1, 1, 3]), vector, decayed, 3, rng).order_S.tolist() == [0, 2, 1]


def test_a_pool_that_allows_fewer_than_k_gives_a_shorter_slate() -> None:
    rng = np.random.default_rng(0)
    one_author = arrange(VALUE, np.full(5, 7), VECTOR, CONFIG, 5, rng)
    assert len(one_author.order_S) == 2
    empty = arrange(np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 2)), CONFIG, 5, rng)
    assert len(empty.order_S) == 0
    unknown = arrange(VALUE, np.zeros(5, np.int64), VECTOR, CONFIG, 9, rng)
    assert sorted(unknown.order_S.tolist()) == [0, 1, 2, 3, 4]


def test_a_value_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="value of candidate 1 is not finite"):
        arrange(np.array([1.0, np.nan]), np.array([1, 2]), np.zeros((2, 2)), CONFIG, 2, np.random.default_rng(0))
