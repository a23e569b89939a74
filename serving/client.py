"""A small synchronous client: `FeedClient("127.0.0.1:50051").get_feed(user_id, k=10)` gives a `FeedResponse`.

Errors are grpc.RpcError: `.code()` says whose fault it is, `.details()` names the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

from grpc_health.v1 import health_pb2, health_pb2_grpc

from features.eligibility import Viewer
from serving import wire
from serving.messages import (
    CandidatesResponse,
    Event,
    FeedResponse,
    LogOutcome,
    RankedResponse,
    RemoveOutcome,
    UpsertOutcome,
    Video,
)
from serving.protos.reelrank.v1 import feed_pb2 as pb
from serving.protos.reelrank.v1 import feed_pb2_grpc
from serving.security import ClientSecurity

NOBODY_KNOWN = Viewer()
PLAIN = ClientSecurity()


class FeedClient:
    """One channel; safe to share between threads. Times out after `timeout_s` unless a call says otherwise."""

    def __init__(self, address: str, *, timeout_s: float = 5.0, security: ClientSecurity = PLAIN) -> None:
        self._channel = security.channel(address)
        self._stub = feed_pb2_grpc.FeedServiceStub(self._channel)
        self._timeout_s = timeout_s

    def get_feed(
        self,
        user_id: int,
        *,
        k: int = 10,
        surface: str = "",
        request_id: str = "",
        excluded_video_ids: Iterable[int] = (),
        blocked_author_ids: Iterable[int] = (),
        viewer: Viewer = NOBODY_KNOWN,
        now_ms: int = 0,
        page_token: bytes = b"",
        timeout_s: float | None = None,
    ) -> FeedResponse:
        """The next k videos; `page_token` is `next_page_token` of the page before. A `viewer` of whom nothing is said
        is taken to be the most limited one, unless the bundle's `filters.viewer` says otherwise."""
        request = pb.GetFeedRequest(
            user_id=user_id,
            k=k,
            surface=surface,
            request_id=request_id,
            excluded_video_ids=excluded_video_ids,
            blocked_author_ids=blocked_author_ids,
            viewer=wire.write_viewer(viewer),
            now_ms=now_ms,
            page_token=page_token,
        )
        return wire.read_feed_response(self._stub.GetFeed(request, timeout=timeout_s or self._timeout_s))

    def retrieve(
        self,
        user_id: int,
        *,
        k: int = 1000,
        surface: str = "",
        excluded_video_ids: Iterable[int] = (),
        blocked_author_ids: Iterable[int] = (),
        viewer: Viewer = NOBODY_KNOWN,
        now_ms: int = 0,
        timeout_s: float | None = None,
    ) -> CandidatesResponse:
        """Candidates without the ranker."""
        request = pb.RetrieveRequest(
            user_id=user_id,
            k=k,
            surface=surface,
            excluded_video_ids=excluded_video_ids,
            blocked_author_ids=blocked_author_ids,
            viewer=wire.write_viewer(viewer),
            now_ms=now_ms,
        )
        return wire.read_candidates(self._stub.Retrieve(request, timeout=timeout_s or self._timeout_s))

    def rank(
        self,
        user_id: int,
        video_ids: Sequence[int],
        *,
        surface: str = "",
        now_ms: int = 0,
        timeout_s: float | None = None,
    ) -> RankedResponse:
        """Scores of your own candidates, in your order."""
        request = pb.RankRequest(user_id=user_id, video_ids=video_ids, surface=surface, now_ms=now_ms)
        return wire.read_ranked(self._stub.Rank(request, timeout=timeout_s or self._timeout_s))

    def log_events(self, events: Iterable[Event], *, timeout_s: float | None = None) -> LogOutcome:
        """Returns once the events are durable; sending them again is safe."""
        request = pb.LogEventsRequest(events=[wire.write_event(event) for event in events])
        message = self._stub.LogEvents(request, timeout=timeout_s or self._timeout_s)
        return LogOutcome(message.stored, message.merged, message.conflicting)

    def upsert_videos(self, videos: Iterable[Video], *, timeout_s: float | None = None) -> UpsertOutcome:
        """Returns once the videos are durable and may be shown; sending them again is safe."""
        request = pb.UpsertVideosRequest(videos=[wire.write_video(video) for video in videos])
        message = self._stub.UpsertVideos(request, timeout=timeout_s or self._timeout_s)
        return UpsertOutcome(message.added, message.replaced)

    def remove_videos(self, video_ids: Iterable[int], *, timeout_s: float | None = None) -> RemoveOutcome:
        """Returns once no request that starts is shown one of them; sending them again is safe."""
        request = pb.RemoveVideosRequest(video_ids=video_ids)
        message = self._stub.RemoveVideos(request, timeout=timeout_s or self._timeout_s)
        return RemoveOutcome(message.removed, message.unknown)

    def serving(self, *, timeout_s: float | None = None) -> bool:
        """What the health service says."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        request = health_pb2.HealthCheckRequest()
        answer = stub.Check(request, timeout=timeout_s or self._timeout_s)  # pyright: ignore[reportAttributeAccessIssue]
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> FeedClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
