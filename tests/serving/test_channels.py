"""The sources of a bundle: each answers and is the reason given, popularity knows segments, old layouts are refused."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from candidate_gen.blend import BlendConfig, Quota
from candidate_gen.covisit import Covisits
from candidate_gen.index import VideoIndex
from candidate_gen.infer import Towers
from pipelines.evaluate_channels import ask_sources
from pipelines.recipes import Recipe
from serving.bundle import FeedBundle
from serving.config import FeedConfig, FilterConfig
from serving.feed import Feed
from serving.messages import FeedRequest
from serving.store import NoStore

ONLY_POPULAR = BlendConfig(quotas=(Quota(source="popular", share=1.0),))


def test_every_source_of_a_bundle_finds_candidates_and_is_named_as_the_reason(world) -> None:
    bundle = world.bundle()
    config = replace(bundle.config, filters=FilterConfig(seen=False))
    feed, reasons = Feed(replace(bundle, config=config), NoStore()), Counter()
    for user in bundle.users.ids[:20].tolist():
        found = feed.retrieve(FeedRequest(user_id=user, k=100, now_ms=world.now_ms))
        reasons.update(found.sources[s] for s in found.source_K)
        assert all(reason.split(",")[0] in found.sources for reason in found.reasons)
    assert set(reasons) == {"followed", "covisit", "ann", "fresh", "popular"}


def test_popularity_is_counted_by_surface_and_segment_and_drawn_towards_the_wider_group(world) -> None:
    folder = world.stage(FeedConfig(surfaces=("main", "search", "empty"), popular_segment="region"))
    bundle, e = FeedBundle.open(folder, "segments"), world.tables["events"].to_pydict()
    region = dict(zip(*world.tables["users"].select(["user_id", "region"]).to_pydict().values(), strict=True))
    shown_on = np.array(e["surface"])
    liked = (np.array(e["click"]) == 1) | (np.array(e["long_view"]) == 1)
    video = bundle.videos.rows_of(np.array(e["video_id"]))

    def count(of: np.ndarray, wider: np.ndarray) -> np.ndarray:
        return np.bincount(video[liked & of], minlength=len(bundle.eligible)) + 300 * wider / max(wider.sum(), 1)

    def best(counts: np.ndarray) -> list[int]:
        order = np.argsort(-counts, kind="stable")
        return order[bundle.eligible[order]][:100].tolist()

    everybody = count(np.ones(len(video), bool), np.zeros(len(bundle.eligible)))
    config = replace(bundle.config, filters=FilterConfig(seen=False), blend=ONLY_POPULAR)
    feed = Feed(replace(bundle, config=config, sources=(bundle.sources[-1],)), NoStore())

    def served(user: int, surface: str) -> list[int]:
        found = feed.retrieve(FeedRequest(user_id=user, k=100, surface=surface, now_ms=world.now_ms))
        return bundle.videos.rows_of(found.video_id_K).tolist()

    tops = {}
    for surface in ("main", "search", "empty"):
        of_surface = count(shown_on == surface, everybody)
        assert served(-3, surface) == best(of_surface)  # an unknown user has no segment
        for user in [int(next(u for u in bundle.users.ids[10:].tolist() if region[u] == r)) for r in ("a", "b")]:
            in_segment = np.array([region[u] == region[user] for u in e["user_id"]])
            narrow = count(in_segment & (shown_on == surface), of_surface)
            tops[surface, region[user]] = served(user, surface)
            assert tops[surface, region[user]] == best(of_surface if surface == "empty" else narrow)
    assert tops["main", "a"] != tops["main", "b"]
    with pytest.raises(ValueError, match="'shoe_size' is not a user feature; there are user_id, region"):
        world.stage(FeedConfig(popular_segment="shoe_size"))


def test_a_source_without_a_quota_is_not_asked_and_one_that_does_not_exist_is_named(world) -> None:
    bundle = FeedBundle.open(world.stage(FeedConfig(blend=ONLY_POPULAR)), "popular")
    assert [source.name for source in bundle.sources] == ["popular"]
    quotas = (*ONLY_POPULAR.quotas, Quota(source="astrology", share=0.5))
    with pytest.raises(ValueError, match=r"name \['astrology'\]; the sources are"):
        FeedBundle.open(world.stage(FeedConfig(blend=BlendConfig(quotas=quotas))), "astrology")
    with pytest.raises(ValueError, match="the popular source needs one"):
        FeedConfig(blend=BlendConfig(quotas=(Quota(source="ann", share=1.0),)))


def test_another_layout_is_refused_with_what_to_do(world) -> None:
    folder = world.stage(FeedConfig())
    for layout in (4, 6):
        (folder / "layout.json").write_text(json.dumps({"layout": layout}))
        with pytest.raises(ValueError, match=f"bundle new has layout {layout}, this release reads 5: publish it again"):
            FeedBundle.open(folder, "new")
    (folder / "layout.json").unlink()
    with pytest.raises(ValueError, match="bundle old has layout 1, this release reads 5: publish it again"):
        FeedBundle.open(folder, "old")


def test_arrays_of_another_catalogue_are_refused(world) -> None:
    folder = world.stage(FeedConfig())
    start = np.load(folder / "channels" / "covisit_start.npy")
    np.save(folder / "channels" / "covisit_start.npy", np.append(start, start[-1]))
    with pytest.raises(ValueError, match="co-visitation of 302 video rows, expected 301"):
        FeedBundle.open(folder, "mixed")


def test_evaluation_asks_the_sources_under_the_rules_of_serving(world, tmp_path) -> None:
    dataset, dates = world.dataset, world.dataset.dates[-1:]
    recipe = Recipe(name="t", spec=dataset.encoder.spec, feed=FeedConfig(surfaces=("main", "search")))
    towers, index = Towers.load(world.models / "towers"), VideoIndex(world.models / "index")
    answers = ask_sources(dataset, towers, index, world.tables["follows"], recipe, dates, tmp_path)
    follows = world.tables["follows"].to_pylist()
    names = {source for retrieved in answers.retrieved for source, found in retrieved.items() if len(found.rows)}
    assert names == {"followed", "covisit", "ann", "fresh", "popular"}
    for q, retrieved in enumerate(answers.retrieved):
        user_id = dataset.users.ids_of(answers.queries.user_row_Q[[q]])[0]
        assert set(answers.followed[q]) == {f["author_id"] for f in follows if f["user_id"] == user_id}
        for found in retrieved.values():
            assert dataset.eligible[found.rows].all()
            assert (dataset.upload_ts_ms[found.rows] <= answers.queries.ts_ms_Q[q]).all()
            assert not np.isin(found.rows, answers.queries.seen[q]).any()
    first_ms = int(dataset.examples.ts_ms[dataset.examples.day == len(dataset.dates) - 1].min())
    counted = Covisits.count(dataset.history, dataset.eligible, recipe.feed.covisit, before_ms=first_ms)
    assert np.array_equal(np.load(tmp_path / "covisit_score.npy"), counted.score)
