"""The batch commands: `run`, and its stages one at a time. Heavy imports happen inside, so that `--help` answers at
once.

A stage that is asked for by name runs, whatever its record says, and leaves the same record as in a run: `reelrank
ingest` and then `reelrank run` ingests once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.day import Day

Run = Annotated[Path, typer.Option("--run", help="The run's folder.", show_default=False)]
Registry = Annotated[
    Path | None, typer.Option("--registry", help="Where bundles are published. Default: RUN/registry.")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A named recipe; `reelrank recipes` lists them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one field of the recipe, e.g. --set ranker_train.epochs=3. Repeatable."),
]
Data = Annotated[
    Path,
    typer.Option("--data", help="A folder of KuaiRand's CSV files or of canonical tables, or a mapping file (.toml)."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Force = Annotated[bool, typer.Option("--force", help="Publish although the gate refuses; noted in the manifest.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", help="A running cluster: auto or HOST:6379. Default: this machine.")
]


def run(
    recipe: RecipeName,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE.")] = None,
    registry: Registry = None,
    overrides: Overrides = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", help="Train on from the live bundle with the days from YYYY-MM-DD on, instead of from nothing."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Run this stage and all behind it, even when nothing has changed."),
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage alone, on what is there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and why; touch nothing.")] = False,
    ray_address: RayAddress = None,
    force: Force = False,
    report_json: Annotated[
        Path | None, typer.Option("--report-json", help="Also write RUN/run.json, the run's report, here.")
    ] = None,
    feed_users: Annotated[int, typer.Option(help="Then serve the bundle and fetch a feed for this many users.")] = 3,
) -> None:
    """The whole day on real logs: ingest, examples, train both models, index, evaluate, gate and publish.

    A stage is skipped when it is done already: same inputs and configuration by content, outputs undamaged. So the same
    command goes on after a crash, and after a change does again what hangs on it. docs/running.md says more.
    """
    from pipelines.adapters.detect import open_adapter
    from pipelines.cluster import ClusterConfig
    from pipelines.console import Stages, output
    from pipelines.day import Day
    from pipelines.execute import log_hashes
    from pipelines.plan import Selection, plan, print_plan
    from pipelines.recipes import recipe as recipe_named
    from pipelines.run import RunReport
    from pipelines.run import run as run_day
    from pipelines.show import fetch_feeds, finish
    from pipelines.workspace import Workspace

    folder, changes = out or Path("runs") / recipe, tuple(overrides or ())

    def asked() -> tuple[Day, Selection]:
        """Whatever is wrong with the command shows before anything is made."""
        ws = Workspace.planned(folder, recipe_named(recipe, changes), registry)
        where = ClusterConfig(address=ray_address)
        day = Day(ws=ws, adapter=open_adapter(data), where=where, since=_date(since), force=force)
        return day, Selection(start=start, only=(only,) if only is not None else ())

    if dry_run:
        day, selection = asked()
        print_plan(plan(day, log_hashes(day), selection), output())
        return
    shown = Stages()
    report = RunReport(shown, folder / "run.json", report_json)
    with report.guarded():
        day, selection = asked()
        with day.ws.locked():
            ws = Workspace.create(folder, day.ws.recipe, changes, registry)
            if run_day(day, shown, report, selection):
                fetch_feeds(ws, report.record, shown, feed_users)
            report.save()
            finish(ws, report.record)


def ingest(
    data: Data,
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option("--run", help="Folder of the run. Default: runs/RECIPE.")] = None,
    overrides: Overrides = None,
    ray_address: RayAddress = None,
) -> None:
    """Read, validate and encode logs; bad rows are quarantined and counted. Starts a run folder."""
    from pipelines.adapters.detect import open_adapter
    from pipelines.cluster import ClusterConfig
    from pipelines.day import Day
    from pipelines.recipes import recipe as recipe_named
    from pipelines.workspace import Workspace

    changes = tuple(overrides or ())
    chosen, adapter = recipe_named(recipe, changes), open_adapter(data)
    ws = Workspace.create(out or Path("runs") / recipe, chosen, changes)
    _execute(Day(ws=ws, adapter=adapter, where=ClusterConfig(address=ray_address)), "ingest", "examples")


def train(
    run: Run,
    model: Annotated[str, typer.Option(help="towers, ranker or both.")] = "both",
    ray_address: RayAddress = None,
) -> None:
    """Train under Ray Train, sharded by TorchRec's planner; continues where a killed run stopped."""
    if model not in ("towers", "ranker", "both"):
        raise typer.BadParameter(f"--model {model}: give towers, ranker or both")
    names = ("towers", "ranker") if model == "both" else (model,)
    _execute(_opened(run, ray_address=ray_address), *(f"train-{name}" for name in names))


def index_build(run: Run, device: Device = "cpu", ray_address: RayAddress = None) -> None:
    """Embed the corpus with the video tower and build the FAISS index."""
    _execute(_opened(run, device=device, ray_address=ray_address), "index")


def evaluate(run: Run) -> None:
    """Measure retrieval and ranking on the test days, beside their baselines."""
    import json

    from pipelines.show import print_metrics

    day = _opened(run)
    _execute(day, "evaluate")
    print_metrics(json.loads(day.ws.metrics.read_text()))


def publish(
    run: Run, registry: Registry = None, force: Force = False, device: Device = "cpu", ray_address: RayAddress = None
) -> None:
    """Hold the run against the gate, write the bundle, and make it live."""
    _execute(_opened(run, registry, force=force, device=device, ray_address=ray_address), "publish")


def _date(since: str | None) -> str | None:
    from datetime import date

    try:
        return None if since is None else date.fromisoformat(since).isoformat()
    except ValueError as error:
        raise ValueError(f"--since {since}: give a date as YYYY-MM-DD") from error


def _opened(
    run: Path,
    registry: Path | None = None,
    *,
    force: bool = False,
    device: str = "cpu",
    ray_address: str | None = None,
) -> Day:
    from candidate_gen.index.device import resolve
    from pipelines.cluster import ClusterConfig
    from pipelines.day import Day
    from pipelines.workspace import Workspace

    where, on = ClusterConfig(address=ray_address), resolve(device)
    return Day(ws=Workspace.open(run, registry), where=where, force=force, device=on)


def _execute(day: Day, *names: str) -> None:
    from pipelines.console import Stages
    from pipelines.execute import execute
    from pipelines.plan import Selection

    with day.ws.locked():
        execute(day, Stages(), Selection(only=names))
