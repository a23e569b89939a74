"""Recall, frontiers and the cost read off at a recall."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.measure import Point, around, at_recall, frontier, middle, one_at_a_time, recall


def at(recall_: float, cpu_ms: float, **setting: int) -> Point:
    return Point(setting=setting, recall=recall_, p50_ms=2 * cpu_ms, p99_ms=5 * cpu_ms, cpu_ms=cpu_ms)


def test_recall_is_the_share_of_exact_answers_found_whatever_their_order():
    exact_QK = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    found_QM = np.array([[4, 9, 1, 0, -1], [8, 7, 6, 5, -1]])
    assert recall(found_QM, exact_QK) == (2 / 4 + 4 / 4) / 2


def test_padding_is_no_answer_and_queries_without_answers_do_not_count():
    exact_QK = np.array([[1, -1], [-1, -1]])
    assert recall(np.array([[-1, -1], [-1, -1]]), exact_QK) == 0 / 1
    assert recall(np.array([[1, -1], [7, -1]]), exact_QK) == 1 / 1
    assert math.isnan(recall(np.array([[3]]), np.array([[-1]])))


def test_a_point_beaten_in_both_recall_and_cost_is_not_on_the_frontier():
    slow_and_worse, cheap, good = at(0.80, 3.0), at(0.85, 1.0), at(0.95, 4.0)
    assert frontier([slow_and_worse, good, cheap]) == [cheap, good]


def test_cost_at_a_recall_lies_on_the_line_between_its_two_neighbours():
    points = [at(0.80, 1.0), at(0.88, 2.0, ef=1), at(0.96, 6.0, ef=2), at(0.99, 20.0)]
    read = at_recall(points, 0.90)
    assert read is not None
    assert read.cpu_ms == pytest.approx(2.0 + (0.90 - 0.88) / (0.96 - 0.88) * (6.0 - 2.0))
    assert read.p50_ms == pytest.approx(2 * read.cpu_ms)
    assert read.recall == pytest.approx(0.90)
    assert read.setting == {"ef": 2}


def test_a_recall_that_no_setting_reaches_has_no_cost():
    assert at_recall([at(0.80, 1.0), at(0.89, 2.0)], 0.90) is None
    assert around([], 0.90) == ()


def test_where_the_cheapest_setting_finds_more_it_stands_as_measured():
    assert at_recall([at(0.97, 1.0), at(0.99, 2.0)], 0.90) == at(0.97, 1.0)


def test_passes_at_one_setting_become_their_medians():
    read = middle([at(0.9, 1.0, ef=3), at(0.9, 9.0, ef=3), at(0.9, 2.0, ef=3)])
    assert (read.setting, read.cpu_ms, read.p50_ms) == ({"ef": 3}, 2.0, 4.0)


def test_queries_are_asked_one_at_a_time_and_short_answers_are_padded():
    query_QD = np.arange(6, dtype=np.float32).reshape(3, 2)
    shapes = []

    def search(query_1D: np.ndarray) -> np.ndarray:
        shapes.append(query_1D.shape)
        return np.array([[int(query_1D[0, 0]), 7, 8, 9][: 1 + len(shapes)]])

    found_QK, wall_ms, cpu_ms = one_at_a_time(search, query_QD, 3)
    assert shapes == [(1, 2)] * 3
    assert found_QK.tolist() == [[0, 7, -1], [2, 7, 8], [4, 7, 8]]
    assert len(wall_ms) == 3
    assert cpu_ms >= 0
