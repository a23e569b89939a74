"""Retrieval under filters: recall against exact filtered search, latency, and results short of what exists.

    python -m benchmarks.retrieval_filters --corpus FOLDER [--videos 1e6] [--json FILE]

The corpus is a folder of a trained video tower's vectors and the user tower's queries (`benchmarks.vectors`). One
index, one thread, one query at a time, the same queries under every filter. Bitmaps that pass 50%, 10%, 1% and .1% of
the videos: drawn at random; the videos nearest to one video (what passes is alike, as a language or a region is); and
the videos least like what the queries ask for (nothing near a query passes). Then 2,000 seen videos a query, drawn from
its own 10,000 best, so that a fifth of what the search would return is taken away. Filters take turns in every round;
medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine, measure, our_index
from benchmarks.building import built
from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus, exact_answers, numbered
from candidate_gen.index import IndexConfig
from candidate_gen.index.check import exact_top

SHARES = (0.5, 0.1, 0.01, 0.001)
SEEN, SEEN_AMONG = 2_000, 10_000
SEED = 1
PACKAGES = ("faiss-cpu", "numpy")
_opened: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One filter and its exact answers. N videos, Q queries, K results."""

    name: str
    share: float
    """Of the videos that pass."""
    exact_QK: np.ndarray
    mask_N: np.ndarray | None = None
    seen_QS: np.ndarray | None = None


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval_filters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of videos-*.npy, queries.npy")
    parser.add_argument("--videos", type=float, default=1e6)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="keeps the built index")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    figures = {"machine": machine.describe_at_rest(PACKAGES, console)}
    corpus, n = Corpus.open(options.corpus), int(options.videos)
    figures |= {"videos": n, "dim": corpus.dim, "k": options.k, "queries": options.queries}
    name, config = f"{our_index.NAME} as it is by itself", IndexConfig()
    folder = built(name, our_index.build, corpus, n, options.work, console, config)["folder"]
    query_QD = corpus.queries(options.queries)
    console.print("exact answers under every filter")
    cases = list(filters(corpus, n, query_QD, options.k, options.work))
    with FreshProcess(threads=1) as process:
        process.run(_open, folder, query_QD, options.k)
        rounds = []
        for number in range(options.rounds):
            rounds.append([process.run(_measure, case) for case in cases])
            console.print(f"round {number + 1} of {options.rounds}")
    figures["filters"] = [_median(passes) for passes in zip(*rounds, strict=True)]
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def filters(corpus: Corpus, n: int, query_QD: np.ndarray, k: int, work: Path) -> Iterator[Case]:
    """Every filter with its exact answers; the first lets everything pass."""
    generator = np.random.default_rng(SEED)
    top_QM = exact_answers(corpus, n, query_QD, min(SEEN_AMONG, n), work)
    yield Case(name="none", share=1.0, exact_QK=top_QM[:, :k])
    one = generator.integers(n)
    one_D = next(block_BD[one - first] for first, block_BD in corpus.blocks(n) if one < first + len(block_BD))
    orders = {
        "at random": generator.random(n),
        "nearest to a video": _products(corpus, n, one_D),
        "least like the queries": -_products(corpus, n, query_QD.mean(axis=0)),
    }
    for name, order_N in orders.items():
        for share in SHARES:
            mask_N = passing(order_N, share)
            blocks = ((rows[mask_N[rows]], block_BD[mask_N[rows]]) for rows, block_BD in numbered(corpus.blocks(n)))
            exact_QK, _ = exact_top(blocks, query_QD, k)
            yield Case(name=name, share=float(mask_N.mean()), exact_QK=exact_QK, mask_N=mask_N)
    seen_QS, rest_QK = seen_and_rest(top_QM, k, generator)
    yield Case(name=f"{seen_QS.shape[1]:,} seen", share=1 - seen_QS.shape[1] / n, exact_QK=rest_QK, seen_QS=seen_QS)


def passing(order_N: np.ndarray, share: float) -> np.ndarray:
    """Bool (N,): the `share` of videos that come highest in an order, at least one."""
    count = max(1, round(share * len(order_N)))
    mask_N = np.zeros(len(order_N), bool)
    mask_N[np.argpartition(-order_N, count - 1)[:count]] = True
    return mask_N


