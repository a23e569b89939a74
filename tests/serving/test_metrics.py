"""What a running server says of itself: scraped over HTTP, and spans received by a collector."""

from __future__ import annotations

import shutil
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from serving.client import FeedClient
from serving.messages import Level, StageStats
from serving.metrics import Metrics
from serving.protos.reelrank.v1 import feed_pb2, feed_pb2_grpc

sys.path.insert(0, str(Path(__file__).parent))
from servers import CONFIG, refused, running

STAGES = ["hydrate", "filter", "retrieve", "rank", "arrange", "respond"]


def scrape(port: int) -> dict[tuple, float]:
    """Samples by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_a_scrape_tells_what_calls_did_and_what_is_true_now(world, tmp_path):
    config, registry = replace(CONFIG, metrics_port=0), shutil.copytree(world.registry, tmp_path / "registry")
    with (
        running(registry, tmp_path / "s.sqlite", config) as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client,
    ):
        assert scrape(server.metrics_port)["reelrank_bundle_info", "v1"] == 1
        page = client.get_feed(1, now_ms=world.now_ms)
        client.retrieve(1, k=50, now_ms=world.now_ms)
        refused(client.get_feed, 1, k=0)
        client.remove_videos([page.items[0].video_id])
        (registry / "LIVE").write_text("no such version\n")
        assert not server.live.poll()
        found = scrape(server.metrics_port)
    expected = {
        ("reelrank_requests_total", "GetFeed", "OK"): 1,
        ("reelrank_requests_total", "GetFeed", "INVALID_ARGUMENT"): 1,
        ("reelrank_requests_total", "OK", "Retrieve"): 1,
        ("reelrank_requests_total", "OK", "RemoveVideos"): 1,
        ("reelrank_refusals_total", "invalid"): 1,
        ("reelrank_answers_total", "GetFeed", "full"): 1,
        ("reelrank_answers_total", "Retrieve", "full"): 1,
        ("reelrank_request_seconds_count", "GetFeed"): 2,
        ("reelrank_stage_kept_total", "respond"): 10,
        ("reelrank_bundle_refused_total",): 1,
        ("reelrank_bundle_swaps_total",): 0,
        ("reelrank_uploads_live",): 1,
        ("reelrank_in_flight",): 0,
        ("reelrank_workers_stalled",): 0,
        ("reelrank_store_waiting",): 0,
        ("reelrank_store_available",): 1,
        ("reelrank_store_slates_dropped_total",): 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    for stage in page.stages:
        assert found["reelrank_stage_seconds_count", stage.name] >= 1
    arranged = next(stage for stage in page.stages if stage.name == "arrange")
    assert found["reelrank_stage_received_total", "arrange"] == arranged.received
    assert found["reelrank_stage_removed_total", "arrange", "not_chosen"] == arranged.removed["not_chosen"]
    assert found["process_open_fds",] > 0


def test_a_mistake_in_accounting_never_reaches_a_caller(world, tmp_path):
    with (
        running(world.registry, tmp_path / "s.sqlite") as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client,
    ):
        server.metrics.ended = lambda *_: 1 / 0
        assert len(client.get_feed(1, now_ms=world.now_ms).items) == 10
        assert refused(client.get_feed, 1, k=0)[0] == grpc.StatusCode.INVALID_ARGUMENT


def test_reasons_are_counted_one_by_one():
    metrics = Metrics()
    metrics.answered("GetFeed", Level.POPULAR, "the store does not answer; no time left to retrieve", [])
    metrics.answered("GetFeed", Level.FULL, "", [StageStats("filter", 5, 3, {"seen": 3, "raced": -1}, 0.1)])
    value = metrics.registry.get_sample_value
    assert value("reelrank_degraded_total", {"reason": "no time left to retrieve"}) == 1
    assert value("reelrank_degraded_total", {"reason": "the store does not answer"}) == 1
    assert value("reelrank_stage_removed_total", {"stage": "filter", "reason": "seen"}) == 3


@contextmanager
def collector() -> Iterator[tuple[str, list]]:
    """An OTLP/HTTP collector: its address, and the spans it has got."""
    spans: list = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            spans.extend(span for r in message.resource_spans for scope in r.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receive)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_traces_hold_a_span_a_stage_under_the_callers_own(world, tmp_path):
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with collector() as (endpoint, spans):
        config = replace(CONFIG, otlp=endpoint)
        with (
            running(world.registry, tmp_path / "s.sqlite", config) as server,
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = feed_pb2_grpc.FeedServiceStub(channel)
            request = feed_pb2.GetFeedRequest(user_id=1, k=10, now_ms=world.now_ms)
            metadata = (("traceparent", f"00-{trace_id}-{parent_id}-01"),)
            stub.GetFeed(request, timeout=20, metadata=metadata)
            with pytest.raises(grpc.RpcError):
                stub.GetFeed(feed_pb2.GetFeedRequest(user_id=1), timeout=20, metadata=metadata)
    assert {span.trace_id.hex() for span in spans} == {trace_id}
    calls = [span for span in spans if span.parent_span_id.hex() == parent_id]
    assert [span.name for span in calls] == ["reelrank.v1.FeedService/GetFeed"] * 2
    good, bad = sorted(calls, key=lambda span: span.status.code)
    assert {a.key: a.value.string_value for a in good.attributes}["level"] == "FULL"
    assert {a.key: a.value.string_value for a in bad.attributes}["rpc.grpc.status_code"] == "INVALID_ARGUMENT"
    stages = sorted(
        (span for span in spans if span.parent_span_id == good.span_id), key=lambda span: span.start_time_unix_nano
    )
    assert [span.name for span in stages] == STAGES
    for span in stages:
        assert good.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= good.end_time_unix_nano
    attributes = {a.key for span in spans for a in span.attributes}
    assert not {key for key in attributes if "user" in key or "video" in key}


def test_a_collector_that_is_away_costs_no_answer(world, tmp_path):
    config = replace(CONFIG, otlp="http://127.0.0.1:9")
    with (
        running(world.registry, tmp_path / "s.sqlite", config) as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client,
    ):
        assert len(client.get_feed(1, now_ms=world.now_ms).items) == 10
