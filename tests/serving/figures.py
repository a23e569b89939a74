"""Figures of the long tests: printed, and merged into the file that RELIABILITY_JSON names."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.machine import describe


def keep(name: str, figures: dict[str, Any]) -> None:
    """One entry a test, with the machine it ran on and its load at that moment."""
    entry = {name: {**figures, "machine": describe(("grpcio", "torch", "faiss-cpu"))}}
    sys.stdout.write(json.dumps(entry, indent=2) + "\n")
    if path := os.environ.get("RELIABILITY_JSON"):
        known = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(dict(sorted({**known, **entry}.items())), indent=2) + "\n")
