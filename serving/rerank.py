"""From rows to values to slates, apart from where the rows came from: pages and replay rank and arrange by the same.

A page ranks its own pool (`serving.feed`). Replay ranks anew what a logged request chose from, as a bundle would have
at that instant, and asks for the probability of what was shown. K candidates, N videos, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from candidate_gen.timeline import HOUR_MS
from ranking.arrange import Candidates, Shown, Slate, arrange, choices_along
from ranking.value import Scores, values
from serving.bundle import FeedBundle
from serving.feedback import lost_to_dislikes
from serving.hydrate import Query, hydrate, model_inputs
from serving.records import Shortlist, UserState
from serving.session import Session, topics


def score(
    bundle: FeedBundle, query: Query, rows_N: np.ndarray, connected_N: np.ndarray | None = None
) -> tuple[Scores, np.ndarray]:
    """What the ranker says of videos, and their values (N,); raises ArithmeticError where one is not finite."""
    if connected_N is None:
        connected_N = np.isin(bundle.author_id[rows_N], query.followed_authors)
    scores = bundle.ranker.score(model_inputs(bundle, query, rows_N))
    value_N = values(scores, connected_N, bundle.config.value)
    if not (np.isfinite(value_N).all() and np.isfinite(scores.probability_NT).all()):
        raise ArithmeticError("the ranker gave scores that are not finite")
    return scores, value_N


def arrangeable(bundle: FeedBundle, rows_K: np.ndarray, value_K: np.ndarray, now_ms: int) -> Candidates:
    """What the rules of arrangement look at."""
    upload_ts_ms_K = bundle.upload_ts_ms[rows_K]
    return Candidates(
        value_K=value_K,
        author_K=bundle.author_id[rows_K],
        vector_KD=bundle.vectors[rows_K],
        topic_K=topics(bundle, rows_K),
        fresh_K=(upload_ts_ms_K >= 0) & (upload_ts_ms_K > now_ms - bundle.config.arrange.fresh_h * HOUR_MS),
    )


def slate_chance(request_id: str, salt: int | None = None) -> np.random.Generator:
    """The random numbers that fill a request's slots; with a salt, others."""
    seed = xxhash.xxh64_intdigest(request_id.encode())
    return np.random.default_rng(seed if salt is None else [seed, salt])


@dataclass(frozen=True, slots=True)
class Reranked:
    """A logged request as a bundle would have ranked it; what is large is made anew when it is asked for."""

    bundle: FeedBundle
    rows_K: np.ndarray
    value_K: np.ndarray
    """float64, after what the viewer disliked."""
    scores: Scores
    now_ms: int
    shown: Shown | None

    def draw(self, k: int, rng: np.random.Generator) -> Slate:
        """A slate of up to k, by the bundle's own rules and exploration."""
        return arrange(self._candidates(), self.bundle.config.arrange, k, rng, self.shown)

    def along(self, order_S: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Slot by slot of a given slate: the candidates considered there, best first, and the probability of each."""
        return choices_along(order_S, self._candidates(), self.bundle.config.arrange, self.shown)

    def _candidates(self) -> Candidates:
        return arrangeable(self.bundle, self.rows_K, self.value_K, self.now_ms)


def rerank(bundle: FeedBundle, user: UserState, logged: Shortlist) -> Reranked:
    """Rank what a request chose from at its instant; `user`: the live events that were known then.

    Any surface is taken, also one this feed does not serve: logs are older than configurations. A video that the bundle
    does not know is scored as one without features.
    """
    query = hydrate(bundle, user, user_id=logged.user_id, now_ms=logged.ts_ms, surface=logged.surface)
    rows_K = bundle.videos.rows_of(logged.video_id_K)
    scores, value_K = score(bundle, query, rows_K)
    lost_K = lost_to_dislikes(bundle, query, rows_K, value_K)
    value_K = value_K if lost_K is None else value_K - lost_K
    return Reranked(bundle, rows_K, value_K, scores, logged.ts_ms, Session(logged.session_id_N).shown(bundle))
