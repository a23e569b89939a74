"""The loop closed: a server's own log judges feeds that it did not serve, and the world says whether that is true.

    python -m benchmarks.closed_loop --run RUN --logs 20 --json docs/benchmarks/closed-loop.json

RUN is a folder that `reelrank demo --scale SCALE` made. Two more bundles are made from it: one whose ranker was trained
with another seed, and one that wants clicks and nothing else. Then, for every log: a server with the run's own bundle
answers the world's people over gRPC and logs what they do; `export_events` writes the log; replay estimates what both
feeds would have earned on it (`feed:VERSION`: their own rules and exploration); and the world says what they are
truly worth: slates drawn from each feed on the same requests, and the exact chances of what they would earn.

What is estimated is a feed's ranking of what the server's sampler could have shown, for users with the histories they
had: not what it would retrieve, and not what users would become under it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe, line
from features.artifacts import Registry
from pipelines.cluster import ClusterConfig, cluster
from pipelines.console import Stage
from pipelines.recipes import recipe
from pipelines.replay import replay
from pipelines.replay.bundle import FEED, BundlePolicy
from pipelines.replay.histories import Histories
from pipelines.replay.log import CanonicalLog, Window
from pipelines.replay.policies import LoggedRequests, Valued
from pipelines.show import served
from pipelines.stages import train_model
from pipelines.workspace import Workspace
from pipelines.world import World, read_config
from pipelines.world.truth import true_values
from pipelines.world.viewers import Visits, visit
from ranking.freeze import freeze
from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.config import FeedConfig
from serving.export import export_events
from serving.golden import NAME as GOLDEN
from serving.golden import record
from serving.messages import FeedResponse

METRIC = "long_view"
PACKAGES = ("numpy", "polars", "torch")
DRAWS = 4
"""Slates a request that a true value is the mean of: what is left of their chance is a tenth of an interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What one log says of one feed, and the truth."""

    log: int
    feed: str
    truth: float
    estimate: float
    low: float
    high: float
    effective: float
    refused: bool
    max_weight: float

    @property
    def covered(self) -> bool:
        """The truth lies in the interval."""
        return self.low <= self.truth <= self.high


def publish_variant(registry: Path, version: str, feed: FeedConfig | None = None, ranker: Path | None = None) -> str:
    """The live bundle with another configuration or another ranker under a name of its own; LIVE stays."""
    known = Registry(registry)
    live, staged = known.open(None), known.stage()
    shutil.copytree(live.folder, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.*", GOLDEN))
    if feed is not None:
        (staged / "feed.json").write_text(feed.to_json())
    if ranker is not None:
        shutil.rmtree(staged / "ranker")
        shutil.copytree(ranker, staged / "ranker")
    record(staged, n=4)
    return known.publish(staged, version=version, meta={})


def wants_clicks(feed: FeedConfig) -> FeedConfig:
    """Clicks and nothing else: what clickbait is made for."""
    return replace(feed, value=replace(feed.value, version="clicks", weights=(("click", 1.0),), watch_per_s=0.0))


def train_another(run: Path, out: Path) -> Path:
    """The run's ranker trained anew with another seed, frozen as bundles have it."""
    known = Workspace.open(run)
    if (out / "recipe.json").exists() and (done := Workspace.open(out).frozen_ranker).exists():
        return done
    changes = ("ranker_train.seed=2",)
    ws = Workspace.create(out, recipe(known.recipe.name, changes), changes)
    ws.dataset_dir.symlink_to(known.dataset_dir.absolute())
    with cluster(ClusterConfig()):
        train_model(ws, "ranker", Stage("train"))
    freeze(ws.ranker, ws.frozen_ranker, ws.recipe.tables)
    return ws.frozen_ranker


def write_log(ws: Workspace, world: World, visits: Visits, folder: Path) -> list[FeedResponse]:
    """Serve everybody's visits and export the server's log to `folder`; the pages as they were answered."""
    folder.mkdir(parents=True)
    store = folder / "live.sqlite"
    with served(ws, store) as address, FeedClient(address, timeout_s=10) as client:
        pages = visit(world, client, visits)
    export_events(store, folder)
    return pages


class Once:
    """A policy that ranks a log of one part once, for the replay and for the truth."""

    def __init__(self, policy: BundlePolicy) -> None:
        self.name, self._policy = policy.name, policy
        self._valued: Valued | None = None

    def values(self, requests: LoggedRequests) -> Valued:
        """The policy's, of the first call."""
        if self._valued is None:
            self._valued = self._policy.values(requests)
        return self._valued


