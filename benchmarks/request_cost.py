"""What watching and guarding a page costs it, in CPU microseconds: `python -m benchmarks.request_cost [--json FILE]`.

Admission, metrics, a page token after 100 videos, and a trace with six stages (off unless `--otlp`); the slate of ten
of a thousand beside them, by each kind of diversity.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_at_rest, line
from ranking.arrange import MMR, SSD, ArrangeConfig, Candidates, arrange
from serving.admission import Admission
from serving.messages import Level, StageStats
from serving.metrics import Metrics
from serving.session import Session
from serving.trace import Deadline
from serving.tracing import Tracing

ROUNDS = 7
STAGES = [
    StageStats("hydrate", 50, 50, {}, 0.3),
    StageStats("filter", 1_000_000, 900_000, {"ineligible": 99_000, "seen": 1_000}, 0.4),
    StageStats("retrieve", 900_000, 1_000, {"not_retrieved": 899_000}, 2.0),
    StageStats("rank", 1_000, 1_000, {}, 4.0),
    StageStats("arrange", 1_000, 10, {"not_chosen": 990}, 0.5),
    StageStats("respond", 10, 10, {}, 0.2),
]


def cpu_us(work: Callable[[], object], times: int) -> float:
    """Least CPU time of the process over some rounds, a call."""
    work()
    rounds = []
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(times):
            work()
        rounds.append((time.process_time() - began_s) / times * 1e6)
    return round(min(rounds), 1)


def measure() -> dict[str, float]:
    """Microseconds by name."""
    metrics, gate, tracing = Metrics(), Admission(2, 64), Tracing("http://127.0.0.1:9")
    token, rng = Session.read(b"").token(range(100)), np.random.default_rng(0)
    vectors = rng.normal(size=(1_000, 64)).astype(np.float16)
    pool = Candidates(rng.normal(size=1_000), rng.integers(1, 300, 1_000), vectors)

    def watched() -> None:
        metrics.answered("GetFeed", Level.FULL, "", STAGES)
        metrics.ended("GetFeed", "OK", 0.008)

    def admitted() -> None:
        gate.enter(Deadline.after(1.0))
        gate.leave(computed=True)

    def slate(by: str) -> Callable[[], object]:
        config = ArrangeConfig(diversity_by=by)
        return lambda: arrange(pool, config, 10, np.random.default_rng(1))

    found = {
        "admission": cpu_us(admitted, 5_000),
        "metrics of six stages": cpu_us(watched, 2_000),
        "page token of 100 videos": cpu_us(lambda: Session.read(token).token(range(10)), 5_000),
        "trace of six stages, when on": cpu_us(lambda: tracing.call("GetFeed", (), 0.008, "OK", {}, STAGES), 200),
        "slate of 10 of 1,000, mmr": cpu_us(slate(MMR), 50),
        "slate of 10 of 1,000, ssd": cpu_us(slate(SSD), 50),
    }
    tracing.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments, console = parser.parse_args(), Console()
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # nobody collects these
    machine = describe_at_rest(("numpy", "prometheus_client", "opentelemetry-sdk"), console)
    found = measure()
    table = Table("a page", "CPU us")
    for name, us in found.items():
        table.add_row(name, f"{us:,.1f}")
    console.print(table)
    console.print(line(machine))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"cpu_us": found, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
