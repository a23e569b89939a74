"""A published bundle as a replay policy: logged candidates are valued by the path that answers requests.

The bundle must not have seen the answers. Its histories are cut at each request by the serving path itself, but its
counters are one day's view: they are taken as of the window's first day from the run that made the bundle, or the
bundle must be older than the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from features.artifacts import Registry
from features.dataset import Dataset
from pipelines.replay.policies import History, PolicyFactory, Valued
from pipelines.replay.rewards import WATCH_METRIC
from pipelines.replay.slates import LoggedRequests
from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.limits import MAX_POOL
from serving.store import NoStore


class BundlePolicy:
    """Values of the serving path, request by request, at each request's instant."""

    def __init__(
        self,
        bundle: FeedBundle,
        counters: Dataset | None,
        start_ms: int,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Counters are taken as of `start_ms`, the window's first moment."""
        self.name = f"bundle:{bundle.version}"
        self._tell, self._done = on_progress, 0
        self._feed = Feed(_as_of(bundle, counters, start_ms, self.name), NoStore())

    def values(self, requests: LoggedRequests) -> Valued:
        """Values, and the calibrated chances and seconds they are made of where the bundle serves the surface."""
        torch.set_num_threads(1)  # as in the server: one request is too little work to share out
        surfaces = self._feed.bundle.config.surfaces
        values, chances, tasks = [], [], ()
        for i, (user_id, ts_ms) in enumerate(zip(requests.user_id, requests.ts_ms, strict=True)):
            candidates = requests.video_ids[requests.offsets[i] : requests.offsets[i + 1]]
            surface = requests.surface[i]
            if surface in surfaces and len(candidates) <= MAX_POOL:
                ranked = self._feed.rank(int(user_id), candidates.tolist(), surface or "", int(ts_ms))
                tasks = (*ranked.tasks, WATCH_METRIC)
                values.append(ranked.value_N)
                chances.append(np.column_stack([ranked.probability_NT, ranked.watch_ms_N / 1000]))
            else:
                values.append(self._feed.value_candidates(int(user_id), int(ts_ms), surface, candidates))
            self._done += 1
            if self._tell and self._done % 200 == 0:
                self._tell(f"{self.name}: {self._done:,} requests")
        predicted = np.concatenate(chances) if len(chances) == len(values) else np.zeros((0, 0))
        return Valued(
            values_C=np.concatenate(values).astype(np.float64),
            predicted={task: predicted[:, t].astype(np.float64) for t, task in enumerate(tasks) if predicted.size},
        )


def _as_of(bundle: FeedBundle, counters: Dataset | None, first_ts_ms: int, name: str) -> FeedBundle:
    """The bundle with counters that end before the window; raises ValueError when only later ones are there."""
    newest = int(bundle.history.ts_ms.max()) if len(bundle.history.ts_ms) else 0
    if newest < first_ts_ms:
        return bundle
    if counters is None:
        raise ValueError(
            f"{name} was made from logs up to {_day(newest)}, the replayed window begins {_day(first_ts_ms)}: "
            "its counters have seen the answers. Replay later logs, or give --run, the run that made the bundle"
        )
    day = int(np.searchsorted(np.array(counters.dates), _day(first_ts_ms)))
    found = counters.counters
    return replace(bundle, user_counters=found.user_day[day], video_counters=found.video_day[day])


def factories(
    registry: Path | None, run: Path | None = None, on_progress: Callable[[str], None] | None = None
) -> dict[str, PolicyFactory]:
    """The `bundle:VERSION` (or `bundle:live`) kind of policy for `pipelines.replay.policies.resolve`."""

    def make(version: str, history: History) -> BundlePolicy:
        where = registry or (run / "registry" if run is not None else None)
        if where is None:
            raise ValueError(f"policy bundle:{version}: say where bundles are published (--registry or --run)")
        opened = Registry(where).open(None if version in ("", "live") else version)
        counters = Dataset.load(run / "dataset") if run is not None else None
        return BundlePolicy(FeedBundle.load(opened), counters, history.start_ms, on_progress)

    return {"bundle": make}


def _day(ts_ms: int) -> str:
    return str(np.datetime64(ts_ms, "ms").astype("datetime64[D]"))
