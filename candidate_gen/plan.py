"""The planner: which index holds so many videos in so much memory; how good, how quick, how long to build.

A design is a coarse quantizer, a code in the lists, a refine stage and where that stage lies. Every design gets the
fewest probes that reach the recall asked for; what then keeps all limits is a candidate, and the quickest is picked.
Recall is the share of a query's exact best k among the 10 k that the index hands on (exactly scored, best first).
R directions that lists and codes keep, D width, L lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from candidate_gen.costs import COARSE, CODES, CoarseCosts, CodeCosts, IndexCosts
from candidate_gen.index import IndexConfig

GIB = 2**30
MOST_MACHINES = 64
CODE_BITS = {"pq 8b": 8, "pq 4b": 4, "pq 2b": 2}
"""What `IndexConfig.code_bits` builds."""
CLOSE = 1.15
"""Designs within 15% of the quickest count as equally quick: the estimates are no better than that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What the index must hold, and the limits it must keep."""

    videos: int
    dim: int
    ram_bytes: int
    directions: int | None = None
    """Principal directions that lists and codes keep (`IndexConfig.kept_variance`): towers may need far fewer than D.
    None: all."""
    disk_bytes: int | None = None
    """For the index and, while it is built, the float16 vectors; None for no limit."""
    recall: float = 0.9
    """Share of the exact best k among the 10 k handed on."""
    k: int = 100
    p50_ms: float = 5.0
    """One query at a time on one thread."""
    cores: int = 2
    """For the build."""

    def __post_init__(self) -> None:
        for name in ("videos", "ram_bytes", "k", "p50_ms", "cores"):
            if getattr(self, name) <= 0:
                raise ValueError(f"PlanRequest.{name} is {getattr(self, name)}: give more than 0")
        if self.dim < 4 or self.dim % 4:
            raise ValueError(f"PlanRequest.dim is {self.dim}: give a multiple of 4 (codes take 2 bits a dimension)")
        if self.directions is not None and not (0 < self.directions <= self.dim and self.directions % 4 == 0):
            raise ValueError(f"PlanRequest.directions is {self.directions}: give a multiple of 4, at most {self.dim}")
        if not 0 < self.recall < 1:
            raise ValueError(f"PlanRequest.recall is {self.recall}: give a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """A way to build an index."""

    coarse: str
    codes: str
    refine: str
    """float16, int8 or int4: how vectors are stored for exact scores; "none" where the codes are as good."""
    mapped: bool
    """The refine stage is read from disk through the page cache; otherwise its pages have to fit in memory."""

    def __str__(self) -> str:
        if self.codes == "flat":
            return "flat exact"
        refine = "" if self.refine == "none" else f" + {self.refine} {'mapped' if self.mapped else 'in memory'}"
        return f"ivf ({self.coarse}) {self.codes}{refine}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A design at stated lists and probes, with what it takes and gives."""

    design: Design
    lists: int
    probes: int
    rerank: int
    """Codes find this many times what is handed on."""
    bytes_by_part: dict[str, int]
    resident_bytes: int
    """The index's pages that must stay in memory; the process itself takes `IndexCosts.process_bytes` more."""
    disk_bytes: int
    build_disk_bytes: int
    """The index and the float16 vectors it is built from."""
    recall: float
    recall_first_k: float
    """The same, among the first k only: what the refine stage's rounding leaves of the order."""
    p50_ms: float
    p99_ms: float
    build_s: dict[str, float]
    bytes_per_vector: float
    misses: tuple[str, ...] = ()
    """Of ram, disk, recall and p50; "unbuilt" for a design that is compared only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every design, those that break fewest limits first, then by latency; the pick and why, or None and what helps."""

    request: PlanRequest
    candidates: list[Candidate]
    pick: Candidate | None
    reason: str
    advice: list[str] = field(default_factory=list)


def plan(request: PlanRequest, costs: IndexCosts | None = None) -> Plan:
    """All designs for a request, and the pick."""
    costs = costs or IndexCosts()
    candidates = [_at_recall(design, request, costs) for design in designs()]
    candidates.sort(key=lambda c: (len(c.misses), "recall" in c.misses, c.p50_ms))
    fitting = [c for c in candidates if not c.misses]
    if not fitting:
        return Plan(
            request=request,
            candidates=candidates,
            pick=None,
            reason="no design that is built keeps every limit",
            advice=list(_advice(request, candidates, costs)),
        )
    quick = [c for c in fitting if c.p50_ms <= CLOSE * fitting[0].p50_ms]
    pick = min(quick, key=lambda c: (c.design.mapped, -round(c.recall_first_k, 2), c.resident_bytes))
    reason = (
        f"{len(fitting)} of {len(candidates)} designs keep every limit; the quickest takes {fitting[0].p50_ms:.2f} ms"
    )
    if len(quick) > 1:
        reason += (
            f" and {len(quick)} within {CLOSE - 1:.0%} of it; of these, all in memory before mapped, "
            f"then the best order in the first {request.k}, then the least memory"
        )
    return Plan(request=request, candidates=candidates, pick=pick, reason=reason)


