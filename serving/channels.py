"""The candidate sources of a bundle and the rows they may return: arrays written once, memory-mapped when opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from candidate_gen.allowed import Eligibility
from candidate_gen.covisit import Covisits
from candidate_gen.index import VideoIndex
from candidate_gen.popular import count_popular, load_orders, save_orders
from candidate_gen.sources import (
    AnnSource,
    CovisitSource,
    FollowedSource,
    FreshSource,
    PopularSource,
    Source,
)
from candidate_gen.timeline import Timeline, Windows
from candidate_gen.uploads import Uploads
from candidate_gen.viewers import ViewerBitmaps
from features.dataset import Dataset
from features.eligibility import Attributes
from serving.config import FeedConfig

STATIC_LENGTH = 5_000
"""Rows; each request checks all of them against its rules, in some 100 us."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Sources that the blend has a quota for, and what they and the filters share."""

    sources: tuple[Source, ...]
    uploads: Uploads
    eligibility: Eligibility
    static_rows: np.ndarray
    """What is shown when nothing else can be computed: everybody's popular videos, held in memory."""


def write_channels(
    folder: Path,
    dataset: Dataset,
    config: FeedConfig,
    attributes: Attributes,
    *,
    popular_examples: np.ndarray,
    before_ms: int | None = None,
) -> None:
    """Count and write into `folder` (created) what the sources and the filters read.

    `attributes` are the videos' limits by row. Popularity is counted on the example rows `popular_examples`,
    co-visitation on the histories before an instant (all of them by default).
    """
    folder.mkdir(parents=True, exist_ok=True)
    author_id, upload_ts_ms, eligible = map(np.asarray, (dataset.author_id, dataset.upload_ts_ms, dataset.eligible))
    Uploads.build(author_id, upload_ts_ms, eligible).save(folder)
    Windows.build(attributes, eligible).save(folder)
    ViewerBitmaps.write(folder, attributes)
    orders = count_popular(dataset, popular_examples, config.surfaces, config.popular_segment)
    save_orders(folder, orders, config.surfaces)
    Covisits.count(dataset.history, eligible, config.covisit, before_ms=before_ms).save(folder)


def open_channels(
    folder: Path,
    config: FeedConfig,
    index: VideoIndex,
    upload_ts_ms: np.ndarray,
    eligible: np.ndarray,
    attributes: Attributes,
) -> Channels:
    """Open what `write_channels` wrote; raises ValueError when arrays do not belong together or a quota
    names a source that there is not."""
    uploads, covisits = Uploads.load(folder, upload_ts_ms), Covisits.load(folder)
    if len(covisits.start) != len(upload_ts_ms) + 1:
        found = len(covisits.start) - 1
        raise ValueError(f"{folder}: co-visitation of {found} video rows, expected {len(upload_ts_ms)}; publish again")
    orders = load_orders(folder, config.surfaces)
    sources: tuple[Source, ...] = (
        FollowedSource(uploads),
        CovisitSource(covisits, config.covisit),
        AnnSource(index, uploads),
        FreshSource(uploads),
        PopularSource(orders),
    )
    wanted, there = {quota.source for quota in config.blend.quotas}, {source.name for source in sources}
    if unknown := sorted(wanted - there):
        raise ValueError(f"feed.json: blend.quotas name {unknown}; the sources are {sorted(there)}")
    timeline = Timeline(eligible, uploads, attributes, Windows.load(folder), config.filters.max_age_h)
    return Channels(
        sources=tuple(source for source in sources if source.name in wanted),
        uploads=uploads,
        eligibility=Eligibility(timeline, ViewerBitmaps.load(folder, attributes)),
        static_rows=np.array(orders[None, None][:STATIC_LENGTH]),
    )
