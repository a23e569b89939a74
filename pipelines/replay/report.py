"""A finished replay as data: what was asked, what was found, whether it may be believed; read and written as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.replay.bootstrap import Interval
from pipelines.replay.judge import PolicyResult
from pipelines.replay.keys import mix
from pipelines.replay.policies import Logged
from pipelines.replay.selfchecks import SelfCheck
from pipelines.replay.slates import Shard

SCHEMA_VERSION = 2
"""1 had estimates and diagnostics; 2 adds guardrails, slices, blocks, self-checks and resamples."""

MEND = "log more requests or explore more, judge fewer slots, or judge a policy closer to the logger"
"""What helps when a log cannot answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """A finished replay. `logged` is always the first policy."""

    estimator: str
    """The estimator of the head table and the verdict."""
    metrics: tuple[str, ...]
    policies: list[PolicyResult]
    verdict: str
    requests: int
    users: int
    rows: int
    first_ts_ms: int
    last_ts_ms: int
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Reasons by refused policy."""
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Broken guardrails by policy that would be shipped."""
    self_checks: list[SelfCheck] = field(default_factory=list)
    not_judged: dict[str, int] = field(default_factory=dict)
    """Requests of the window that the log itself says have no candidate set, by reason."""

    @property
    def exit_code(self) -> int:
        """0, or 3 when a policy was refused, a guardrail is broken or a self-check failed."""
        return 3 if self.refused or self.broken or not all(c.passed for c in self.self_checks) else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: numbers that do not exist are null."""
        return {key: _plain(value) for key, value in asdict(self).items()} | {"exit_code": self.exit_code}

    def write(self, path: str | Path) -> None:
        """Write `report.json`."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_report(path: str | Path) -> dict[str, Any]:
    """A written report as plain JSON; raises ValueError when it is none, or of another version."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); give what `reelrank replay --out` wrote") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version {version}, expected {SCHEMA_VERSION}: run the replay again")
    return report


class Fingerprint:
    """256 bits over requests, candidates, slots, propensities and rewards, the same in whatever order rows are read."""

    _LANES = 4

    def __init__(self) -> None:
        self._sums = np.zeros(self._LANES, dtype=np.uint64)

    def add(self, shard: Shard, metrics: tuple[str, ...]) -> None:
        requests, slates = shard.requests, shard.slates
        request_key = requests.keys()
        starts = requests.offsets[:-1]
        place = np.arange(len(requests.video_ids)) - np.repeat(starts, np.diff(requests.offsets))
        candidates = np.add.reduceat(mix(mix(requests.video_ids) ^ mix(place, 1)), starts)
        shown = request_key[slates.request] ^ mix(slates.slot, 2)
        shown = mix(shown ^ mix(requests.video_ids[slates.candidate], 3)) ^ slates.logged.view(np.uint64)
        for name in sorted(metrics):
            shown = mix(shown, 4) ^ np.ascontiguousarray(shard.rewards[name]).view(np.uint64)
        for lane in range(self._LANES):
            for part in (mix(request_key ^ candidates, 10 + lane), mix(shown, 20 + lane)):
                self._sums[lane : lane + 1] += part.sum(dtype=np.uint64)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return "".join(f"{int(s):016x}" for s in self._sums)


def verdict(results: list[PolicyResult], metrics: tuple[str, ...], head: str) -> str:
    """Plain words on the first metric, the one that decides, and on the guardrails that overrule it."""
    metric = metrics[0]
    others = [result for result in results if result.policy != Logged.name]
    if not others:
        return "Only the logged policy was asked for: nothing to compare."
    sentences, silent, refused = [], [], []
    for result in others:
        difference = result.metrics[metric][head].difference
        size = f"{shown(difference, 4, sign='+')} {metric} a shown video"
        if result.refused:
            refused.append(result.policy)
        elif difference.low > 0:
            sentences.append(f"{result.policy} would have been better than the logged policy: {size}.")
        elif difference.high < 0:
            sentences.append(f"{result.policy} would have been worse than the logged policy: {size}.")
        else:
            silent.append(result.policy)
        if result.broken:
            names = ", ".join(g.metric for g in result.broken)
            sentences.append(f"{result.policy} is refused, whatever {metric} says: it breaks the guardrail {names}.")
    if silent:
        sentences.append(f"No evidence of a difference from the logged policy for {', '.join(silent)}.")
    if refused:
        sentences.append(f"This log cannot say how {', '.join(refused)} would have done: {MEND}.")
    return " ".join(sentences)


def shown(interval: Interval, digits: int, sign: str = "") -> str:
    """`estimate [low, high]`."""
    low, middle, high = (f"{x:{sign}.{digits}f}" for x in (interval.low, interval.estimate, interval.high))
    return f"{middle} [{low}, {high}]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
