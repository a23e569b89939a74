"""The gate: a candidate is published only if every rule holds; each rule says both numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from pipelines.evaluate_retrieval import popularity_recall, tower_recall
from pipelines.recipes import GateConfig


class GateError(Exception):
    """A candidate was refused; the message lists the rules it broke, with both numbers."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule's outcome."""

    rule: str
    candidate: float | None
    bound: float | None
    """What the candidate was held against."""
    live: float | None
    """The live bundle's figure on the same days, where there is one."""
    passed: bool


def judge(metrics: dict, live: dict | None, config: GateConfig) -> list[Verdict]:
    """Hold a candidate's metrics (as `evaluate` writes them) against the configuration and the live bundle's metrics.

    The live bundle counts only when it was measured on the same data (equal fingerprints).
    """
    same_days = live is not None and live["fingerprint"] == metrics["fingerprint"]
    live = live if same_days else None
    return [*_retrieval(metrics, live, config), *_ranking(metrics, live, config)]


def passed(verdicts: list[Verdict]) -> bool:
    """True when every rule holds."""
    return all(v.passed for v in verdicts)


def to_rows(verdicts: list[Verdict]) -> list[dict]:
    """For the report and the manifest."""
    return [asdict(v) for v in verdicts]


def _retrieval(metrics: dict, live: dict | None, config: GateConfig) -> list[Verdict]:
    retrieval = metrics["retrieval"]
    k = retrieval["index_recall"]["k"]
    recall = tower_recall(retrieval, k)
    bound = popularity_recall(retrieval, k) * config.min_recall_over_popularity
    found = retrieval["index_recall"]["of_exact"]
    verdicts = [
        Verdict(f"two-tower recall@{k} above {config.min_recall_over_popularity:g} x popularity", recall, bound, None,
                recall > bound),
        Verdict(f"index returns the exact top {k}", found, config.min_index_recall, None,
                found >= config.min_index_recall),
    ]  # fmt: skip
    if live is not None:
        verdicts.append(
            _not_worse(f"recall@{k} against the live bundle", recall, tower_recall(live["retrieval"], k), config)
        )
    return verdicts


def _ranking(metrics: dict, live: dict | None, config: GateConfig) -> list[Verdict]:
    verdicts = []
    measured = [row for row in metrics["ranking"] if "auc" in row and row["positives"] >= config.min_positives]
    for row in measured:
        slack = max(config.max_calibration_error, row["calibration_two_se"])
        off = abs(row["calibration"] - 1.0)
        verdicts.append(Verdict(f"{row['task']}: calibration within {slack:.2f} of 1", row["calibration"],
                                1.0, None, off <= slack))  # fmt: skip
        verdicts.append(Verdict(f"{row['task']}: better than chance", row["auc"], 0.5, None,
                                row["auc"] > 0.5 and math.isfinite(row["auc"])))  # fmt: skip
    if live is not None:
        before = {row["task"]: row["auc"] for row in live["ranking"] if "auc" in row}
        verdicts += [
            _not_worse(f"{row['task']}: AUC against the live bundle", row["auc"], before[row["task"]], config)
            for row in measured
            if row["task"] in before
        ]
    return verdicts


def _not_worse(rule: str, candidate: float, live: float, config: GateConfig) -> Verdict:
    bound = live * (1.0 - config.max_drop)
    return Verdict(rule, candidate, bound, live, candidate >= bound)
