"""Train, serve, replay: a live server's own log through replay gives the values, odds and slates the server gave."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.closed_loop import judge, publish_variant, wants_clicks, write_log
from features.artifacts import Registry
from features.schema import EVENTS
from pipelines.replay import replay
from pipelines.replay.bundle import FEED, BundlePolicy, factories
from pipelines.replay.histories import Histories
from pipelines.replay.judge import checked_values
from pipelines.replay.log import CanonicalLog, Window
from pipelines.replay.policies import Valued
from pipelines.replay.sampling import Sampler
from pipelines.replay.slates import Shard
from pipelines.show import served
from pipelines.workspace import Workspace
from pipelines.world import World, read_config
from pipelines.world.viewers import Visits, visit
from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.config import FeedConfig
from serving.export import export_events
from serving.messages import FeedResponse, Level, RankedResponse

VISITS = Visits(viewers=40, each=3, page_size=6)


@dataclass(frozen=True)
class Loop:
    """What a server answered over gRPC, and the same log as replay reads and values it."""

    folder: Path
    registry: Path
    world: World
    pages: dict[str, FeedResponse]
    ranked: list[RankedResponse]
    """What the Rank call says of the first requests' candidates."""
    shard: Shard
    valued: Valued

    def items(self, field: str) -> np.ndarray:
        """One field of everything that was served, in the order of the log's rows."""
        asked = [self.pages[request] for request in self.shard.requests.request_id]
        return np.array([getattr(item, field) for page in asked for item in page.items])