def designs() -> Iterator[Design]:
    """Every design the planner compares."""
    yield Design(coarse="none", codes="flat", refine="none", mapped=False)
    for coarse, codes in product(COARSE, CODES):
        if codes.name == "sq 8b":  # its codes are int8 already
            yield Design(coarse=coarse.name, codes=codes.name, refine="none", mapped=False)
            continue
        for refine, mapped in product(("float16", "int8", "int4"), (False, True)):
            yield Design(coarse=coarse.name, codes=codes.name, refine=refine, mapped=mapped)


def is_built(design: Design) -> bool:
    """Whether `candidate_gen.index` makes it: product codes behind exact centroids."""
    return design.codes == "flat" or (design.codes in CODE_BITS and design.coarse == "exact")


def evaluate(design: Design, request: PlanRequest, probes: int, rerank: int, costs: IndexCosts) -> Candidate:
    """A design's figures when a query probes `probes` lists and scores `rerank` times what it hands on."""
    if design.codes == "flat":
        return _flat(design, request, costs)
    n, lists, width = request.videos, _lists(request), request.directions or request.dim
    coarse, codes = _coarse(design), _codes(design)
    parts = _bytes_by_part(design, request, lists, costs)
    total = sum(parts.values())
    resident = total - (parts["stored"] if design.mapped else 0)
    share = min(probes / lists, 1.0)
    found_share = share * coarse.found if share < 1 else 1.0
    recall = costs.probed(found_share, n) * costs.kept(codes, n, rerank)
    p50_ms = (
        costs.query_fixed_ms
        + coarse.ms(lists, probes, width)
        + share * n * codes.scan_ns_at(width) * 1e-6
        + _rescore_ms(design, request, rerank, parts["stored"], resident, costs)
    )
    candidate = Candidate(
        design=design,
        lists=lists,
        probes=probes,
        rerank=rerank,
        bytes_by_part=parts,
        resident_bytes=resident,
        disk_bytes=total,
        build_disk_bytes=total + 2 * n * request.dim,
        recall=recall,
        recall_first_k=recall * dict(costs.refine_first_k)[design.refine],
        p50_ms=p50_ms,
        p99_ms=p50_ms * costs.p99_over_p50,
        build_s=_build_s(request, lists, parts, costs),
        bytes_per_vector=total / n,
    )
    return _judged(candidate, request, costs)


def _lists(request: PlanRequest) -> int:
    return IndexConfig().lists_for(request.videos)


def _bytes_by_part(design: Design, request: PlanRequest, lists: int, costs: IndexCosts) -> dict[str, int]:
    """Bytes of the files, part by part; a list's codes and rows are padded by half a block."""
    n, width, codes = request.videos, request.directions or request.dim, _codes(design)
    padded = n + lists * (codes.block - 1) / 2
    stored = {"float16": 2.0, "int8": 1.0, "int4": 0.5, "none": 0.0}[design.refine] * request.dim
    return {
        "codes": int(padded * codes.bytes_at(width)),
        "rows": int(padded * costs.row_bytes),
        "stored": int(n * stored),
        "id map": n * costs.id_map_bytes,
        "bitmap": n * costs.bitmap_bits // 8,
        "centroids": lists * (4 * width + costs.list_bytes) + _coarse(design).bytes_at(lists, width),
    }


def _rescore_ms(
    design: Design, request: PlanRequest, rerank: int, stored_bytes: int, resident: int, costs: IndexCosts
) -> float:
    """Keeping and scoring what the codes found; of mapped vectors, what memory is left caches that share of pages."""
    found = rerank * costs.handed_on_per_k * request.k
    us = found * costs.found_us
    if design.refine == "none":
        return us * 1e-3
    us += found * costs.rescore_us_per_64_bytes * max(stored_bytes / request.videos / 64, 0.5)
    if design.mapped:
        left = max(request.ram_bytes - costs.process_bytes - resident, 0)
        us += found * costs.fault_us * max(1 - left / stored_bytes, 0.0)
    return us * 1e-3


def _build_s(request: PlanRequest, lists: int, parts: dict[str, int], costs: IndexCosts) -> dict[str, float]:
    """Seconds a stage: two-level k-means on a sample, assignment and encoding, merging, reading and hashing files."""
    n, width, root = request.videos, request.directions or request.dim, lists**0.5
    flops = 2.0 * width * 1e-9 / request.cores
    sample = min(IndexConfig().train_per_list * lists, n)
    return {
        "train": sample * 2 * root * costs.train_rounds * flops / costs.train_gflops,
        "assign": n * root * (1 + costs.assign_branches) * flops / costs.assign_gflops,
        "encode": n * width / 64 / (costs.encode_per_s * request.cores),
        "merge": n / costs.merge_per_s,
        "files": (2 * n * request.dim + 3 * sum(parts.values())) / (costs.disk_gb_s * 1e9),
    }


