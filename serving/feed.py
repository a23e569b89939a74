"""The main path: one request through the funnel. Knows nothing of gRPC or Ray; server, golden check and replay call it.

K candidates of a pool, S slots of a slate, T tasks. Stages go down a ladder instead of failing: without the store
the bundle's own histories count, without time (or a working ranker) candidates stand in retrieval order, without
retrieval the popular list answers, and without that the bundle's static list.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from candidate_gen.blend import Pool
from ranking.arrange import Slate
from ranking.arrange import arrange as fill_slots
from ranking.value import Scores, terms
from serving.bundle import FeedBundle
from serving.feedback import lost_to_dislikes
from serving.filters import Rules
from serving.hydrate import Query, hydrate
from serving.limits import MAX_K, MAX_POOL, check_candidates, check_page
from serving.messages import (
    CandidatesResponse,
    Event,
    FeedRequest,
    FeedResponse,
    Level,
    RankedResponse,
    ServedItem,
)
from serving.records import ServedRow, Shortlist, UserState
from serving.rerank import arrangeable, score, slate_chance
from serving.retrieve import popular_pool, retrieve_pool, static_pool
from serving.session import Session
from serving.store import Store, StoreUnavailableError
from serving.trace import Deadline, StageCosts, Trace

_log = logging.getLogger(__name__)
NO_DEADLINE = Deadline()


@dataclass(frozen=True, slots=True)
class Scored:
    """A pool with one value a candidate (higher is better) and, where the ranker ran, what the value is made of."""

    pool: Pool
    scores: Scores | None
    value_K: np.ndarray
    term_K: dict[str, np.ndarray]


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Feed:
    """One bundle and a store of live events; safe to call from many threads."""

    def __init__(self, bundle: FeedBundle, store: Store, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        self.bundle = bundle
        self.store = store
        self._clock_ms = clock_ms
        self._costs = StageCosts()
        self._policy = bundle.config.policy_id

    def get_feed(self, request: FeedRequest, deadline: Deadline = NO_DEADLINE) -> FeedResponse:
        """The next k videos, with the reason for each and for every one that is missing."""
        check_page(request, self.bundle.config.surfaces)
        request, session = _begun(request)
        trace = Trace(deadline, self._costs)
        query = self._hydrate(request.user_id, request.now_ms, request.surface, trace)
        pool = self._retrieve(query, request, self.bundle.config.blend.k, trace)
        scored = self._less_disliked(query, self._rank(query, pool, trace))
        slate = self._arrange(query, scored, request, session, trace)
        return self._respond(query, scored, slate, request, session, trace)

    def rescue(self, request: FeedRequest, deadline: Deadline, reason: str) -> FeedResponse:
        """The popular page, computed beside a full one that does not come: store, models and index are left alone."""
        check_page(request, self.bundle.config.surfaces)
        request, session = _begun(request)
        trace = Trace(deadline, StageCosts())
        trace.degrade(Level.POPULAR, reason)
        query = self._hydrate(request.user_id, request.now_ms, request.surface, trace)
        pool = self._retrieve(query, request, request.k + MAX_K, trace)
        scored = self._less_disliked(query, _in_pool_order(pool))
        slate = self._arrange(query, scored, request, session, trace)
        return self._respond(query, scored, slate, request, session, trace)

    def retrieve(self, request: FeedRequest, deadline: Deadline = NO_DEADLINE) -> CandidatesResponse:
        """The first `request.k` candidates (up to MAX_POOL), without the ranker."""
        check_page(request, self.bundle.config.surfaces, max_k=MAX_POOL)
        trace = Trace(deadline, self._costs)
        query = self._hydrate(request.user_id, request.now_ms, request.surface, trace)
        pool = self._retrieve(query, request, request.k, trace)
        return CandidatesResponse(
            bundle_version=self.bundle.version,
            cold=query.cold,
            level=trace.level,
            degraded_reason=trace.degraded_reason,
            sources=pool.sources,
            video_id_K=self.bundle.videos.ids_of(pool.rows_K),
            score_K=pool.score_K,
            source_K=pool.source_K,
            connected_K=pool.connected_K,
            reasons=tuple(pool.reason(item) for item in range(len(pool))),
            stages=tuple(trace.stages),
        )

    def rank(
        self,
        user_id: int,
        video_ids: Sequence[int],
        surface: str = "",
        now_ms: int = 0,
        deadline: Deadline = NO_DEADLINE,
    ) -> RankedResponse:
        """Scores of the caller's own candidates, in their order; a video the bundle does not know is scored as one
        without features, and named."""
        check_candidates(len(video_ids), surface, now_ms, self.bundle.config.surfaces)
        trace = Trace(deadline, self._costs)
        query = self._hydrate(user_id, now_ms, surface, trace)
        with trace.stage("rank") as stage:
            rows_N = self.bundle.videos.rows_of(np.asarray(video_ids, dtype=np.int64))
            scores, value_N = score(self.bundle, query, rows_N)
            stage.received = stage.kept = len(rows_N)
        return RankedResponse(
            bundle_version=self.bundle.version,
            cold=query.cold,
            tasks=scores.tasks,
            probability_NT=scores.probability_NT,
            watch_ms_N=scores.watch_ms_N,
            value_N=value_N,
            unknown=np.flatnonzero(rows_N == 0),
            stages=tuple(trace.stages),
            level=trace.level,
            degraded_reason=trace.degraded_reason,
        )

    def complete(self, events: Sequence[Event]) -> list[Event]:
        """Fill in what the bundle knows of the videos: author, and duration where the client sent none."""
        rows = self.bundle.videos.rows_of(np.array([event.video_id for event in events], np.int64))
        authors, durations = self.bundle.author_id[rows].tolist(), self.bundle.duration_ms[rows].tolist()
        return [
            replace(event, author_id=author or None, duration_ms=event.duration_ms or duration or None)
            for event, author, duration in zip(events, authors, durations, strict=True)
        ]

    def now_ms(self) -> int:
        """The feed's clock."""
        return self._clock_ms()

    def _hydrate(self, user_id: int, now_ms: int, surface: str, trace: Trace) -> Query:
        with trace.stage("hydrate") as stage:
            query = hydrate(
                self.bundle,
                self._user(user_id, trace),
                user_id=user_id,
                now_ms=now_ms or self._clock_ms(),
                surface=surface or self.bundle.config.surfaces[0],
            )
            stage.received = stage.kept = int(query.history.length_B[0])
        return query

    def _user(self, user_id: int, trace: Trace) -> UserState:
        """Live events, or what is at hand of them: a store that hangs costs no more than it promised to."""
        if trace.level >= Level.POPULAR or self.store.patience_ms > trace.deadline.remaining_ms:
            return self.store.at_hand(user_id)
        try:
            return self.store.user(user_id)
        except StoreUnavailableError as error:
            _log.warning("a page without live events: %s", error)
            trace.degrade(Level.FEATURES_MISSING, "the store does not answer")
            return self.store.at_hand(user_id)

    def _retrieve(self, query: Query, request: FeedRequest, k: int, trace: Trace) -> Pool:
        rules = Rules.of(
            self.bundle,
            query,
            np.asarray(request.excluded_video_ids, dtype=np.int64),
            np.asarray(request.blocked_author_ids, dtype=np.int64),
            request.viewer,
        )
        try:
            return self._searched(query, rules, k, trace)
        except Exception as error:
            _log.exception("not even the popular list answers; the bundle's static list does")
            trace.degrade(Level.STATIC, f"the popular list failed: {type(error).__name__}")
        with trace.stage("static") as stage:
            return static_pool(self.bundle, query, rules, k, stage)

    def _searched(self, query: Query, rules: Rules, k: int, trace: Trace) -> Pool:
        with trace.stage("filter") as stage:
            allowed, stage.removed = rules.allowed()
            stage.received = len(self.bundle.videos)
            stage.kept = stage.received - sum(stage.removed.values())
        if trace.level < Level.POPULAR and not trace.affords("retrieve", "arrange", "respond"):
            trace.degrade(Level.POPULAR, "no time left to retrieve")
        if trace.level < Level.POPULAR:
            try:
                with trace.stage("retrieve") as stage:
                    return retrieve_pool(self.bundle, query, rules, allowed, k, stage)
            except Exception as error:
                _log.exception("retrieval failed; the popular list answers")
                trace.degrade(Level.POPULAR, f"retrieval failed: {type(error).__name__}")
        with trace.stage("popular") as stage:
            return popular_pool(self.bundle, query, rules, allowed, k, stage)

    def _rank(self, query: Query, pool: Pool, trace: Trace) -> Scored:
        if trace.level >= Level.POPULAR or len(pool.rows_K) == 0:
            return _in_pool_order(pool)
        if not trace.affords("rank", "arrange", "respond"):
            trace.degrade(Level.RETRIEVAL_ORDER, "no time left to rank")
            return _in_pool_order(pool)
        try:
            with trace.stage("rank") as stage:
                stage.received = stage.kept = len(pool.rows_K)
                scores, value_K = score(self.bundle, query, pool.rows_K, pool.connected_K)
                return Scored(pool, scores, value_K, terms(scores, pool.connected_K, self.bundle.config.value))
        except Exception as error:
            _log.exception("the ranker failed; candidates stay in retrieval order")
            trace.degrade(Level.RETRIEVAL_ORDER, f"the ranker failed: {type(error).__name__}")
            return _in_pool_order(pool)

    def _less_disliked(self, query: Query, scored: Scored) -> Scored:
        """Values after the viewer's negative feedback; the loss is a term like the others."""
        lost_K = lost_to_dislikes(self.bundle, query, scored.pool.rows_K, scored.value_K)
        if lost_K is None:
            return scored
        term_K = scored.term_K | {"disliked": -lost_K} if scored.term_K else {}
        return replace(scored, value_K=scored.value_K - lost_K, term_K=term_K)

    def _arrange(self, query: Query, scored: Scored, request: FeedRequest, session: Session, trace: Trace) -> Slate:
        config = self.bundle.config.arrange
        with trace.stage("arrange") as stage:
            slate = fill_slots(
                arrangeable(self.bundle, scored.pool.rows_K, scored.value_K, query.now_ms),
                config if request.explore else replace(config, explore=False),
                request.k,
                slate_chance(request.request_id),
                session.shown(self.bundle),
            )
            stage.received, stage.kept = len(scored.value_K), len(slate.order_S)
            stage.removed = {"not_chosen": stage.received - stage.kept} if stage.received > stage.kept else {}
        return slate

    def _respond(
        self, query: Query, scored: Scored, slate: Slate, request: FeedRequest, session: Session, trace: Trace
    ) -> FeedResponse:
        with trace.stage("respond") as stage:
            items = self._items(scored, slate)
            policy_id = self._policy_id(request, trace.level)
            trace.deadline.claim()
            if items:
                rows = [self._served_row(item, query, request, policy_id) for item in items]
                explored = request.explore and self.bundle.config.arrange.explore
                self.store.log_served(
                    rows, self._shortlist(query, scored, slate, request, session) if explored else None
                )
            stage.received = stage.kept = len(items)
        shortfall = ""
        if len(items) < request.k:
            pool_size = len(scored.pool.rows_K)
            cap = self.bundle.config.arrange.author_cap
            shortfall = f"{pool_size} candidates passed the filters" + (
                f"; at most {cap} of one author and no near copies fit in a slate" if pool_size > len(items) else ""
            )
        return FeedResponse(
            request_id=request.request_id,
            bundle_version=self.bundle.version,
            policy_id=policy_id,
            cold=query.cold,
            level=trace.level,
            degraded_reason=trace.degraded_reason,
            shortfall_reason=shortfall,
            tasks=scored.scores.tasks if scored.scores is not None else (),
            items=items,
            stages=tuple(trace.stages),
            next_page_token=session.token([item.video_id for item in items]),
        )

    def _items(self, scored: Scored, slate: Slate) -> tuple[ServedItem, ...]:
        rows_S, bundle = scored.pool.rows_K[slate.order_S], self.bundle
        described = (bundle.videos.ids_of(rows_S), bundle.author_id[rows_S], bundle.duration_ms[rows_S])
        return tuple(
            _item(scored, slot, int(at), slate, *what)
            for slot, (at, *what) in enumerate(zip(slate.order_S, *(a.tolist() for a in described), strict=True))
        )

    def _served_row(self, item: ServedItem, query: Query, request: FeedRequest, policy_id: str) -> ServedRow:
        return ServedRow(
            request_id=request.request_id,
            slot=item.slot,
            user_id=query.user_id,
            video_id=item.video_id,
            ts_ms=query.now_ms,
            surface=query.surface,
            source=item.sources[0],
            connected=item.connected,
            policy_id=policy_id,
            propensity=item.propensity,
            bundle_version=self.bundle.version,
        )

    def _shortlist(
        self, query: Query, scored: Scored, slate: Slate, request: FeedRequest, session: Session
    ) -> Shortlist:
        return Shortlist(
            request_id=request.request_id,
            user_id=query.user_id,
            ts_ms=query.now_ms,
            surface=query.surface,
            video_id_K=self.bundle.videos.ids_of(scored.pool.rows_K[slate.considered]),
            session_id_N=session.remembered,
        )

    def _policy_id(self, request: FeedRequest, level: Level) -> str:
        """Slates drawn in another way carry another id, or their propensities would be pooled with these."""
        greedy = "" if request.explore else "/greedy"
        lower = "" if level == Level.FULL else f"/{level.name.lower()}"
        return self._policy + greedy + lower


