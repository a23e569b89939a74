"""The six calls over gRPC: admit, compute on a worker thread, answer, account for it.

The event loop parses, admits and answers; threads compute. A page whose worker does not come back in time (it hangs in
a dependency, or queued too long) is answered from the popular list by another thread, and the late answer is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import faiss
import grpc
import torch

from serving import wire
from serving.admission import Admission, OverloadError
from serving.feed import Feed
from serving.limits import MAX_EVENTS, InvalidRequestError, check_count, check_events
from serving.messages import CandidatesResponse, FeedRequest, FeedResponse, RankedResponse
from serving.metrics import Metrics
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc
from serving.server_config import ServerConfig
from serving.store import EventStore, StoreBusyError, StoreUnavailableError
from serving.swap import LiveFeed
from serving.trace import AnsweredElsewhereError, Deadline, DeadlineExpiredError

_log = logging.getLogger(__name__)
NO_CLIENT_DEADLINE_S = 1e9
"""Without a client's deadline, gRPC gives some 9e15 s."""
PATIENCE = 0.8
"""Share of a page's time that its worker gets; the rest is for the popular list."""
Answer = FeedResponse | CandidatesResponse | RankedResponse


class Tracer(Protocol):
    """`serving.tracing.Tracing`, which is imported only where tracing is on."""

    def call(self, method: str, metadata: Any, seconds: float, code: str, attributes: dict, stages: Any) -> None: ...

    def close(self) -> None: ...


