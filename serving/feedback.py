"""What a viewer's negative feedback takes from the values of similar videos, and gives back with time.

K candidates, N videos the viewer disliked.
"""

from __future__ import annotations

import numpy as np

from candidate_gen.timeline import HOUR_MS
from ranking.arrange import NO_TOPIC, UNKNOWN_AUTHOR
from serving.bundle import FeedBundle
from serving.hydrate import Query
from serving.session import topics


def lost_to_dislikes(bundle: FeedBundle, query: Query, rows_K: np.ndarray, value_K: np.ndarray) -> np.ndarray | None:
    """(K,) float64, at or above 0: value each candidate loses; None where the viewer disliked nothing.

    What one dislike leaves is multiplied over all of them, so that three weigh more than one and none below nothing.
    A negative value falls by as much as a positive one of its size would.
    """
    config = bundle.config.dislikes
    if len(query.disliked_rows) == 0 or not (config.author or config.topic):
        return None
    age_h_N = np.maximum(query.now_ms - query.disliked_ts_ms, 0) / HOUR_MS
    faded_N = 0.5 ** (age_h_N / config.half_life_h)
    pairs = (
        (config.author, bundle.author_id[query.disliked_rows], bundle.author_id[rows_K], UNKNOWN_AUTHOR),
        (config.topic, topics(bundle, query.disliked_rows), topics(bundle, rows_K), NO_TOPIC),
    )
    left_K = np.ones(len(rows_K))
    for strength, disliked_N, of_K, unknown in pairs:
        same_KN = (of_K[:, None] == disliked_N[None, :]) & (of_K != unknown)[:, None]
        left_K *= np.where(same_KN, 1.0 - strength * faded_N[None, :], 1.0).prod(axis=1)
    return (1.0 - left_K) * np.abs(value_K)