@pytest.fixture(scope="module")
def loop(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    ws, folder = Workspace.open(demo), tmp_path_factory.mktemp("loop") / "log"
    world = World(read_config(demo / "raw" / "world.json"))
    folder.mkdir()
    with served(ws, folder / "live.sqlite") as address, FeedClient(address, timeout_s=10) as client:
        pages = visit(world, client, VISITS)
        export_events(folder / "live.sqlite", folder)
        log = CanonicalLog(folder, ("long_view",), Window())
        (shard,) = log.shards()
        ranked = [
            client.rank(user, videos.tolist(), surface="feed", now_ms=ts_ms)
            for user, ts_ms, videos in zip(
                shard.requests.user_id[:20].tolist(),
                shard.requests.ts_ms[:20].tolist(),
                np.split(shard.requests.video_ids, shard.requests.offsets[1:21]),
                strict=False,
            )
        ]
    bundle = FeedBundle.load(Registry(ws.registry).open(None))
    valued = checked_values(
        BundlePolicy(bundle, Histories(log.history.log), log.history.start_ms, kind=FEED), shard.requests
    )
    return Loop(folder, ws.registry, world, {page.request_id: page for page in pages}, ranked, shard, valued)


def test_every_page_is_in_the_log_with_what_it_was_drawn_from(loop: Loop):
    assert len(loop.pages) == VISITS.viewers * VISITS.each
    assert {page.level for page in loop.pages.values()} == {Level.FULL}
    assert len(loop.shard.slates.slot) == len(loop.pages) * VISITS.page_size
    assert loop.shard.requests.video_ids[loop.shard.slates.candidate].tolist() == loop.items("video_id").tolist()
    assert pl.read_parquet(loop.folder / "not_judged.parquet").height == 0
    assert np.diff(loop.shard.requests.offsets).min() > VISITS.page_size


def test_replay_gives_the_scores_and_values_that_the_server_explained_its_items_by(loop: Loop):
    shown = loop.shard.slates.candidate
    assert np.ptp(loop.valued.values_C) > 0
    np.testing.assert_allclose(loop.valued.values_C[shown], loop.items("value"), atol=1e-5)
    tasks = next(iter(loop.pages.values())).tasks
    for t, task in enumerate(tasks):
        served = [scores[t] for scores in loop.items("scores")]
        np.testing.assert_allclose(loop.valued.predicted[task][shown], served, rtol=1e-4, atol=1e-6)
    watch_s = loop.items("predicted_watch_ms") / 1000
    np.testing.assert_allclose(loop.valued.predicted["watch_s"][shown], watch_s, rtol=1e-4)


def test_replay_and_the_rank_call_value_the_same_candidates_alike(loop: Loop):
    live = np.concatenate([ranked.value_N for ranked in loop.ranked])
    np.testing.assert_allclose(loop.valued.values_C[: len(live)], live, rtol=1e-5, atol=1e-7)
    chances = np.concatenate([r.probability_NT[:, r.tasks.index("long_view")] for r in loop.ranked])
    np.testing.assert_allclose(loop.valued.predicted["long_view"][: len(live)], chances, rtol=1e-5)


def test_replay_sees_the_history_that_the_server_saw(loop: Loop):
    """Later visits depend on the feedback to earlier ones: without it, the values are others."""
    bundle = FeedBundle.load(Registry(loop.registry).open(None))
    nothing = Histories(pl.DataFrame(schema=dict.fromkeys(EVENTS.names, pl.Int64)).lazy())
    forgotten = checked_values(
        BundlePolicy(bundle, nothing, int(loop.shard.requests.ts_ms.min()), kind=FEED), loop.shard.requests
    ).values_C
    first = np.array([name.endswith("-0") for name in loop.shard.requests.request_id])
    first_C = first[loop.shard.requests.request_of_candidate()]
    np.testing.assert_array_equal(forgotten[first_C], loop.valued.values_C[first_C])
    assert np.abs(forgotten - loop.valued.values_C)[~first_C].max() > 1e-3


def test_the_servers_own_bundle_shows_every_video_with_the_odds_it_was_shown_with(loop: Loop):
    law = loop.valued.law_by(Sampler())
    found = law.conditional(loop.shard.requests, loop.shard.slates)
    np.testing.assert_allclose(found.probability, loop.shard.slates.logged, rtol=1e-4)
    assert loop.shard.slates.logged.tolist() == loop.items("propensity").tolist()
    assert np.ptp(loop.shard.slates.logged) > 0.1


def test_the_same_random_numbers_draw_the_slates_that_were_served(loop: Loop):
    drawn = loop.valued.law_by(Sampler()).draw(loop.shard.requests, loop.shard.slates)
    assert drawn.tolist() == loop.shard.slates.candidate.tolist()
    others = loop.valued.law_by(Sampler()).draw(loop.shard.requests, loop.shard.slates, salt=1)
    assert (drawn == others).mean() < 0.9


def test_the_servers_own_bundle_has_weight_1_and_earns_what_was_logged(loop: Loop):
    policies, makers = ["feed:live", "bundle:live"], factories(loop.registry)
    report = replay(loop.folder, policies, metrics=["long_view"], resamples=50, factories=makers)
    logged, own, by_sampler = report.policies
    assert report.not_judged == {}
    assert own.diagnostics.mean_weight == pytest.approx(1, abs=1e-4)
    assert own.diagnostics.max_weight == pytest.approx(1, abs=1e-3)
    assert own.diagnostics.effective_sample_size == pytest.approx(len(loop.shard.slates.slot), rel=1e-4)
    mean = logged.metrics["long_view"]["logged"].value.estimate
    for name in ("snrips", "rips", "sips", "ips"):
        assert own.metrics["long_view"][name].value.estimate == pytest.approx(mean, abs=1e-4), name
    assert by_sampler.diagnostics.max_weight > 2, "the run's sampler is not the feed's"


def test_a_log_judges_a_feed_that_did_not_serve_it(loop: Loop, tmp_path: Path):
    """The whole way on few pages; the intervals against the truth are `benchmarks.closed_loop`, and below."""
    (row,) = judged_clicks(loop.world, loop.folder, loop.registry, tmp_path / "registry")
    assert row.effective < len(loop.pages) * 2
    assert 0 < row.truth < 1
    assert row.low < row.estimate < row.high
    assert abs(row.estimate - row.truth) < 5 * (row.high - row.low) / 4


@pytest.mark.slow
def test_the_true_value_of_another_feed_lies_in_the_interval_of_the_servers_log(demo: Path, tmp_path: Path):
    ws, world = Workspace.open(demo), World(read_config(demo / "raw" / "world.json"))
    write_log(ws, world, Visits(viewers=400, each=5, seed=1), tmp_path / "log")
    (row,) = judged_clicks(world, tmp_path / "log", ws.registry, tmp_path / "registry")
    assert not row.refused
    assert row.low < row.truth < row.high


def judged_clicks(world: World, folder: Path, published: Path, registry: Path) -> list:
    """A copy of the registry with a second bundle in it, judged on the log."""
    shutil.copytree(published, registry)
    feed = FeedConfig.from_json(Registry(registry).open(None).path("feed.json").read_text())
    publish_variant(registry, "clicks", feed=wants_clicks(feed))
    return judge(world, folder, registry, ("clicks",), log=0, slots=2)
