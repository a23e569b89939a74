"""`reelrank index plan`: what the planner found, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from candidate_gen.costs import IndexCosts
from candidate_gen.plan import CODE_BITS, GIB, Candidate, Plan, evaluate


def as_json(found: Plan) -> str:
    """The request, every candidate, the pick (or null), the reason and the advice."""
    return json.dumps(asdict(found), indent=2)


def print_plan(found: Plan, console: Console) -> None:
    """One line a code and refine stage, under its best coarse quantizer; the pick in parts; what would help."""
    request, pick = found.request, found.pick
    kept = "" if request.directions is None else f" ({request.directions} directions)"
    disk = "" if request.disk_bytes is None else f", {request.disk_bytes / GIB:.1f} GiB of disk"
    console.print(
        f"{request.videos:,} videos x {request.dim}{kept}, {request.ram_bytes / GIB:.1f} GiB of memory{disk}: the best "
        f"{request.k} of each query at recall {request.recall} among the {10 * request.k:,} handed on, "
        f"p50 {request.p50_ms:g} ms on one thread. Codes: 4b is four bits a direction."
    )
    first_k = f"first {request.k}"
    columns = ("codes", "stored", "coarse", "probes", "scored", "B/video", "RAM GiB", "disk GiB")
    columns += ("recall", first_k, "p50 ms", "p99 ms", "build min", "breaks")
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for candidate in _best_coarse(found.candidates):
        table.add_row(*_cells(candidate), style="bold" if pick and candidate.design == pick.design else None)
    console.print(table)
    if pick is None:
        console.print(f"No: {found.reason}. What would help:")
        for line in found.advice or ["nothing among memory, disk, latency and recall alone, nor 64 machines"]:
            console.print(f"  {line}")
        return
    _print_pick(found, pick, console)


def _print_pick(found: Plan, pick: Candidate, console: Console) -> None:
    console.print(f"[bold]{pick.design}[/bold]: {found.reason}.")
    if pick.lists:
        console.print(
            f"  IndexConfig(lists={pick.lists}, probes={pick.probes}, rerank={pick.rerank}, "
            f"code_bits={CODE_BITS[pick.design.codes]}, stored={pick.design.refine!r})"
        )
    parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in pick.bytes_by_part.items())
    console.print(f"  GiB: {parts}; the process itself {IndexCosts().process_bytes / GIB:.1f}")
    stages = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in pick.build_s.items())
    console.print(f"  minutes to build on {found.request.cores} cores, once vectors exist: {stages}")
    if pick.lists:
        steps = [(n, evaluate(pick.design, found.request, n, pick.rerank, IndexCosts())) for n in _around(pick)]
        shown = "; ".join(f"{n:,} probes: recall {c.recall:.2f}, p50 {c.p50_ms:.1f} ms" for n, c in steps)
        console.print(f"  {shown}")


def _around(pick: Candidate) -> list[int]:
    return sorted({max(pick.probes // 4, 1), pick.probes, min(pick.probes * 4, pick.lists)})


def _best_coarse(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each code and refine stage; candidates come best first."""
    first: dict[tuple, Candidate] = {}
    for candidate in candidates:
        design = candidate.design
        first.setdefault((design.codes, design.refine, design.mapped), candidate)
    return list(first.values())


def _cells(candidate: Candidate) -> list[str]:
    design = candidate.design
    refine = design.refine if design.refine == "none" else f"{design.refine} {'mapped' if design.mapped else 'in RAM'}"
    return [
        design.codes,
        refine,
        design.coarse,
        f"{candidate.probes:,}",
        f"{candidate.rerank}x",
        f"{candidate.bytes_per_vector:.1f}",
        f"{candidate.resident_bytes / GIB:.2f}",
        f"{candidate.disk_bytes / GIB:.2f}",
        f"{candidate.recall:.3f}",
        f"{candidate.recall_first_k:.3f}",
        f"{candidate.p50_ms:.2f}",
        f"{candidate.p99_ms:.2f}",
        f"{sum(candidate.build_s.values()) / 60:.1f}",
        " ".join(candidate.misses),
    ]
