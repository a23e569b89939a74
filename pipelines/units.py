"""Sizes as people type them: 300e6 or 300M videos, 24GiB, 5ms."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
BYTES = {"": 1.0, "B": 1.0}
BYTES |= {f"{letter}B": 1000.0**power for power, letter in enumerate("kMGT", start=1)}
BYTES |= {f"{letter}iB": 1024.0**power for power, letter in enumerate("KMGT", start=1)}
MILLISECONDS = {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3}


def parse(text: str, units: dict[str, float], option: str) -> float:
    """`text` in the base of `units`; raises ValueError naming the option, what it got and what it takes."""
    match = _NUMBER.fullmatch(text)
    unit = match.group(2) if match else None
    if match is None or unit not in units:
        known = ", ".join(name for name in units if name)
        raise ValueError(f"{option} {text!r}: give a number above 0, with a unit of {known} or none")
    value = float(match.group(1).replace(",", "").replace("_", "")) * units[unit]
    if not 0 < value < float("inf"):
        raise ValueError(f"{option} {text!r}: give a number above 0")
    return value
