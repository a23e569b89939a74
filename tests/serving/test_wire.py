"""What is written to the wire by hand is what protobuf would have written."""

from __future__ import annotations

import numpy as np
import pytest

from serving import wire
from serving.messages import RankedResponse, StageStats
from serving.protos.reelrank.v1 import feed_pb2 as pb


@pytest.mark.parametrize("n", [0, 1, 7, 31, 2_000])
def test_packed_arrays_are_the_message_that_protobuf_makes_of_the_numbers(n):
    rng = np.random.default_rng(n)
    answer = RankedResponse(
        bundle_version="v1",
        cold=True,
        tasks=("click", "like", "hate"),
        probability_NT=rng.random((n, 3), np.float32),
        watch_ms_N=rng.random(n).astype(np.float32) * 1e5,
        value_N=rng.normal(size=n),
        unknown=np.flatnonzero(rng.random(n) < 0.1),
        stages=(StageStats("rank", n, n, {}, 1.5),),
    )
    message = wire.write_ranked(answer)
    assert list(message.scores) == answer.probability_NT.ravel().tolist()
    assert list(message.predicted_watch_ms) == answer.watch_ms_N.tolist()
    assert list(message.values) == answer.value_N.tolist()
    again = pb.RankResponse(bundle_version="v1", cold=True, tasks=answer.tasks, level="LEVEL_FULL")
    again.scores.extend(answer.probability_NT.ravel().tolist())
    again.predicted_watch_ms.extend(answer.watch_ms_N.tolist())
    again.values.extend(answer.value_N.tolist())
    again.unknown.extend(answer.unknown.tolist())
    again.stages.add(name="rank", received=n, kept=n, ms=1.5)
    assert message.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    back = wire.read_ranked(pb.RankResponse.FromString(message.SerializeToString()))
    np.testing.assert_array_equal(back.probability_NT, answer.probability_NT)
    np.testing.assert_array_equal(back.value_N, answer.value_N)
