"""Prometheus metrics of a server: what calls did is counted as they end, what is true now is read at the scrape.

Label sets are bounded: methods, codes, stages, levels and reasons are names from the code, never from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.messages import Level, StageStats

_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
Reading = tuple[str, str, Callable[[], float]]
"""Name, what it says, and how to read it; a name that ends with _total is of a counter."""


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        own = {"namespace": "reelrank", "registry": self.registry}
        self._calls = Counter("requests", "Calls that ended, by their status.", ("method", "code"), **own)
        self._call_s = Histogram("request_seconds", "Arrival to answer.", ("method",), buckets=_CALL_S, **own)
        self._refusals = Counter("refusals", "Calls that were not begun or not done.", ("cause",), **own)
        self._answers = Counter("answers", "Answers by level of the ladder.", ("method", "level"), **own)
        self._degraded = Counter("degraded", "Why answers were below the full level.", ("reason",), **own)
        self._stage_s = Histogram("stage_seconds", "One stage of one request.", ("stage",), buckets=_STAGE_S, **own)
        self._received = Counter("stage_received", "Candidates that entered a stage.", ("stage",), **own)
        self._kept = Counter("stage_kept", "Candidates that left a stage.", ("stage",), **own)
        self._removed = Counter("stage_removed", "Candidates that a stage removed.", ("stage", "reason"), **own)
        self._children: dict[tuple, Any] = {}

    def ended(self, method: str, code: str, seconds: float) -> None:
        """A call has its status."""
        self._child(self._calls, method, code).inc()
        self._child(self._call_s, method).observe(seconds)

    def refused(self, cause: str) -> None:
        """A call was turned away; `cause` is one of few words."""
        self._child(self._refusals, cause).inc()

    def answered(self, method: str, level: Level, degraded_reason: str, stages: Sequence[StageStats]) -> None:
        """What an answer says of itself."""
        self._child(self._answers, method, level.name.lower()).inc()
        if degraded_reason:
            for reason in degraded_reason.split("; "):
                self._child(self._degraded, reason).inc()
        for stage in stages:
            self._child(self._stage_s, stage.name).observe(stage.ms / 1000.0)
            self._child(self._received, stage.name).inc(stage.received)
            self._child(self._kept, stage.name).inc(stage.kept)
            for reason, count in stage.removed.items():
                if count > 0:  # an upload in between can leave one candidate more than came in
                    self._child(self._removed, stage.name, reason).inc(count)

    def read_at_scrape(self, readings: Iterable[Reading], version: Callable[[], str]) -> None:
        """Add what is read when somebody asks: it costs a request nothing."""
        self.registry.register(_Now(tuple(readings), version))

    def listen(self, host: str, port: int) -> WSGIServer:
        """Answer `GET /metrics` on a thread of its own; `shutdown()` of what is returned ends it."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server

    def _child(self, metric: Counter | Histogram, *labels: str) -> Any:
        """`labels()` checks and locks at each call: remembered, the look-up is a dictionary's."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


class _Now(Collector):
    """Reads a server's state."""

    def __init__(self, readings: tuple[Reading, ...], version: Callable[[], str]) -> None:
        self._readings, self._version = readings, version

    def collect(self) -> Iterable[Metric]:
        live = GaugeMetricFamily("reelrank_bundle_info", "1 for the bundle that answers.", labels=["version"])
        live.add_metric([self._version()], 1)
        yield live
        for name, says, read in self._readings:
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"reelrank_{name}", says, value=read())
