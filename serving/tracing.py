"""OpenTelemetry traces, when asked for: one span a call, one a stage, made from the answer's own account of itself.

Nothing here is imported or runs while tracing is off. A span is made after its stage has ended, from the times the
stage kept anyway; the caller's `traceparent` is continued. Attributes name no user and no video.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.messages import StageStats

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Sends spans to an OTLP/HTTP collector from a thread of its own; a collector that is away costs spans only."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: e.g. http://127.0.0.1:4318 (`/v1/traces` is added)."""
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "reelrank"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("reelrank.serving")

    def call(
        self,
        method: str,
        metadata: Sequence[tuple[str, Any]],
        seconds: float,
        code: str,
        attributes: dict[str, Any],
        stages: Sequence[StageStats],
    ) -> None:
        """A call that has just ended, and its stages."""
        end_ns = time.time_ns()
        begin_ns = end_ns - round(seconds * 1e9)
        parent = _PROPAGATOR.extract(dict(metadata))
        span = self._tracer.start_span(
            f"reelrank.v1.FeedService/{method}", parent, SpanKind.SERVER, attributes, start_time=begin_ns
        )
        inside = trace.set_span_in_context(span)
        for stage in stages:
            stage_ns = begin_ns + round(stage.begin_ms * 1e6)
            counts = {"received": stage.received, "kept": stage.kept}
            removed = {f"removed.{reason}": count for reason, count in stage.removed.items()}
            child = self._tracer.start_span(stage.name, inside, start_time=stage_ns, attributes=counts | removed)
            child.end(stage_ns + round(stage.ms * 1e6))
        span.set_attribute("rpc.grpc.status_code", code)
        if code != "OK":
            span.set_status(Status(StatusCode.ERROR, code))
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, then stop."""
        self._provider.shutdown()
