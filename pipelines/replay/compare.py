"""Two reports of one log, side by side: every policy of both, and the paired differences between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from pipelines.replay.bootstrap import interval, paired
from pipelines.replay.report import read_report, shown


class NotComparableError(ValueError):
    """The two reports answer different questions; says which part differs. The CLI ends with exit code 3."""


def compare(first: Path, second: Path) -> Table:
    """A row a policy of either report and metric: its estimate, and for the second's policies the difference to the
    first's policy of that name (or to its last one), resample by resample.

    Raises NotComparableError when data, window, estimator, seed or resamples differ: the numbers would not be of the
    same rows, or not paired.
    """
    a, b = read_report(first), read_report(second)
    _refuse_different(a, b, first, second)
    metrics = [metric for metric in a["metrics"] if metric in b["metrics"]]
    table = Table(title=f"{first} (A) against {second} (B); {a['estimator']}", box=SIMPLE, pad_edge=False)
    for name in ("metric", "policy of B", "less policy of A"):
        table.add_column(name, no_wrap=True)
    for name in ("A [95%]", "B [95%]", "B less A [95%]"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric in metrics:
        for policy in b["policies"]:
            base = _partner(policy, a["policies"])
            table.add_row(metric, policy["policy"], base["policy"], *_numbers(base, policy, metric))
    return table


def _refuse_different(a: dict[str, Any], b: dict[str, Any], first: Path, second: Path) -> None:
    for name in ("data_fingerprint", "slots", "days", "seed", "resamples"):
        x, y = a["provenance"][name], b["provenance"][name]
        if x != y:
            short = [str(v)[:16] for v in (x, y)]
            raise NotComparableError(
                f"refused to compare: {name} is {short[0]} in {first} and {short[1]} in {second}; replay both policies "
                "on the same log, window and seed"
            )
    if a["estimator"] != b["estimator"]:
        raise NotComparableError(
            f"refused to compare: {first} is headed by {a['estimator']}, {second} by {b['estimator']}"
        )
    if not set(a["metrics"]) & set(b["metrics"]):
        raise NotComparableError(f"refused to compare: {first} and {second} have no metric in common")


def _partner(policy: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    return next((p for p in others if p["policy"] == policy["policy"]), others[-1])


def _numbers(base: dict[str, Any], policy: dict[str, Any], metric: str) -> tuple[str, str, str]:
    """A's value, B's value, and B less A in the same resamples; a refused policy has no number to be quoted."""
    drawn = [np.array([np.nan if x is None else x for x in p["resampled"][metric]]) for p in (base, policy)]
    values = ["refused" if p["refused"] else shown(interval(d), 4) for p, d in zip((base, policy), drawn, strict=True)]
    answered = not (base["refused"] or policy["refused"])
    return values[0], values[1], shown(interval(paired(drawn[1], drawn[0])), 4, sign="+") if answered else ""