def _begun(request: FeedRequest) -> tuple[FeedRequest, Session]:
    """With an id, and with what its session has shown among what it excludes."""
    session = Session.read(request.page_token)
    if len(session.video_id_N):
        excluded = np.concatenate([session.video_id_N, np.asarray(request.excluded_video_ids, np.int64)])
        request = replace(request, excluded_video_ids=excluded)
    return replace(request, request_id=request.request_id or uuid.uuid4().hex), session


def _item(
    scored: Scored, slot: int, at: int, slate: Slate, video_id: int, author_id: int, duration_ms: int
) -> ServedItem:
    pool, scores = scored.pool, scored.scores
    return ServedItem(
        video_id=video_id,
        author_id=author_id,
        slot=slot,
        sources=_sources(pool, at),
        reason=pool.reason(at),
        connected=bool(pool.connected_K[at]),
        retrieval_score=float(pool.score_K[at]),
        scores=() if scores is None else tuple(scores.probability_NT[at].tolist()),
        predicted_watch_ms=0.0 if scores is None else float(scores.watch_ms_N[at]),
        value=float(scored.value_K[at]),
        value_terms={name: float(term_K[at]) for name, term_K in scored.term_K.items()},
        propensity=float(slate.propensity_S[slot]),
        duration_ms=duration_ms,
    )


def _sources(pool: Pool, item: int) -> tuple[str, ...]:
    """Everyone who found it, the source it counts for first."""
    own = int(pool.source_K[item])
    others = (s for s in np.flatnonzero(pool.found_by_KS[item]) if s != own)
    return tuple(pool.sources[s] for s in (own, *others))


def _in_pool_order(pool: Pool) -> Scored:
    """Values from 1 down to 0 in the order of the pool: scores of different sources do not compare."""
    return Scored(pool, None, np.linspace(1.0, 0.0, len(pool.rows_K)), {})