def seen_and_rest(top_QM: np.ndarray, k: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of each query's M exact best, a fifth drawn as seen (Q, S), and the k best of the others (Q, k)."""
    n_seen = min(SEEN, top_QM.shape[1] // 5)
    seen_QS, rest_QK = [], []
    for top_M in top_QM:
        is_seen_M = np.zeros(len(top_M), bool)
        is_seen_M[generator.choice(len(top_M), n_seen, replace=False)] = True
        seen_QS.append(top_M[is_seen_M])
        rest_QK.append(top_M[~is_seen_M][:k])
    return np.stack(seen_QS), np.stack(rest_QK)


def judge(case: Case, found_QK: np.ndarray, k: int) -> dict[str, int]:
    """Queries with fewer results than exist (at most k), and results that the filter forbids."""
    if case.mask_N is not None:
        wrong_QK = (found_QK >= 0) & ~case.mask_N[np.maximum(found_QK, 0)]
    elif case.seen_QS is not None:
        pairs = zip(found_QK, case.seen_QS, strict=True)
        wrong_QK = np.stack([np.isin(found_K, seen_S) for found_K, seen_S in pairs])
    else:
        wrong_QK = np.zeros(found_QK.shape, bool)
    exist_Q = np.minimum((case.exact_QK >= 0).sum(axis=1), k)
    return {"underfilled": int(((found_QK >= 0).sum(axis=1) < exist_Q).sum()), "forbidden": int(wrong_QK.sum())}


def show(figures: dict[str, Any], console: Console) -> None:
    """One row a filter."""
    console.print(
        f"\n{figures['videos']:,} videos x {figures['dim']}, top {figures['k']}, {figures['queries']:,} queries one "
        "at a time on one thread"
    )
    columns = (
        "filter",
        "passes",
        "recall",
        "p50 ms",
        "p99 ms",
        "CPU ms",
        "CPU against none",
        "underfilled",
        "forbidden",
    )
    table = Table(*columns)
    none = figures["filters"][0]
    for row in figures["filters"]:
        table.add_row(
            row["name"],
            f"{row['share']:.1%}",
            f"{row['recall']:.3f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['cpu_ms']:.2f}",
            f"{row['cpu_ms'] / none['cpu_ms'] - 1:+.0%}",
            str(row["underfilled"]),
            str(row["forbidden"]),
        )
    console.print(table)
    console.print(machine.line(figures["machine"]))


def _products(corpus: Corpus, n: int, direction_D: np.ndarray) -> np.ndarray:
    wanted_D = direction_D.astype(np.float32)
    return np.concatenate([block_BD.astype(np.float32) @ wanted_D for _, block_BD in corpus.blocks(n)])


def _open(folder: str, query_QD: np.ndarray, k: int) -> None:
    _opened.update(index=our_index.OurIndex(Path(folder)), query_QD=query_QD, k=k)


def _measure(case: Case) -> dict[str, Any]:
    index, query_QD, k = _opened["index"], _opened["query_QD"], _opened["k"]
    allowed = None if case.mask_N is None else index.as_filter(case.mask_N)
    numbers = iter([*range(20), *range(len(query_QD))])

    def search(query_1D: np.ndarray) -> np.ndarray:
        excluded = None if case.seen_QS is None else case.seen_QS[next(numbers)] + 1
        return index.search(query_1D, k, allowed_rows=allowed, excluded_rows=excluded)

    for query_D in query_QD[:20]:  # first touches are not the filter's cost
        search(query_D[None])
    found_QK, wall_ms, cpu_ms = measure.one_at_a_time(search, query_QD, k)
    measured = measure.point({}, found_QK, case.exact_QK, wall_ms, cpu_ms)
    return {"name": case.name, "share": case.share, **asdict(measured), **judge(case, found_QK, k)}


def _median(passes: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    numbers = ("recall", "p50_ms", "p99_ms", "cpu_ms")
    worst = {name: max(one[name] for one in passes) for name in ("underfilled", "forbidden")}
    return {**passes[0], **{name: float(np.median([one[name] for one in passes])) for name in numbers}, **worst}


if __name__ == "__main__":
    main()
