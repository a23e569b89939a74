"""The gate: a candidate is published only if every rule holds; each rule says both numbers.

`config` holds the thresholds and their reasons, `judge` the order of the rules. Both bundles are asked the same
questions by the same code (`sides`), and differences are resampled over users (`paired`).
"""

from pipelines.gate.config import GateConfig
from pipelines.gate.verdict import GateError, Verdict, passed, refusal, to_rows

__all__ = ["GateConfig", "GateError", "Verdict", "passed", "refusal", "to_rows"]