def judge(world: World, folder: Path, registry: Path, feeds: tuple[str, ...], log: int, slots: int) -> list[Judged]:
    """Replay the log for every feed, and ask the world."""
    window = Window(slots=slots)
    history = CanonicalLog(folder, (METRIC,), window).history
    histories, bundles = Histories(history.log), [FeedBundle.load(Registry(registry).open(feed)) for feed in feeds]
    policies = [Once(BundlePolicy(bundle, histories, history.start_ms, kind=FEED)) for bundle in bundles]
    report = replay(folder, policies, metrics=(METRIC,), slots=slots, resamples=400, seed=log)
    truth = true_values(world, folder, policies, METRIC, window=window, draws=DRAWS)
    rows = []
    for feed, result in zip(feeds, report.policies[1:], strict=True):
        found, d = result.metrics[METRIC][report.estimator], result.diagnostics
        rows.append(
            Judged(
                log=log, feed=feed, truth=truth[result.policy], estimate=found.value.estimate, low=found.value.low,
                high=found.value.high, effective=d.effective_sample_size, refused=bool(result.refused),
                max_weight=d.max_weight,
            )
        )  # fmt: skip
    return rows


def tabled(rows: list[Judged], title: str) -> Table:
    """One row a feed over all logs: how often the truth of the log's own requests lies in the interval, and how often
    the mean of all logs' truths does, which a resampling of users speaks of."""
    table = Table(title=title)
    for column in (
        "feed",
        "truth",
        "mean error",
        "spread",
        "interval",
        "covered",
        "its mean",
        "ESS",
        "max w",
        "refused",
    ):
        table.add_column(column, justify="left" if column == "feed" else "right")
    for feed in dict.fromkeys(row.feed for row in rows):
        mine = [row for row in rows if row.feed == feed]
        error = np.array([row.estimate - row.truth for row in mine])
        width, mean = np.mean([row.high - row.low for row in mine]), np.mean([row.truth for row in mine])
        table.add_row(
            feed, f"{mean:.4f}", f"{error.mean():+.4f}", f"{error.std():.4f}",
            f"+-{width / 2:.4f}", f"{sum(r.covered for r in mine)}/{len(mine)}",
            f"{sum(r.low <= mean <= r.high for r in mine)}/{len(mine)}",
            f"{np.mean([r.effective for r in mine]):,.0f}", f"{max(r.max_weight for r in mine):.1f}",
            f"{sum(r.refused for r in mine)}/{len(mine)}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="What `reelrank demo` made.")
    parser.add_argument("--logs", type=int, default=20)
    parser.add_argument("--visits", type=int, default=4, help="A viewer and log.")
    parser.add_argument("--slots", type=int, default=2, help="Judge the first slots of a page.")
    parser.add_argument("--temperature", type=float, help="Of all feeds' exploration. Default: the bundle's own.")
    parser.add_argument("--work", type=Path, help="Keep the second ranker here, and use the one that is here.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, ws = Console(width=140), Workspace.open(arguments.run)
    world = World(read_config(ws.root / "raw" / "world.json"))
    rows, began_s = [], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        registry = Path(scratch) / "registry"  # the run's own stays as it is
        shutil.copytree(ws.registry, registry)
        feed = FeedConfig.from_json(Registry(registry).open(None).path("feed.json").read_text())
        if arguments.temperature is not None:
            feed = replace(feed, arrange=replace(feed.arrange, temperature=arguments.temperature))
            Registry(registry).set_live(publish_variant(registry, "explores", feed=feed))
        live, ws = Registry(registry).live(), Workspace.open(ws.root, registry)
        another = train_another(ws.root, (arguments.work or Path(scratch)) / "another")
        feeds = (publish_variant(registry, "clicks", feed=wants_clicks(feed)),
                 publish_variant(registry, "another-seed", ranker=another))  # fmt: skip
        for log in range(arguments.logs):
            folder = Path(scratch) / f"log-{log}"
            visits = Visits(viewers=world.config.n_users, each=arguments.visits, seed=log)
            pages = write_log(ws, world, visits, folder)
            rows += judge(world, folder, registry, feeds, log, arguments.slots)
            shutil.rmtree(folder)
            told = ", ".join(
                f"{r.feed} {r.estimate:.4f} [{r.low:.4f}, {r.high:.4f}] {r.truth:.4f}" for r in rows[-len(feeds) :]
            )
            console.print(f"log {log}: {len(pages):,} pages; {told}", highlight=False)
            _write(arguments.json, {"pages_a_log": len(pages), "arrange": asdict(feed.arrange), "rows": rows}, began_s)
    title = (
        f"{arguments.logs} logs of {len(pages):,} pages by a server of {live}, {METRIC} a shown video, "
        f"first {arguments.slots} slots; snrips@100"
    )
    console.print(tabled(rows, title))
    console.print(line(describe(PACKAGES)))


def _write(path: Path | None, found: dict, began_s: float) -> None:
    """After each log: a run of an hour that is stopped has not been for nothing."""
    if path is None:
        return
    rows = [asdict(row) | {"covered": row.covered} for row in found["rows"]]
    told = {"machine": describe(PACKAGES), "seconds": time.monotonic() - began_s, **found, "rows": rows}
    path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
