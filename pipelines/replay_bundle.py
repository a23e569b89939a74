"""A published bundle as a replay policy: logged candidates are valued by the path that answers requests.

The bundle must not have seen the answers. Its histories are cut at each request by the serving path itself, but its
counters are one day's view: they are taken as of the window's first day from the run that made the bundle, or the
bundle must be older than the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from features.artifacts import Registry
from features.dataset import Dataset
from pipelines.policies import Floats, History, LoggedRequests, PolicyFactory
from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.store import NoStore


class BundlePolicy:
    """Values of the serving path, request by request, at each request's instant."""

    def __init__(
        self, bundle: FeedBundle, counters: Dataset | None, on_progress: Callable[[str], None] | None = None
    ) -> None:
        self.name = f"bundle:{bundle.version}"
        self._bundle, self._counters, self._tell = bundle, counters, on_progress

    def values(self, requests: LoggedRequests) -> Sequence[Floats]:
        """One float64 array a request, aligned with its candidates."""
        feed = Feed(self._as_of(int(requests.ts_ms.min())), NoStore())
        torch.set_num_threads(1)  # as in the server: one request is too little work to share out
        out = []
        for i, (user_id, ts_ms) in enumerate(zip(requests.user_id, requests.ts_ms, strict=True)):
            candidates = requests.video_ids[requests.offsets[i] : requests.offsets[i + 1]]
            out.append(feed.value_candidates(int(user_id), int(ts_ms), requests.surface[i], candidates))
            if self._tell and i % 200 == 0:
                self._tell(f"{self.name}: {i:,} of {len(requests.request_id):,} requests")
        return out

    def _as_of(self, first_ts_ms: int) -> FeedBundle:
        """The bundle with counters that end before the window; raises ValueError when only later ones are there."""
        newest = int(self._bundle.history.ts_ms.max()) if len(self._bundle.history.ts_ms) else 0
        if newest < first_ts_ms:
            return self._bundle
        if self._counters is None:
            raise ValueError(
                f"{self.name} was made from logs up to {_day(newest)}, the replayed window begins {_day(first_ts_ms)}: "
                "its counters have seen the answers. Replay later logs, or give --run, the run that made the bundle"
            )
        day = int(np.searchsorted(np.array(self._counters.dates), _day(first_ts_ms)))
        counters = self._counters.counters
        return replace(self._bundle, user_counters=counters.user_day[day], video_counters=counters.video_day[day])


def factories(
    registry: Path | None, run: Path | None = None, on_progress: Callable[[str], None] | None = None
) -> dict[str, PolicyFactory]:
    """The `bundle:VERSION` (or `bundle:live`) kind of policy for `pipelines.policies.resolve`."""

    def make(version: str, _: History) -> BundlePolicy:
        where = registry or (run / "registry" if run is not None else None)
        if where is None:
            raise ValueError(f"policy bundle:{version}: say where bundles are published (--registry or --run)")
        opened = Registry(where).open(None if version in ("", "live") else version)
        counters = Dataset.load(run / "dataset") if run is not None else None
        return BundlePolicy(FeedBundle.load(opened), counters, on_progress)

    return {"bundle": make}


def _day(ts_ms: int) -> str:
    return str(np.datetime64(ts_ms, "ms").astype("datetime64[D]"))
