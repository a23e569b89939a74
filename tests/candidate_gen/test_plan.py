"""The planner: its memory figure is the files' size, its limits hold, and a no comes with what would help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.costs import CODES, IndexCosts
from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.plan import CODE_BITS, GIB, Candidate, Design, PlanRequest, designs, evaluate, plan

DIM, COSTS = 64, IndexCosts()
MILLION = PlanRequest(videos=1_000_000, dim=DIM, ram_bytes=2 * GIB)
HUNDRED_MILLION = PlanRequest(videos=100_000_000, dim=DIM, ram_bytes=12 * GIB, directions=16)


def planned(n: int, codes: str, stored: str, coarse: str = "exact", directions: int | None = None) -> Candidate:
    design = Design(coarse=coarse, codes=codes, refine=stored, mapped=False)
    request = PlanRequest(videos=n, dim=DIM, ram_bytes=GIB, directions=directions)
    return evaluate(design, request, probes=8, rerank=1, costs=COSTS)


@pytest.mark.parametrize("n", [30_000, 90_000])
@pytest.mark.parametrize(
    ("codes", "stored", "directions"), [("pq 8b", "int8", 32), ("pq 4b", "int8", 32), ("pq 2b", "int4", DIM)]
)
def test_memory_is_within_a_tenth_of_the_built_index(n: int, codes: str, stored: str, directions: int, tmp_path: Path):
    rng = np.random.default_rng(n)
    vectors_ND = rng.normal(size=(200, DIM))[rng.integers(0, 200, n)] + rng.normal(size=(n, DIM))
    vectors_ND[:, directions:] = 0
    vectors_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)
    config = IndexConfig(kind="ivf", kept_variance=1.0, code_bits=CODE_BITS[codes], stored=stored)
    index = VideoIndex.build([(np.arange(1, n + 1), vectors_ND)], n + 1, config, tmp_path)
    assert index.trained.video_map_RD.shape == (directions, DIM)
    np.save(tmp_path / "ids.npy", np.zeros(n + 1, np.int64))
    truth = sum(path.stat().st_size for path in tmp_path.iterdir())
    candidate = planned(n, codes, stored, directions=directions)
    assert candidate.lists == index.trained.clusters.lists
    assert abs(candidate.resident_bytes - truth) < 0.1 * truth
    assert candidate.disk_bytes == candidate.resident_bytes


def test_bytes_a_video_are_the_sum_of_the_layout():
    # code, row, int8, id, bitmap; and a list: half a block of codes and rows, centroid, size
    lists = 32_768
    eight = 64 + 8 + 64 + 8 + 1 / 8 + lists * (15.5 * (64 + 8) + 4 * 64 + 8) / 1e8
    assert planned(100_000_000, "pq 8b", "int8").bytes_per_vector == pytest.approx(eight, abs=0.01)
    few = 4 + 8 + 32 + 8 + 1 / 8 + lists * (15.5 * (4 + 8) + 4 * 16 + 8) / 1e8  # 16 directions of 2 bits
    found = planned(100_000_000, "pq 2b", "int4", directions=16)
    assert found.lists == lists
    assert found.bytes_per_vector == pytest.approx(few, abs=0.01)


@pytest.mark.parametrize("request_", [MILLION, HUNDRED_MILLION, replace(MILLION, videos=5_000, p50_ms=0.2)])
def test_the_pick_keeps_every_limit_and_none_that_does_is_much_quicker(request_: PlanRequest):
    found = plan(request_)
    assert found.pick is not None
    assert found.pick.resident_bytes + COSTS.process_bytes <= request_.ram_bytes
    assert found.pick.recall >= request_.recall
    assert found.pick.p50_ms <= request_.p50_ms
    fitting = [c for c in found.candidates if not c.misses]
    assert found.pick.p50_ms <= 1.15 * min(c.p50_ms for c in fitting)
    assert len(found.candidates) == len(list(designs())) == 1 + 3 * (4 * 3 * 2 + 1)


def test_a_small_catalogue_is_scanned_exactly():
    found = plan(replace(MILLION, videos=2_000, recall=0.999))
    assert found.pick is not None
    assert found.pick.recall_first_k == 1.0
    assert found.pick.design.codes == "flat"


def test_what_would_help_does_help():
    request = replace(HUNDRED_MILLION, p50_ms=0.43)
    refused = plan(request)
    assert refused.pick is None
    assert [c for c in refused.candidates if not c.misses] == []
    told = {line.split()[0]: line.split()[1] for line in refused.advice if line.startswith("--")}
    assert plan(replace(request, p50_ms=float(told["--p50"].removesuffix("ms")))).pick is not None
    assert plan(replace(request, recall=float(told["--recall"]))).pick is not None
    machines = int(refused.advice[-1].split()[0])
    assert plan(replace(request, videos=request.videos // machines)).pick is not None
    assert plan(replace(request, videos=2 * request.videos // machines)).pick is None
    tight = replace(HUNDRED_MILLION, ram_bytes=2 * GIB)
    (ram,) = [line for line in plan(tight).advice if line.startswith("--ram")]
    enough = float(ram.split()[1].removesuffix("GiB"))
    assert plan(replace(tight, ram_bytes=int(enough * GIB))).pick is not None
    assert plan(replace(tight, ram_bytes=int((enough - 0.2) * GIB))).pick is None


def test_disk_counts_the_index_and_the_vectors_it_is_built_from():
    found = plan(replace(HUNDRED_MILLION, disk_bytes=100_000_000 * (64 * 2 + 40)))  # float16 vectors and 40 bytes more
    assert found.pick is None
    assert any(line.startswith("--disk") for line in found.advice)
    fits = [c for c in found.candidates if "disk" not in c.misses]
    assert all(c.disk_bytes <= 100_000_000 * 40 for c in fits)


def test_a_mapped_stage_costs_a_page_a_miss_when_memory_cannot_cache_it():
    design = Design(coarse="exact", codes="pq 2b", refine="int8", mapped=True)
    roomy, tight = replace(HUNDRED_MILLION, ram_bytes=16 * GIB), replace(HUNDRED_MILLION, ram_bytes=4 * GIB)
    cached, cold = (evaluate(design, request, 700, 2, COSTS) for request in (roomy, tight))
    in_memory = evaluate(replace(design, mapped=False), roomy, 700, 2, COSTS)
    assert cached.p50_ms == pytest.approx(in_memory.p50_ms)
    assert cached.resident_bytes < in_memory.resident_bytes == cached.disk_bytes
    left = 4 * GIB - COSTS.process_bytes - cold.resident_bytes
    missed = 2 * 10 * 100 * (1 - left / (100_000_000 * 64))
    assert cold.p50_ms - cached.p50_ms == pytest.approx(missed * COSTS.fault_us / 1000)


def test_recall_rises_with_probes_and_with_what_is_scored_and_meets_what_was_measured():
    for share, recall in COSTS.recall_at_share:
        assert COSTS.probed(share, 100_000_000) == pytest.approx(recall)
    curve = [COSTS.probed(share, 100_000_000) for share in np.geomspace(1e-6, 1, 60)]
    assert curve == sorted(curve)
    assert curve[-1] == 1.0
    (codes,) = [c for c in CODES if c.name == "pq 8b"]
    for videos, rerank, measured in ((10**6, 1, 0.999), (10**7, 1, 0.995), (10**8, 1, 0.961), (10**8, 4, 0.984)):
        assert COSTS.kept(codes, videos, rerank) == pytest.approx(measured, abs=0.01)


def test_only_what_the_index_builds_is_picked():
    found = plan(HUNDRED_MILLION)
    assert found.pick is not None
    assert found.pick.design.codes in CODE_BITS
    assert found.pick.design.coarse == "exact"
    unbuilt = {c.design.codes for c in found.candidates if "unbuilt" in c.misses}
    assert {"sq 8b", "rabitq 1b"} < unbuilt


def test_a_billion_videos_are_planned():
    found = plan(PlanRequest(videos=10**9, dim=DIM, directions=16, ram_bytes=128 * GIB, p50_ms=50, recall=0.7))
    assert found.pick is not None
    assert 50 < found.pick.bytes_per_vector < 120


@pytest.mark.parametrize(("field", "value"), [("videos", 0), ("dim", 63), ("recall", 1.0), ("ram_bytes", -1), ("k", 0)])
def test_a_request_that_makes_no_sense_is_refused_by_field(field: str, value: float):
    with pytest.raises(ValueError, match=rf"PlanRequest\.{field}"):
        replace(MILLION, **{field: value})