def _flat(design: Design, request: PlanRequest, costs: IndexCosts) -> Candidate:
    """Every vector kept in float32 and scanned."""
    n, dim = request.videos, request.dim
    parts = {"vectors": 4 * n * dim, "rows": n * costs.row_bytes, "id map": n * costs.id_map_bytes, "bitmap": n // 8}
    p50_ms = costs.query_fixed_ms + parts["vectors"] / (costs.memory_gb_s * 1e6)
    candidate = Candidate(
        design=design,
        lists=0,
        probes=0,
        rerank=0,
        bytes_by_part=parts,
        resident_bytes=sum(parts.values()),
        disk_bytes=sum(parts.values()),
        build_disk_bytes=sum(parts.values()) + 2 * n * dim,
        recall=1.0,
        recall_first_k=1.0,
        p50_ms=p50_ms,
        p99_ms=p50_ms * costs.p99_over_p50,
        build_s={"write": (2 * n * dim + sum(parts.values())) / (costs.disk_gb_s * 1e9)},
        bytes_per_vector=sum(parts.values()) / n,
    )
    return _judged(candidate, request, costs)


def _judged(candidate: Candidate, request: PlanRequest, costs: IndexCosts) -> Candidate:
    broken = {
        "ram": candidate.resident_bytes + costs.process_bytes > request.ram_bytes,
        "disk": request.disk_bytes is not None and candidate.build_disk_bytes > request.disk_bytes,
        "recall": candidate.recall < request.recall,
        "p50": candidate.p50_ms > request.p50_ms,
        "unbuilt": not is_built(candidate.design),
    }
    return replace(candidate, misses=tuple(name for name, is_broken in broken.items() if is_broken))


def _at_recall(design: Design, request: PlanRequest, costs: IndexCosts) -> Candidate:
    """The quickest that reaches the recall; where none does, the best that keeps the latency."""
    reached = []
    for rerank in costs.rerank:
        at = partial(evaluate, design, request, rerank=rerank, costs=costs)
        probes = _fewest(_lists(request), lambda probes, at=at: at(probes=probes).recall >= request.recall)
        reached += [] if probes is None else [at(probes=probes)]
    if reached:
        return min(reached, key=lambda c: c.p50_ms)
    return _at_latency(design, request, costs)


def _at_latency(design: Design, request: PlanRequest, costs: IndexCosts) -> Candidate:
    """The best recall that keeps the latency, or one probe where none does."""
    held = []
    for rerank in costs.rerank:
        at = partial(evaluate, design, request, rerank=rerank, costs=costs)
        slow = _fewest(_lists(request), lambda probes, at=at: at(probes=probes).p50_ms > request.p50_ms)
        held.append(at(probes=max((slow or _lists(request) + 1) - 1, 1)))
    return max(held, key=lambda c: ("p50" not in c.misses, c.recall))


def _fewest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The least of 1 .. most (lists) for which `holds`, which is false up to some number and true from there."""
    if not holds(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _advice(request: PlanRequest, candidates: list[Candidate], costs: IndexCosts) -> Iterator[str]:
    """What each limit would have to be, the others kept; and on how many machines the request as it is would fit."""

    def only(limit: str) -> list[Candidate]:
        return [c for c in candidates if set(c.misses) <= {limit}]

    if roomy := min(only("ram"), key=lambda c: c.resident_bytes, default=None):
        yield f"--ram {_up((roomy.resident_bytes + costs.process_bytes) / GIB)}GiB would do: {roomy.design}"
    if disky := min(only("disk"), key=lambda c: c.build_disk_bytes, default=None):
        yield f"--disk {_up(disky.build_disk_bytes / GIB)}GiB would do: {disky.design}"
    if patient := min(only("p50"), key=lambda c: c.p50_ms, default=None):
        yield f"--p50 {_up(patient.p50_ms)}ms would do: {patient.design}, {patient.probes:,} probes"
    held = [_at_latency(design, request, costs) for design in designs()]
    held = [c for c in held if set(c.misses) <= {"recall"}]
    if lax := max(held, key=lambda c: c.recall, default=None):
        yield f"--recall {int(lax.recall * 1000) / 1000:.3f} would do: {lax.design}, {lax.probes:,} probes"
    machines = 2
    while machines <= MOST_MACHINES:
        share = replace(request, videos=-(-request.videos // machines))
        if any(not _at_recall(design, share, costs).misses for design in designs()):
            yield f"{machines} machines with {share.videos:,} videos each, asked side by side, would do"
            return
        machines *= 2


def _up(value: float) -> str:
    """Rounded up to a tenth, so that what is printed does."""
    return f"{math.ceil(value * 10) / 10:.1f}"


def _coarse(design: Design) -> CoarseCosts:
    return next(coarse for coarse in COARSE if coarse.name == design.coarse)


def _codes(design: Design) -> CodeCosts:
    return next(codes for codes in CODES if codes.name == design.codes)
