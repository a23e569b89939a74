"""Who is watching decides what may be shown: no source, page or fallback ever breaks a limit, and none comes short."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from candidate_gen.blend import BlendConfig
from features.artifacts import Registry
from features.eligibility import Viewer
from features.schema import LIMITS
from pipelines.cli import app
from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.config import FeedConfig, FilterConfig
from serving.feed import Feed
from serving.messages import FeedRequest, Level
from serving.store import NoStore

sys.path.insert(0, str(Path(__file__).parents[1] / "features"))
from video_limits import HOUR_MS, may_be_shown, random_limits, random_viewer

sys.path.insert(0, str(Path(__file__).parent))
from servers import refused, running

CONFIG = FeedConfig(surfaces=("main", "search"), filters=FilterConfig(seen=False))


@pytest.fixture(scope="module")
def limited(world):
    """The world with limits of its videos."""
    videos = world.tables["videos"]
    limits = random_limits(np.random.default_rng(4), len(videos), world.now_ms, open_share=0.45)
    for name, column in limits.items():
        videos = videos.append_column(name, column)
    return replace(world, tables={**world.tables, "videos": videos})


@pytest.fixture(scope="module")
def bundle(limited) -> FeedBundle:
    return FeedBundle.open(limited.stage(CONFIG), "limited")


def showable(world, bundle: FeedBundle, user: int, viewer: Viewer, now_ms: int) -> dict[int, int]:
    """Author by id of every video that may be shown, from the tables alone."""
    known = viewer.or_else(bundle.config.filters.viewer)
    return {
        video["video_id"]: video["author_id"]
        for video in world.tables["videos"].to_pylist()
        if video["eligible"]
        and video["upload_ts_ms"] <= now_ms
        and video["author_id"] != user
        and may_be_shown(video, known, now_ms)
    }


class Broken:
    """A source that fails, so that the popular list answers."""

    name = "ann"

    def retrieve(self, query, k):
        raise RuntimeError("no index today")


@pytest.mark.parametrize("seed", range(2))
def test_random_viewers_get_every_video_they_may_be_shown_and_no_other(limited, bundle, seed):
    rng, sizes = np.random.default_rng(seed), set()
    feed = Feed(bundle, NoStore())
    fallback = Feed(replace(bundle, sources=(Broken(), bundle.sources[-1])), NoStore())
    for _ in range(60):
        user, viewer = int(rng.choice([*bundle.users.ids, 77])), random_viewer(rng)
        now_ms = limited.now_ms + int(rng.integers(-72, 72)) * HOUR_MS + int(rng.integers(-1, 2))
        expected = showable(limited, bundle, user, viewer, now_ms)
        asked = FeedRequest(user_id=user, k=1_000, viewer=viewer, now_ms=now_ms)
        pool = feed.retrieve(asked)
        assert set(pool.video_id_K.tolist()) == set(expected)
        sizes.add(len(expected))
        page = feed.get_feed(replace(asked, k=20))
        shown = [item.video_id for item in page.items]
        cap = bundle.config.arrange.author_cap
        assert page.level == Level.FULL
        assert set(shown) <= set(expected)
        assert len(shown) == min(20, sum(min(count, cap) for count in Counter(expected.values()).values()))
        less = fallback.get_feed(replace(asked, k=20))
        assert less.level == Level.POPULAR
        assert {item.video_id for item in less.items} <= set(expected)
        assert len(less.items) == len(shown) or len(expected) > 100, "the popular source gives 100 at most"
        for stage in (*page.stages, *less.stages):
            assert stage.received - stage.kept == sum(stage.removed.values()), stage
    assert max(sizes) > 3 * min(sizes)


def test_each_source_alone_stays_within_the_limits_and_the_filter_stage_says_what_each_took(limited, bundle):
    rng, found_by, removed = np.random.default_rng(8), Counter(), Counter()
    for source in bundle.sources:
        blend = BlendConfig(quotas=tuple(replace(quota, at_most=None) for quota in CONFIG.blend.quotas))
        alone = replace(bundle, sources=(source,), config=replace(CONFIG, blend=blend))
        for _ in range(25):
            user, viewer = int(rng.choice(bundle.users.ids)), random_viewer(rng)
            pool = Feed(alone, NoStore()).retrieve(
                FeedRequest(user_id=user, k=1_000, viewer=viewer, now_ms=limited.now_ms)
            )
            expected = showable(limited, bundle, user, viewer, limited.now_ms)
            assert set(pool.video_id_K.tolist()) <= set(expected)
            if source.name in ("fresh", "popular"):
                assert len(pool.video_id_K) == len(expected)
            found_by[source.name] += len(pool.video_id_K)
            removed.update({stage.name: stage.removed for stage in pool.stages}["filter"])
    assert set(found_by) == {"followed", "covisit", "ann", "fresh", "popular"}
    assert min(found_by.values()) > 0
    assert {"unavailable", "region", "language", "age", "safety"} <= set(removed)


def test_a_source_that_forgets_the_viewer_loses_its_candidates(limited, bundle):
    class Forgetful:
        name = "ann"

        def retrieve(self, query, k):
            grown_up = Viewer(region="de", age_years=99, max_safety_level=9)
            everything = bundle.eligibility.at(query.now_ms, grown_up).without()[0]
            return bundle.sources[-1].retrieve(replace(query, allowed=everything), k)

    viewer = Viewer(age_years=12, languages=("en",))
    page = Feed(replace(bundle, sources=(Forgetful(),)), NoStore()).get_feed(
        FeedRequest(user_id=77, k=50, viewer=viewer, now_ms=limited.now_ms)
    )
    assert len(page.items) > 5
    expected = showable(limited, bundle, 77, viewer, limited.now_ms)
    assert {item.video_id for item in page.items} <= set(expected)
    removed = {stage.name: stage.removed for stage in page.stages}["retrieve"]
    assert {"region", "language", "age", "safety"} <= removed.keys()


def test_what_is_not_said_of_a_viewer_is_what_the_bundle_says_and_by_default_the_least(limited, bundle):
    by_id = {video["video_id"]: video for video in limited.tables["videos"].to_pylist()}

    def found(config: FeedConfig, viewer: Viewer) -> list[dict]:
        feed = Feed(replace(bundle, config=config), NoStore())
        pool = feed.retrieve(FeedRequest(user_id=77, k=1_000, viewer=viewer, now_ms=limited.now_ms))
        return [by_id[video_id] for video_id in pool.video_id_K.tolist()]

    nothing_said = found(CONFIG, Viewer())
    assert len({video["language"] for video in nothing_said}) > 3
    for video in nothing_said:
        assert (video["min_age"] or 0, video["safety_level"] or 0, video["regions"] or []) == (0, 0, [])
    house = Viewer(region="us", languages=("en",), age_years=16, max_safety_level=3)
    open_house = replace(CONFIG, filters=replace(CONFIG.filters, viewer=house))
    assert FeedConfig.from_json(open_house.to_json()) == open_house
    assert found(open_house, Viewer()) == found(CONFIG, house)
    child = found(open_house, Viewer(age_years=12, max_safety_level=0))
    assert all((video["min_age"] or 0) <= 12 and not video["safety_level"] for video in child)
    assert any("US" in (video["regions"] or []) for video in child)


def test_a_bundle_of_tables_without_limits_serves_every_viewer_the_same(world):
    bundle = world.bundle()
    assert not set(world.tables["videos"].column_names) & {field.name for field in LIMITS}
    feed, rng = Feed(bundle, NoStore()), np.random.default_rng(1)
    for user in bundle.users.ids[:5].tolist():
        pages = [
            feed.get_feed(FeedRequest(user_id=user, explore=False, viewer=viewer, now_ms=world.now_ms))
            for viewer in (Viewer(), *(random_viewer(rng) for _ in range(4)))
        ]
        assert len(pages[0].items) == 10
        assert all(page.items == pages[0].items for page in pages)
        assert not {"region", "age", "unavailable"} & set(pages[0].stages[1].removed)


def test_a_viewer_of_twelve_is_never_sent_an_adult_video_over_the_wire(limited, tmp_path):
    registry = Registry(shutil.copytree(limited.registry, tmp_path / "registry"))
    there = replace(limited, registry=registry.root)
    there.publish("limited", CONFIG)
    registry.set_live("limited")
    ages = {video["video_id"]: video["min_age"] or 0 for video in limited.tables["videos"].to_pylist()}
    shown: dict[int, list[int]] = {12: [], 18: []}
    with (
        running(registry.root, tmp_path / "s.sqlite") as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client,
    ):
        for age, of_age in shown.items():
            viewer = Viewer(region="DE", languages=("en", "pt-BR"), age_years=age, max_safety_level=9)
            for user in limited.dataset.users.ids[:6].tolist():
                page = client.get_feed(user, k=50, viewer=viewer, now_ms=limited.now_ms)
                pool = client.retrieve(user, viewer=viewer, now_ms=limited.now_ms)
                of_age += [ages[item.video_id] for item in page.items] + [ages[v] for v in pool.video_id_K.tolist()]
        for viewer, details in (
            (Viewer(age_years=-3), "viewer.age_years: -3 is outside 0 .. 130"),
            (Viewer(age_years=131), "viewer.age_years: 131 is outside 0 .. 130"),
            (Viewer(max_safety_level=10), "viewer.max_safety_level: 10 is outside 0 .. 9"),
            (Viewer(languages=("en", " ")), "viewer.languages[1]: empty; leave it out when the language is not known"),
            (Viewer(languages=("en",) * 17), "viewer.languages: 17 entries, allowed are 0 .. 16"),
            (Viewer(languages=("e" * 36,)), "viewer.languages[0]: 36 characters, allowed are 35"),
            (Viewer(region="d\n"), "viewer.region: holds characters that cannot be printed"),
        ):
            for call in (client.get_feed, client.retrieve):
                assert refused(call, 1, viewer=viewer) == (grpc.StatusCode.INVALID_ARGUMENT, details)
        words = ["feed", "--user", "77", "--address", f"127.0.0.1:{server.port}", "--now-ms", str(limited.now_ms)]
        told = CliRunner().invoke(app, [*words, "--age", "12", "--region", "de", "--language", "en", "--k", "50"])
        printed = {video_id for video_id in ages if str(video_id) in told.output}
        wrong = CliRunner().invoke(app, [*words, "--age", "-3"])
    as_told = Viewer(region="DE", languages=("en",), age_years=12)
    assert printed
    assert printed <= set(showable(limited, there.bundle("limited"), 77, as_told, limited.now_ms))
    assert isinstance(wrong.exception, grpc.RpcError)
    assert max(shown[12]) == 12
    assert max(shown[18]) == 18
