"""The value model: plain arithmetic whose terms add up."""

from __future__ import annotations

import numpy as np
import pytest

from ranking.value import Scores, ValueConfig, terms, values

SCORES = Scores(
    ("click", "hate"), np.array([[0.5, 0.0], [0.2, 0.1]], np.float32), np.array([30_000.0, 0.0], np.float32)
)
CONFIG = ValueConfig(
    weights=(("click", 2.0), ("hate", -10.0), ("like", 99.0)),
    watch_per_s=0.1,
    watch_saturation_s=60.0,
    unconnected_factor=0.8,
)


def test_values_are_weighted_sums_and_an_untaught_signal_adds_nothing() -> None:
    watch = 0.1 * 60.0 * (1 - np.exp(-30.0 / 60.0))
    expected = [2.0 * 0.5 + watch, 2.0 * 0.2 - 10.0 * 0.1]
    np.testing.assert_allclose(values(SCORES, np.array([True, True]), CONFIG), expected, rtol=1e-6)


def test_the_unconnected_factor_lowers_values_of_either_sign() -> None:
    connected = values(SCORES, np.array([True, True]), CONFIG)
    unconnected = values(SCORES, np.array([False, False]), CONFIG)
    np.testing.assert_allclose(unconnected, [connected[0] * 0.8, connected[1] / 0.8])
    assert (unconnected < connected).all()


def test_terms_add_up_to_the_value() -> None:
    connected = np.array([True, False])
    np.testing.assert_allclose(sum(terms(SCORES, connected, CONFIG).values()), values(SCORES, connected, CONFIG))


def test_a_misspelt_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="clicks"):
        ValueConfig(weights=(("clicks", 1.0),))
