"""The whole day: raw logs in, a live bundle out.

ingest -> examples -> train both models -> embed and index -> evaluate -> gate -> publish
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from pipelines import stages
from pipelines.adapters import Adapter
from pipelines.cluster import ClusterConfig, cluster
from pipelines.console import Stages
from pipelines.gate import to_rows
from pipelines.publish import publish
from pipelines.workspace import Workspace

REPORTED = ("torch", "torchrec", "fbgemm-gpu-cpu", "faiss-cpu", "ray", "pyarrow", "numpy", "grpcio")


def run(
    ws: Workspace, adapter: Adapter, shown: Stages, *, force: bool = False, oracle: stages.Oracle | None = None
) -> dict:
    """Every stage in order; returns (and writes to `run.json`) what the report shows."""
    with cluster(ClusterConfig()):  # one Ray for both: starting it takes seconds
        with shown.stage("ingest") as stage:
            stages.ingest(ws, adapter, stage)
        with shown.stage("examples") as stage:
            stages.examples(ws, stage)
        with shown.stage("train") as stage:
            stages.train_models(ws, stage)
    with shown.stage("embed and index") as stage:
        stages.index(ws, stage)
    with shown.stage("evaluate") as stage:
        metrics = stages.evaluate(ws, stage, oracle)
    with shown.stage("gate and publish") as stage:
        bundle, verdicts = publish(ws, stage, force=force)
    record = {
        "title": f"reelrank: {ws.recipe.name}",
        "created": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": machine(),
        "versions": {name: version(name) for name in REPORTED if _installed(name)},
        "bundle": bundle,
        "stages": shown.records(),
        "split": metrics["split"],
        "retrieval": metrics["retrieval"]["rows"],
        "retrieval_note": _retrieval_note(metrics["retrieval"]),
        "pools": metrics["channels"]["pools"],
        "channels": metrics["channels"]["rows"],
        "ranking": metrics["ranking"],
        "primary": metrics["primary"],
        "slices": metrics["slices"],
        "slots": metrics["slots"],
        "watch": metrics["watch"],
        "collisions": metrics["collisions"],
        "reliability": metrics["reliability"],
        "gate": to_rows(verdicts),
    }
    save(ws.root, record)
    return record


def save(folder: Path, record: dict) -> None:
    """Write `run.json`."""
    (folder / "run.json").write_text(json.dumps(record, indent=1))


def machine() -> dict:
    """Where the figures were taken."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(psutil.Process().cpu_affinity()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _retrieval_note(retrieval: dict) -> str:
    found, through = retrieval["index_recall"], retrieval["through_index"]
    k = found["k"]
    return (
        f"{retrieval['queries']:,} queries (a user on a test day) for unseen {retrieval['signal']} among "
        f"{retrieval['catalogue']:,} videos. The index returns {found['of_exact']:.1%} of the exact top {k}; on its "
        f"{found['queries']} queries recall@{k} through it is {through[f'recall@{k}']:.4f}."
    )


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True
