"""Popular orders by surface and by a segment of users, each drawn towards the wider one that holds it.

V video rows, E examples (impressions). A segment is the value of one user feature; a video's share of the likes of a
small segment is mostly chance, so every count gets `strength` further likes in the proportions of the wider group:
the segment's from its surface, the surface's from everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.dataset import Dataset
from features.entities import Entities
from features.schema import SIGNALS

Orders = dict[tuple[str | None, int | None], np.ndarray]
"""(surface, segment) -> eligible video rows, most popular first; None stands for all of them."""
LENGTH = 5_000
"""Videos in an order: enough for the longest page after anybody's filters."""
_STRENGTH = 300.0
"""Likes of the wider group that are added to each count; 30 to 3,000 gave recalls within .01 on validation days."""
_FEWEST = 100
"""Likes that a segment on a surface must have for an order of its own."""
_ALL = -1
"""Stands for None in the saved keys."""


def count_popular(dataset: Dataset, rows_E: np.ndarray, surfaces: Sequence[str], segment_feature: str | None) -> Orders:
    """Orders by impressions among `rows_E` that got a long view or a click; equal counts by row."""
    e = dataset.examples
    wanted = [SIGNALS.index("click"), SIGNALS.index("long_view")]
    rows_E = rows_E[(np.nan_to_num(np.asarray(e.signals[rows_E])[:, wanted]) > 0).any(axis=1)]
    video_E, surface_E = np.asarray(e.video_row[rows_E]), np.asarray(e.surface[rows_E])
    segment_E = segments(dataset.users, np.asarray(e.user_row[rows_E]), segment_feature)
    eligible_V = np.asarray(dataset.eligible)

    def count(of_E: np.ndarray, wider_V: np.ndarray) -> np.ndarray:
        added_V = _STRENGTH * wider_V / max(wider_V.sum(), 1.0)
        return np.bincount(video_E[of_E], minlength=len(eligible_V)) + added_V

    def order(count_V: np.ndarray) -> np.ndarray:
        by_count = np.argsort(-count_V, kind="stable")
        return by_count[eligible_V[by_count]][:LENGTH]

    everybody_V = count(np.ones(len(video_E), bool), np.zeros(len(eligible_V)))
    orders: Orders = {(None, None): order(everybody_V)}
    for surface, surface_row in zip(surfaces, dataset.encoder.surface_rows(list(surfaces)), strict=True):
        here_E = surface_E == surface_row
        surface_V = count(here_E, everybody_V)
        orders[surface, None] = order(surface_V)
        found, likes = np.unique(segment_E[here_E], return_counts=True)
        for segment in found[(likes >= _FEWEST) & (found != _ALL)].tolist():
            orders[surface, segment] = order(count(here_E & (segment_E == segment), surface_V))
    return orders


def segments(users: Entities, user_rows_N: np.ndarray, feature: str | None) -> np.ndarray:
    """The users' (N,) values of a categorical feature, as rows of its embedding table; -1 throughout without one.

    Raises ValueError when the users have no such feature.
    """
    if feature is None:
        return np.full(len(user_rows_N), _ALL)
    if feature not in users.columns.names:
        raise ValueError(
            f"popular_segment {feature!r} is not a user feature; there are {', '.join(users.columns.names)}"
        )
    return np.asarray(users.sparse[user_rows_N, users.columns.slice(feature).start]).astype(np.int64)


def save_orders(folder: Path, orders: Orders, surfaces: Sequence[str]) -> None:
    """Write `popular_keys.npy` (surface's place in `surfaces`, segment), `popular_start.npy` and `popular_rows.npy`."""
    places = {None: _ALL} | {surface: place for place, surface in enumerate(surfaces)}
    keys = [(places[surface], _ALL if segment is None else segment) for surface, segment in orders]
    start = np.cumsum([0, *(len(rows) for rows in orders.values())])
    rows = np.concatenate(list(orders.values()))
    for name, array in (("keys", np.array(keys, np.int64)), ("start", start), ("rows", rows)):
        np.save(folder / f"popular_{name}.npy", array.astype(np.int64), allow_pickle=False)


def load_orders(folder: Path, surfaces: Sequence[str]) -> Orders:
    """Memory-map what `save_orders` wrote for the same surfaces."""
    keys, start, rows = (
        np.asarray(np.load(folder / f"popular_{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in ("keys", "start", "rows")
    )
    names = {_ALL: None} | dict(enumerate(surfaces))
    return {
        (names[place], None if segment == _ALL else segment): rows[start[i] : start[i + 1]]
        for i, (place, segment) in enumerate(keys.tolist())
    }
