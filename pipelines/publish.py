"""The last stage: lay the bundle out, judge the very files that would be published, publish them, make them live.

Nothing that was live changes before the last step, one rename: a refusal, a crash, a full disk or a faster publisher
leaves LIVE as it was, and what was staged is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.artifacts import Bundle, Registry
from features.dataset import Dataset
from features.durable import DiskError, disk_told
from pipelines.console import Stage
from pipelines.gate.judge import judge
from pipelines.gate.soundness import fit_rules
from pipelines.gate.verdict import GateError, Verdict, passed, refusal, to_rows
from pipelines.stages import canonical_table, embed_and_index
from pipelines.workspace import Workspace
from serving.bundle import write_bundle
from serving.golden import GoldenError, record


def publish(ws: Workspace, stage: Stage, *, force: bool = False, device: str = "cpu") -> tuple[str, list[Verdict]]:
    """Write the bundle with an index as of the log's end, judge it beside the live one, publish it and make it live;
    returns version and verdicts. `device`: of torch, trains and assigns the index's lists.

    Raises GateError when a rule fails, unless `force`: what was forced stands in the manifest, rules and figures.
    Raises DiskError when a disk takes no more, and LiveMovedError when another publisher changed LIVE meanwhile.
    """
    ws.require(ws.metrics, "reelrank evaluate")
    metrics, registry = json.loads(ws.metrics.read_text()), Registry(ws.registry)
    live = registry.open() if registry.live() is not None else None
    with _staged(registry) as staged:
        verdicts = _write_and_judge(ws, staged, metrics, live, stage, device)
        if not passed(verdicts) and not force:
            raise GateError(refusal(verdicts))
        meta = {
            "recipe": ws.recipe.name,
            "data": metrics["fingerprint"],
            "judged_against": live.version if live is not None else None,
            "gate": to_rows(verdicts),
            "forced": force,
            "forced_rules": [v.rule for v in verdicts if not v.passed],
        }
        version = registry.publish(staged, meta=meta)
    registry.set_live(version, if_live=live.version if live is not None else None)
    stage.note = f"{version} is live"
    stage.details += [f"forced past: {v.rule}" for v in verdicts if not v.passed]
    return version, verdicts


def _write_and_judge(
    ws: Workspace, staged: Path, metrics: dict, live: Bundle | None, stage: Stage, device: str
) -> list[Verdict]:
    dataset = ws.dataset()
    found_by_index = write_candidate(ws, dataset, staged, metrics, stage, device)
    fits = fit_rules(staged, dataset.encoder)
    if not passed(fits):
        raise GateError(refusal(fits, forceable=False))
    stage.progress("recording golden answers")
    try:
        record(staged, now_ms=int(dataset.examples.ts_ms.max()) + 1)
    except GoldenError as error:
        raise GateError(f"the gate refused this candidate, it does not answer requests: {error}") from error
    return fits + judge(ws, staged, metrics, found_by_index=found_by_index, live=live, tell=stage.progress)


def write_candidate(
    ws: Workspace, dataset: Dataset, staged: Path, metrics: dict, stage: Stage, device: str = "cpu"
) -> float:
    """Everything of the bundle but its golden answers; returns what share of users' exact top its index finds."""
    stage.progress("writing the bundle")
    folder = ws.root / "index-published"
    index, found_by_index = embed_and_index(ws, dataset, (), dataset.dates[-1:], folder, stage, device)
    popular_dates = dataset.dates if ws.recipe.popular_days is None else dataset.dates[-ws.recipe.popular_days :]
    write_bundle(
        staged,
        dataset,
        videos=canonical_table(ws.canonical, "videos"),
        towers_dir=ws.towers,
        ranker_dir=ws.frozen_ranker,
        index=index,
        feed_config=ws.recipe.feed,
        metrics=metrics,
        popular_examples=dataset.rows_on(popular_dates),
    )
    return found_by_index


@contextmanager
def _staged(registry: Registry) -> Iterator[Path]:
    """A staging folder that is gone afterwards, published or not: what a full disk holds is freed."""
    staged = registry.stage()
    try:
        with disk_told(registry.root):
            yield staged
    except DiskError as error:
        raise DiskError(f"{error}. Nothing was published; LIVE is still {registry.live()}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
