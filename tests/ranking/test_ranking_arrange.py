"""The slate: caps, diversity, and propensities that equal what brute force and repetition find."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from ranking.arrange import ArrangeConfig, Candidates, Shown, arrange, slate_propensities
from ranking.diversity import spectral

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
        propensity = slate_propensities(np.array(order), Candidates(VALUE, AUTHOR, VECTOR), CONFIG)
        np.testing.assert_allclose(propensity, by_hand(order), rtol=1e-12)
        total += float(np.prod(propensity))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_logged_propensities_are_those_of_the_slate_and_match_the_frequencies() -> None:
    rng, draws = np.random.default_rng(3), 4000
    expected = {order: by_hand(order) for order in permutations(range(5), 2)}
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        slate = arrange(Candidates(VALUE, AUTHOR, VECTOR), CONFIG, 2, rng)
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
        slate = arrange(Candidates(rng.normal(size=60), author, rng.normal(size=(60, 4))), config, 20, rng)
        assert len(set(slate.order_S.tolist())) == 20
        known = author[slate.order_S][author[slate.order_S] != 0]
        assert np.bincount(known).max(initial=0) <= 2


def test_without_exploration_the_best_is_shown_and_its_propensity_is_one() -> None:
    config = ArrangeConfig(explore=False, diversity=0.0, author_decay=1.0, author_cap=2)
    slates = [arrange(Candidates(VALUE, AUTHOR, VECTOR), config, 4, np.random.default_rng(seed)) for seed in range(3)]
    for slate in slates:
        assert slate.order_S.tolist() == [0, 1, 2, 3]
        assert slate.propensity_S.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_diversity_and_decay_move_a_near_copy_down() -> None:
    value, vector = np.array([1.0, 0.95, 0.9]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    off = ArrangeConfig(explore=False, diversity=0.0, author_decay=1.0)
    diverse = ArrangeConfig(explore=False, diversity=0.2, author_decay=1.0)
    decayed = ArrangeConfig(explore=False, diversity=0.0, author_decay=0.5)
    rng = np.random.default_rng(0)
    assert arrange(Candidates(value, np.array([1, 2, 3]), vector), off, 3, rng).order_S.tolist() == [0, 1, 2]
    assert arrange(Candidates(value, np.array([1, 2, 3]), vector), diverse, 3, rng).order_S.tolist() == [0, 2, 1]
    assert arrange(Candidates(value, np.array([1, 1, 3]), vector), decayed, 3, rng).order_S.tolist() == [0, 2, 1]
    # A decay must not lift a negative value towards zero: -0.5 - (1 - 0.5) * 0.5 = -0.75 < -0.6.
    negative = np.array([1.0, -0.5, -0.6])
    assert arrange(Candidates(negative, np.array([1, 1, 3]), vector), decayed, 3, rng).order_S.tolist() == [0, 2, 1]


def test_a_pool_that_allows_fewer_than_k_gives_a_shorter_slate() -> None:
    rng = np.random.default_rng(0)
    one_author = arrange(Candidates(VALUE, np.full(5, 7), VECTOR), CONFIG, 5, rng)
    assert len(one_author.order_S) == 2
    empty = arrange(Candidates(np.zeros(0), np.zeros(0, np.int64), np.zeros((0, 2))), CONFIG, 5, rng)
    assert len(empty.order_S) == 0
    unknown = arrange(Candidates(VALUE, np.zeros(5, np.int64), VECTOR), CONFIG, 9, rng)
    assert sorted(unknown.order_S.tolist()) == [0, 1, 2, 3, 4]


def test_a_value_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="value of candidate 1 is not finite"):
        Candidates(np.array([1.0, np.nan]), np.array([1, 2]), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"columns of \[2, 1, 2\] candidates"):
        Candidates(np.ones(2), np.ones(1), np.ones((2, 2)))


TOPIC = np.array([3, 4, 3, -1, 4])
FRESH = np.array([False, True, False, True, False])
EVERY_RULE = ArrangeConfig(
    author_cap=2,
    author_decay=0.5,
    topic_decay=0.8,
    diversity=0.4,
    diversity_by="ssd",
    window=2,
    duplicate_cosine=0.999,
    temperature=0.3,
    epsilon=0.1,
    top_m=0,
    fresh_slots=(1,),
    uniform_slots=(2,),
)
SESSION = Shown(np.array([8, 8, 0]), np.array([4, -1, 4]), np.array([[0.6, 0.8], [-0.6, 0.8]]))


def volume(vectors: list[np.ndarray]) -> float:
    """Of the parallelotope that the vectors span: the root of their Gram determinant."""
    gram = np.array([[float(a @ b) for b in vectors] for a in vectors])
    return float(np.sqrt(max(np.linalg.det(gram), 0.0))) if vectors else 1.0


def by_hand_with_every_rule(order: tuple[int, ...]) -> list[float]:
    """Conditional probabilities under EVERY_RULE after SESSION, in plain Python; the plane holds two directions."""
    found, session = [], [np.array([0.6, 0.8]), np.array([-0.6, 0.8])]
    for slot, item in enumerate(order):
        before = order[:slot]
        shown = [*session, *(VECTOR[i] for i in before)]
        window = shown[-2:]
        adjusted = {}
        for j in range(len(VALUE)):
            in_slate = sum(AUTHOR[i] == AUTHOR[j] for i in before)
            if j in before or in_slate >= 2 or any(float(v @ VECTOR[j]) >= 0.999 for v in shown):
                continue
            authors = in_slate + {8: 2}.get(int(AUTHOR[j]), 0)
            topics = 0 if TOPIC[j] == -1 else sum(TOPIC[i] == TOPIC[j] for i in before) + {4: 2}.get(int(TOPIC[j]), 0)
            stands_out = 0.0 if volume(window) > 1e-9 else volume([window[0], VECTOR[j]])
            adjusted[j] = VALUE[j] * 0.5**authors * 0.8**topics - 0.4 * (1 - stands_out)
        if slot == 1 and any(FRESH[j] for j in adjusted):
            adjusted = {j: a for j, a in adjusted.items() if FRESH[j]}
        weights = {j: np.exp(a / 0.3) for j, a in adjusted.items()}
        epsilon = 1.0 if slot == 2 else 0.1
        soft = weights.get(item, 0.0) / sum(weights.values()) if weights else 0.0
        found.append((1 - epsilon) * soft + epsilon / len(adjusted) if item in adjusted else 0.0)
    return found


def test_with_every_rule_on_propensities_equal_enumeration_and_sum_to_one() -> None:
    candidates = Candidates(VALUE, AUTHOR, VECTOR, TOPIC, FRESH)
    total, possible = 0.0, 0
    for order in permutations(range(5), 3):
        propensity = slate_propensities(np.array(order), candidates, EVERY_RULE, SESSION)
        expected = by_hand_with_every_rule(order)
        np.testing.assert_allclose(propensity, expected, rtol=1e-6, atol=1e-12)  # roots of almost 0 are imprecise
        total += float(np.prod(propensity))
        possible += np.prod(propensity) > 0
    assert total == pytest.approx(1.0, abs=1e-9)
    assert 3 < possible < 60, "some slates are shown, and the rules forbid others"


def test_random_pools_and_rules_sum_to_one_over_all_slates_and_are_what_is_logged() -> None:
    rng = np.random.default_rng(11)
    for _ in range(25):
        candidates = Candidates(
            rng.normal(size=5),
            rng.integers(0, 4, 5),
            rng.normal(size=(5, 3)),
            rng.integers(-1, 2, 5),
            rng.random(5) < 0.5,
        )
        config = ArrangeConfig(
            author_cap=int(rng.integers(2, 4)),
            topic_decay=float(rng.uniform(0.3, 1)),
            diversity=float(rng.uniform(0, 1)),
            diversity_by=str(rng.choice(["mmr", "ssd"])),
            duplicate_cosine=None if rng.random() < 0.5 else 0.9,
            temperature=float(rng.uniform(0.05, 2)),
            epsilon=float(rng.uniform(0, 0.5)),
            top_m=int(rng.integers(0, 5)),
            fresh_slots=tuple(np.flatnonzero(rng.random(3) < 0.3).tolist()),
            uniform_slots=tuple(np.flatnonzero(rng.random(3) < 0.3).tolist()),
        )
        shown = Shown(rng.integers(0, 4, 3), rng.integers(-1, 2, 3), rng.normal(size=(3, 3)))
        slate = arrange(candidates, config, 3, rng, shown)
        again = slate_propensities(slate.order_S, candidates, config, shown)
        assert again.tolist() == slate.propensity_S.tolist()
        length = len(slate.order_S)
        whole = sum(
            float(np.prod(slate_propensities(np.array(order), candidates, config, shown)))
            for order in permutations(range(5), length)
        )
        if config.duplicate_cosine is None and config.author_cap == 3:  # else slates may end at different lengths
            assert length == 3
            assert whole == pytest.approx(1.0, abs=1e-9)
        assert (again > 0).all()


@pytest.mark.parametrize("width", [2, 3, 8])
def test_spectral_redundancy_is_one_less_the_growth_of_the_volume(width: int) -> None:
    rng = np.random.default_rng(width)
    vector = rng.normal(size=(40, width))
    vector /= np.linalg.norm(vector, axis=1, keepdims=True)
    for size in range(1, width):
        window = list(vector[:size])
        expected = [1 - volume([*window, one]) / volume(window) for one in vector[10:]]
        np.testing.assert_allclose(spectral(vector[10:], vector[:size]), expected, atol=1e-6)
    repeated = np.stack([vector[0], vector[0]])
    np.testing.assert_allclose(spectral(vector, repeated), spectral(vector, repeated[:1]), atol=1e-9)
    np.testing.assert_allclose(spectral(vector[:1], repeated), [1.0], atol=1e-7)
    assert spectral(np.zeros((1, width)), repeated).tolist() == [0.0], "a video without a vector repeats nothing"


def test_fatigue_moves_a_tired_topic_down_and_an_unknown_one_never() -> None:
    config = ArrangeConfig(explore=False, diversity=0.0, author_decay=1.0, topic_decay=0.5)
    candidates = Candidates(np.array([1.0, 0.9, 0.6]), np.zeros(3, np.int64), np.eye(3), np.array([5, -1, 6]))
    tired = Shown(np.array([1, 2]), np.array([5, -1]))
    rng = np.random.default_rng(0)
    assert arrange(candidates, config, 3, rng).order_S.tolist() == [0, 1, 2]
    # 1.0 * 0.5 = 0.5 < 0.6; the video without a topic keeps its 0.9.
    assert arrange(candidates, config, 3, rng, tired).order_S.tolist() == [1, 2, 0]


def test_near_copies_of_the_slate_and_of_the_session_are_left_out() -> None:
    vector = np.array([[1.0, 0.0], [0.999, 0.0447], [0.0, 1.0], [0.0, -1.0]])
    config = ArrangeConfig(explore=False, diversity=0.0, duplicate_cosine=0.99)
    candidates = Candidates(np.array([1.0, 0.9, 0.8, 0.7]), np.zeros(4, np.int64), vector)
    rng = np.random.default_rng(0)
    assert arrange(candidates, config, 4, rng).order_S.tolist() == [0, 2, 3]
    before = Shown(vector_ND=np.array([[0.0, 1.0]]))
    assert arrange(candidates, config, 4, rng, before).order_S.tolist() == [0, 3]


def test_fresh_slots_hold_fresh_uploads_while_there_are_any() -> None:
    config = ArrangeConfig(explore=False, diversity=0.0, fresh_slots=(1, 2, 3))
    fresh = np.array([False, False, False, True, True])
    candidates = Candidates(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.zeros(5, np.int64), np.eye(5), None, fresh)
    slate = arrange(candidates, config, 5, np.random.default_rng(0))
    assert slate.order_S.tolist() == [0, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diversity_by": "dpp"}, "expected one of"),
        ({"duplicate_cosine": 0.0}, "duplicate_cosine"),
        ({"fresh_slots": (-1,)}, "count from 0"),
        ({"topic_decay": 1.5}, "topic_decay"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrangeConfig(**fields)
