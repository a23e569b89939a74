"""A bundle whose vectors are scanned in a device's memory: here the CPU's, through the code that a GPU runs."""

from __future__ import annotations

import numpy as np

from features.artifacts import Registry
from serving.feed import Feed
from serving.messages import FeedRequest, Level
from serving.store import NoStore
from serving.swap import load_bundle


def test_a_bundle_is_checked_as_it_was_published_and_then_searched_exactly(world):
    feed = Feed(load_bundle(Registry(world.registry), "v1", scan_on="cpu"), NoStore())
    index = feed.bundle.index
    query_D = np.random.default_rng().normal(size=index.dim).astype(np.float32)
    rows = np.flatnonzero(np.unpackbits(index.everything.bits, bitorder="little"))
    exact = np.sort(index.vectors[rows] @ query_D)[::-1]
    assert np.allclose(index.search(query_D[None], 50)[1][0], exact[:50], atol=2e-3 * np.linalg.norm(query_D))
    page = feed.get_feed(FeedRequest(user_id=int(world.dataset.users.ids[0]), k=10, now_ms=world.now_ms))
    assert (len(page.items), page.level) == (10, Level.FULL)