class FeedServicer(feed_pb2_grpc.FeedServiceServicer):
    """Every error that is the caller's names the field; every other one says whether to send the same call again."""

    def __init__(
        self, live: LiveFeed, store: EventStore, config: ServerConfig, metrics: Metrics, tracer: Tracer | None
    ) -> None:
        self._live, self._store, self._config = live, store, config
        self._metrics, self._tracer = metrics, tracer
        self.admission = Admission(config.threads, config.max_in_flight)
        self._workers = ThreadPoolExecutor(config.threads, "feed", initializer=_one_core_each)
        self._rescuer = ThreadPoolExecutor(1, "rescue", initializer=_one_core_each)
        self._uploader = ThreadPoolExecutor(1, "uploads", initializer=_one_core_each)
        self.changes_waiting = 0

    async def GetFeed(self, request: pb.GetFeedRequest, context: Any) -> pb.GetFeedResponse:
        async def work(call: _Call) -> pb.GetFeedResponse:
            asked = wire.read_feed_request(request)
            call.answer, message = await self._page(asked, self._deadline(context))
            return message

        return await self._answer("GetFeed", work, context)

    async def Retrieve(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveResponse:
        def compute(feed: Feed, deadline: Deadline) -> tuple[CandidatesResponse, pb.RetrieveResponse]:
            answer = feed.retrieve(wire.read_retrieve_request(request), deadline)
            return answer, wire.write_candidates(answer)

        return await self._computed("Retrieve", compute, context)

    async def Rank(self, request: pb.RankRequest, context: Any) -> pb.RankResponse:
        def compute(feed: Feed, deadline: Deadline) -> tuple[RankedResponse, pb.RankResponse]:
            answer = feed.rank(request.user_id, request.video_ids, request.surface, request.now_ms, deadline)
            return answer, wire.write_ranked(answer)

        return await self._computed("Rank", compute, context)

    async def LogEvents(self, request: pb.LogEventsRequest, context: Any) -> pb.LogEventsResponse:
        async def work(call: _Call) -> pb.LogEventsResponse:
            check_count("events", len(request.events), 1, MAX_EVENTS)
            clock_ms = self._live.feed.now_ms()
            events = [wire.read_event(message, clock_ms) for message in request.events]
            check_events(events, clock_ms)
            stored = self._store.log_events(self._live.feed.complete(events))
            return wire.write_outcome(await asyncio.wrap_future(stored))

        return await self._answer("LogEvents", work, context)

    async def UpsertVideos(self, request: pb.UpsertVideosRequest, context: Any) -> pb.UpsertVideosResponse:
        def change() -> pb.UpsertVideosResponse:
            outcome = self._live.upsert([wire.read_video(message) for message in request.videos])
            return pb.UpsertVideosResponse(added=outcome.added, replaced=outcome.replaced)

        return await self._answer("UpsertVideos", partial(self._change, change), context)

    async def RemoveVideos(self, request: pb.RemoveVideosRequest, context: Any) -> pb.RemoveVideosResponse:
        def change() -> pb.RemoveVideosResponse:
            outcome = self._live.remove(request.video_ids)
            return pb.RemoveVideosResponse(removed=outcome.removed, unknown=outcome.unknown)

        return await self._answer("RemoveVideos", partial(self._change, change), context)

    def close(self) -> None:
        """Let running computations end; those that hang are left behind."""
        self._uploader.shutdown()
        self._rescuer.shutdown()
        self._workers.shutdown(wait=not self.admission.stalled, cancel_futures=True)

    async def _answer(self, method: str, work: Callable[[_Call], Any], context: Any) -> Any:
        """Run a call; the one place where errors become statuses and every call is accounted for."""
        call = _Call(method)
        try:
            message = await work(call)
        except asyncio.CancelledError:
            self._account(call, "CANCELLED", context)
            raise
        except Exception as error:
            code, details, cause = _status(error)
            self._metrics.refused(cause)
            self._account(call, code.name, context)
            await context.abort(code, details)
        else:
            self._account(call, "OK", context)
            return message

    def _account(self, call: _Call, code: str, context: Any) -> None:
        """A mistake in here is logged, and no caller's."""
        try:
            self._observe(call, code, context)
        except Exception:
            _log.exception("a call was answered and not accounted for")

    def _observe(self, call: _Call, code: str, context: Any) -> None:
        seconds, answer = time.monotonic() - call.began_s, call.answer
        self._metrics.ended(call.method, code, seconds)
        attributes: dict[str, Any] = {}
        if answer is not None:
            self._metrics.answered(call.method, answer.level, answer.degraded_reason, answer.stages)
        if self._tracer is not None:
            if answer is not None:
                attributes = {"level": answer.level.name, "bundle_version": answer.bundle_version}
                attributes["degraded_reason"] = answer.degraded_reason
            stages = () if answer is None else answer.stages
            self._tracer.call(call.method, context.invocation_metadata(), seconds, code, attributes, stages)

    def _deadline(self, context: Any) -> Deadline:
        """Counts from the call's arrival, queueing included."""
        remaining_s = context.time_remaining()
        if remaining_s is None or remaining_s > NO_CLIENT_DEADLINE_S:
            remaining_s = self._config.default_deadline_ms / 1000.0
        return Deadline.after(min(remaining_s, self._config.longest_deadline_ms / 1000.0))

    async def _computed(self, method: str, compute: Callable[[Feed, Deadline], Any], context: Any) -> Any:
        async def work(call: _Call) -> Any:
            deadline = self._deadline(context)
            call.answer, message = await self._begin(compute, deadline)
            return message

        return await self._answer(method, work, context)

    def _begin(self, compute: Callable[[Feed, Deadline], Any], deadline: Deadline) -> asyncio.Future[Any]:
        """On a worker thread, with one feed from beginning to end; counted until nothing is computed any more."""
        self.admission.enter(deadline)
        loop = asyncio.get_running_loop()

        def ended(computed: Future[Any]) -> None:
            idle = computed.cancelled() or isinstance(computed.exception(), (DeadlineExpiredError, InvalidRequestError))
            with suppress(RuntimeError):  # the loop has ended: nobody counts any more
                loop.call_soon_threadsafe(self.admission.leave, not idle)

        computed = self._workers.submit(compute, self._live.feed, deadline)
        computed.add_done_callback(ended)
        answer = asyncio.wrap_future(computed)
        answer.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody may be left to ask
        return answer

    async def _page(self, asked: FeedRequest, deadline: Deadline) -> tuple[FeedResponse, pb.GetFeedResponse]:
        if self.admission.stalled:
            return await self._rescue(asked, deadline, "the workers hang")
        computed = self._begin(partial(_full_page, asked), deadline)
        try:
            done, _ = await asyncio.wait({computed}, timeout=PATIENCE * deadline.remaining_ms / 1000.0)
            if done:
                return computed.result()
            try:
                rescued = await self._rescue(asked, deadline, "the full answer took too long")
            except AnsweredElsewhereError:
                return await computed
        except asyncio.CancelledError:
            computed.cancel()
            raise
        computed.cancel()
        return rescued

    async def _rescue(
        self, asked: FeedRequest, deadline: Deadline, reason: str
    ) -> tuple[FeedResponse, pb.GetFeedResponse]:
        rescue = partial(_popular_page, asked, reason)
        return await asyncio.get_running_loop().run_in_executor(self._rescuer, rescue, self._live.feed, deadline)

    async def _change(self, work: Callable[[], Any], call: _Call) -> Any:
        """Uploads and removals one after another, on a thread of their own: no page waits behind a thousand uploads."""
        with self._waiting():
            return await asyncio.get_running_loop().run_in_executor(self._uploader, work)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.changes_waiting += 1
        try:
            if self.changes_waiting > self._config.max_changes_waiting:
                most = self._config.max_changes_waiting
                raise StoreBusyError(f"{most} uploads and removals are waiting: send the same again later")
            yield
        finally:
            self.changes_waiting -= 1


class _Call:
    """One call and, where it was computed, its answer."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.began_s = time.monotonic()
        self.answer: Answer | None = None


def _full_page(asked: FeedRequest, feed: Feed, deadline: Deadline) -> tuple[FeedResponse, pb.GetFeedResponse]:
    answer = feed.get_feed(asked, deadline)
    return answer, wire.write_feed_response(answer)


def _popular_page(
    asked: FeedRequest, reason: str, feed: Feed, deadline: Deadline
) -> tuple[FeedResponse, pb.GetFeedResponse]:
    answer = feed.rescue(asked, deadline, reason)
    return answer, wire.write_feed_response(answer)


def _status(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """Status, details and the cause that the metrics count."""
    codes = grpc.StatusCode
    if isinstance(error, InvalidRequestError):
        return codes.INVALID_ARGUMENT, str(error), "invalid"
    if isinstance(error, DeadlineExpiredError):
        return codes.DEADLINE_EXCEEDED, str(error), "deadline"
    if isinstance(error, (OverloadError, StoreBusyError)):
        return codes.RESOURCE_EXHAUSTED, f"overload: {error}", "overload"
    if isinstance(error, (sqlite3.Error, StoreUnavailableError)):
        return codes.UNAVAILABLE, "the store cannot be written; nothing was acknowledged", "store"
    _log.error("a request failed", exc_info=error)
    return codes.INTERNAL, f"{type(error).__name__}; the server's log has the details", "internal"


def _one_core_each() -> None:
    """Thread counts are a thread's own in OpenMP: each worker says it for itself."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
