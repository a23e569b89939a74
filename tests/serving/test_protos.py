"""The wire contract: the committed stubs are what the proto says, and it can carry every canonical signal."""

from __future__ import annotations

from features.schema import SIGNALS
from serving.protos.generate import ROOT, generate
from serving.protos.reelrank.v1 import feed_pb2


def test_committed_stubs_are_what_the_proto_generates(tmp_path):
    for fresh in generate(tmp_path):
        committed = ROOT / fresh.relative_to(tmp_path)
        assert committed.read_text() == fresh.read_text(), f"run `python -m serving.protos.generate`: {committed}"


def test_every_signal_of_the_canonical_events_can_be_sent_and_left_out():
    fields = feed_pb2.Event.DESCRIPTOR.fields_by_name
    assert [name for name in fields if name in SIGNALS] == list(SIGNALS)
    event = feed_pb2.Event(like=False)
    assert event.HasField("like")
    assert not event.HasField("click")


def test_lists_of_numbers_travel_packed():
    n = 1000
    request = feed_pb2.RankRequest(video_ids=range(2**60, 2**60 + n))
    assert len(request.SerializeToString()) < 8 * n + 16
