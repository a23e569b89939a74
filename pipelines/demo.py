"""The whole funnel on a simulated world, from nothing to served feeds, a replay and a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.console import Stages, output
from pipelines.day import Day
from pipelines.recipes import recipe
from pipelines.replay import ReplayReport, print_report, replay
from pipelines.replay.bundle import factories
from pipelines.replay.sampling import Sampler
from pipelines.run import RunReport, run
from pipelines.show import fetch_feeds, finish
from pipelines.workspace import Workspace
from pipelines.world import SCALES, World, generate

REPLAY_SLOTS = 2
"""Weights multiply down the slate: on one day's log the first slots are what the data can answer."""
REPLAY_TEMPERATURE = 0.5
"""In spreads of a request's values: sharp enough to be a feed, soft enough for one day's log to answer."""


def run_demo(scale: str, out: Path) -> None:
    """Generate, run every stage, serve and fetch feeds, replay the last day's log, write the report."""
    if scale not in SCALES:
        raise ValueError(f"--scale {scale}: give one of {', '.join(SCALES)}")
    ws, shown = Workspace.create(out, recipe(f"world-{scale}")), Stages()
    report = RunReport(shown, ws.report)
    with report.guarded(), ws.locked():
        raw = ws.root / "raw"
        with shown.stage("generate") as stage:
            summary = generate(SCALES[scale], raw, on_progress=lambda *told: stage.progress(" ".join(map(str, told))))
            stage.rows = summary.n_events
            stage.note = f"{summary.n_users:,} users, {summary.n_videos:,} videos"
        world = World(SCALES[scale])

        def oracle(user_ids: np.ndarray, video_ids: np.ndarray, ts_ms: np.ndarray) -> dict[str, np.ndarray]:
            return world.oracle(user_ids, video_ids, ts_ms)

        run(Day(ws=ws, adapter=CanonicalAdapter(raw), oracle=oracle), shown, report)
        fetch_feeds(ws, report.record, shown, users=3)
        replayed = _replay(ws, shown)
        report.record["replay"] = replayed.to_dict()
        report.save()
        finish(ws, report.record)
    print_report(replayed, output())


def _replay(ws: Workspace, shown: Stages) -> ReplayReport:
    with shown.stage("replay") as stage:
        replayed = replay(
            ws.canonical,
            ["logged", "random", "popularity", "bundle:live"],
            days=1,
            slots=REPLAY_SLOTS,
            sampler=Sampler(temperature=REPLAY_TEMPERATURE),
            factories=factories(ws.registry, ws.root, stage.progress),
            on_progress=stage.progress,
        )
        replayed.write(ws.root / "replay.json")
        stage.rows = replayed.rows
        stage.note = f"{replayed.requests:,} logged requests, first {REPLAY_SLOTS} slots"
    return replayed
