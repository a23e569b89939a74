"""Candidates for one query: every source, searched inside the allowed rows, blended, and checked once more.

K candidates. The sources promise to stay inside `allowed`; what they return is checked against the
rules themselves, so that a source that breaks its promise loses candidates and never shows a filtered video.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from candidate_gen.allowed import Allowed
from candidate_gen.blend import Pool, blend
from candidate_gen.popular import segments
from candidate_gen.sources import AnnSource, PopularSource, Retrieved, SourceQuery
from serving.bundle import FeedBundle
from serving.filters import Rules
from serving.hydrate import Query, model_inputs
from serving.trace import Counts

_log = logging.getLogger(__name__)


def retrieve_pool(bundle: FeedBundle, query: Query, rules: Rules, allowed: Allowed, k: int, stage: Counts) -> Pool:
    """At most k candidates, best first; `stage` counts from the allowed rows down to the pool."""
    vector_BD = bundle.towers.user_vectors(model_inputs(bundle, query, np.zeros(0, np.int64)))
    asked = _source_query(bundle, query, allowed, vector_BD[0])
    retrieved = {source.name: source.retrieve(asked, k) for source in bundle.sources}
    return _checked(bundle, query, rules, retrieved, k, stage, allowed.count)


def popular_pool(bundle: FeedBundle, query: Query, rules: Rules, allowed: Allowed, k: int, stage: Counts) -> Pool:
    """The popular source alone: no model is asked."""
    asked = _source_query(bundle, query, allowed, np.zeros(bundle.index.dim, np.float32))
    retrieved = {s.name: s.retrieve(asked, k) for s in bundle.sources if s.name == PopularSource.name}
    return _checked(bundle, query, rules, retrieved, k, stage, allowed.count)


def static_pool(bundle: FeedBundle, query: Query, rules: Rules, k: int, stage: Counts) -> Pool:
    """What is left of the bundle's static list: arrays in memory, each video held against the rules."""
    rows_K = bundle.static_rows
    good_K = np.ones(len(rows_K), bool)
    for reason, broken_K in rules.broken(rows_K, np.zeros(len(rows_K), bool)).items():
        stage.removed[reason] = int((good_K & broken_K).sum())
        good_K &= ~broken_K
    stage.removed = {reason: count for reason, count in stage.removed.items() if count}
    good = rows_K[good_K]
    rows = good[:k]
    stage.received, stage.kept = len(rows_K), len(rows)
    if len(rows) < len(good):
        stage.removed["not_retrieved"] = len(good) - len(rows)
    return Pool(
        rows_K=rows,
        source_K=np.zeros(len(rows), np.int64),
        sources=("static",),
        score_K=np.linspace(1.0, 0.0, len(rows), dtype=np.float32),
        found_by_KS=np.ones((len(rows), 1), bool),
        connected_K=np.isin(bundle.author_id[rows], query.followed_authors),
    )


def _source_query(bundle: FeedBundle, query: Query, allowed: Allowed, vector_D: np.ndarray) -> SourceQuery:
    return SourceQuery(
        user_vector_D=vector_D,
        history=query.history,
        followed_authors=query.followed_authors,
        allowed=allowed,
        now_ms=query.now_ms,
        surface=query.surface,
        segment=int(segments(bundle.users, np.array([query.user_row]), bundle.config.popular_segment)[0]),
    )


def _checked(
    bundle: FeedBundle,
    query: Query,
    rules: Rules,
    retrieved: dict[str, Retrieved],
    k: int,
    stage: Counts,
    n_allowed: int,
) -> Pool:
    """Blend, then drop what breaks a rule: with honest sources, nothing."""
    config = replace(bundle.config.blend, k=k)
    pool = blend(retrieved, author_id=bundle.author_id, followed_authors=query.followed_authors, config=config)
    good_K = np.ones(len(pool), bool)
    from_ann_K = np.array(pool.sources)[pool.source_K] == AnnSource.name
    for reason, broken_K in rules.broken(pool.rows_K, from_ann_K).items():
        if broken_K.any():
            stage.removed[reason] = int((good_K & broken_K).sum())
            good_K &= ~broken_K
    if not good_K.all():
        if bundle.changes == rules.changes:  # else uploads and removals came in between
            _log.error("a source returned videos it was told not to: %s", stage.removed)
        pool = _take(pool, good_K)
    stage.received, stage.kept = n_allowed, len(pool)
    stage.removed["not_retrieved"] = stage.received - stage.kept - sum(stage.removed.values())
    return pool


def _take(pool: Pool, good_K: np.ndarray) -> Pool:
    return replace(
        pool,
        rows_K=pool.rows_K[good_K],
        source_K=pool.source_K[good_K],
        score_K=pool.score_K[good_K],
        found_by_KS=pool.found_by_KS[good_K],
        connected_K=pool.connected_K[good_K],
    )
