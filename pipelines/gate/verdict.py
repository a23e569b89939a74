"""What a rule found, and how a refusal reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


class GateError(Exception):
    """A candidate was refused; the message lists the rules it broke, with both numbers and where to look."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule's outcome."""

    rule: str
    candidate: float | None
    bound: float | None
    """What the candidate was held against."""
    live: float | None
    """The live bundle's figure of the same questions, where there is one."""
    passed: bool
    note: str = ""
    """How sure the figure is, or what it was taken of."""
    look_at: str = ""
    """Where a person who is refused by it looks first."""


def passed(verdicts: Iterable[Verdict]) -> bool:
    """True when every rule holds."""
    return all(v.passed for v in verdicts)


def to_rows(verdicts: Iterable[Verdict]) -> list[dict]:
    """For the report and the manifest: JSON has no NaN and knows nothing of numpy."""
    return [{name: _plain(value) for name, value in asdict(v).items()} for v in verdicts]


def refusal(verdicts: list[Verdict], *, forceable: bool = True) -> str:
    """What the person reads who is refused."""
    broken = [v for v in verdicts if not v.passed]
    lines = [f"the gate refused this candidate, {len(broken)} of {len(verdicts)} rules are broken:"]
    for v in broken:
        live = "" if v.live is None else f", live has {number(v.live)}"
        note = f" ({v.note})" if v.note else ""
        lines.append(f"  {v.rule}: found {number(v.candidate)}, wanted {number(v.bound)}{live}{note}")
        if v.look_at:
            lines.append(f"    look at {v.look_at}")
    lines.append(
        "`--force` publishes it anyway, and the manifest says so"
        if forceable
        else "`--force` does not help: such a bundle cannot answer"
    )
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    return float(value) if math.isfinite(value) else None


def number(value: float | None) -> str:
    """Four digits, none for what is whole."""
    if value is None:
        return "-"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4f}"
