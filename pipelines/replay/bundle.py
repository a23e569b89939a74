"""A published bundle as a replay policy: logged candidates are valued by the path that answers requests.

`bundle:V` is the bundle's values, made into slates by the run's sampler as any other policy's are; `feed:V` is the feed
as it would be served, with its own caps, diversity, quotas and exploration. Neither retrieves: both rank what the
logged request chose from, with the user's history as of that request.

The bundle must not have seen the answers. Histories are cut at each request, but its counters are one day's view: they
are taken as of the window's first day from the run that made the bundle, or the bundle must be older than the window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from features.artifacts import Registry
from features.dataset import Dataset
from pipelines.replay.histories import Histories
from pipelines.replay.policies import History, PolicyFactory, Valued
from pipelines.replay.rewards import WATCH_METRIC
from pipelines.replay.sampling import Conditional
from pipelines.replay.slates import Floats, Ints, LoggedRequests, Slates
from serving.bundle import FeedBundle
from serving.records import Shortlist
from serving.rerank import Reranked, rerank, slate_chance

BUNDLE, FEED = "bundle", "feed"


class BundlePolicy:
    """Values of the serving path, request by request, at each request's instant."""

    def __init__(
        self,
        bundle: FeedBundle,
        histories: Histories,
        start_ms: int,
        counters: Dataset | None = None,
        kind: str = BUNDLE,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Counters are taken as of `start_ms`, the window's first moment."""
        self.name = f"{kind}:{bundle.version}"
        self._as_served = kind == FEED
        self._histories = histories
        self._bundle = _as_of(bundle, counters, start_ms, self.name)
        self._tell, self._done = on_progress, 0

    def values(self, requests: LoggedRequests) -> Valued:
        """Values, and the calibrated chances and seconds they are made of."""
        torch.set_num_threads(1)  # as in the server: one request is too little work to share out
        ranked = [self._rerank(requests, i) for i in range(len(requests.request_id))]
        tasks = (*ranked[0].scores.tasks, WATCH_METRIC) if ranked else ()
        chances = [np.column_stack([r.scores.probability_NT, r.scores.watch_ms_N / 1000]) for r in ranked]
        predicted = np.concatenate(chances).astype(np.float64) if chances else np.zeros((0, 0))
        return Valued(
            values_C=np.concatenate([r.value_K for r in ranked]) if ranked else np.zeros(0),
            predicted={task: predicted[:, t] for t, task in enumerate(tasks)},
            law=AsServed(ranked) if self._as_served else None,
        )

    def _rerank(self, requests: LoggedRequests, i: int) -> Reranked:
        user_id, ts_ms = int(requests.user_id[i]), int(requests.ts_ms[i])
        logged = Shortlist(
            request_id=requests.request_id[i],
            user_id=user_id,
            ts_ms=ts_ms,
            surface=requests.surface[i],
            video_id_K=requests.video_ids[requests.offsets[i] : requests.offsets[i + 1]],
            session_id_N=np.array(requests.session_ids[i] if requests.session_ids else (), np.int64),
        )
        self._done += 1
        if self._tell and self._done % 200 == 0:
            self._tell(f"{self.name}: {self._done:,} requests")
        return rerank(self._bundle, self._histories.at(user_id, ts_ms), logged)


@dataclass(frozen=True, slots=True)
class AsServed:
    """Slates by each feed's own arrangement and exploration, request by request."""

    ranked: list[Reranked]

    def conditional(
        self, requests: LoggedRequests, slates: Slates, scores_C: Mapping[str, Floats] | None = None
    ) -> Conditional:
        """0 where the feed's rules forbid what was shown, such as a third video of one author."""
        scores_C, n = scores_C or {}, len(slates.slot)
        probability, greedy = np.zeros(n), np.zeros(n)
        expected = {name: np.zeros(n) for name in scores_C}
        for request, rows in _by_request(slates):
            start = requests.offsets[request]
            order_S = slates.candidate[rows] - start
            for row, item, (considered, chance) in zip(rows, order_S, self.ranked[request].along(order_S), strict=True):
                probability[row] = chance[considered == item].sum()
                greedy[row] = float(len(considered) > 0 and considered[0] == item)
                for name, score_C in scores_C.items():
                    expected[name][row] = chance @ score_C[start + considered]
        return Conditional(probability=probability, greedy=greedy, expected=expected)

    def draw(self, requests: LoggedRequests, slates: Slates, salt: int = 0) -> Ints:
        """With salt 0 by the request's own random numbers: the feed that served a request draws what it served.

        Where a feed's rules leave it short, its remaining slots hold its best that is left, whatever the rules say.
        """
        drawn = np.empty(len(slates.slot), dtype=np.int64)
        for request, rows in _by_request(slates):
            ranked = self.ranked[request]
            chance = slate_chance(requests.request_id[request], salt or None)
            order_S = ranked.draw(len(rows), chance).order_S
            if len(order_S) < len(rows):
                rest = np.argsort(-ranked.value_K, kind="stable")
                order_S = np.concatenate([order_S, rest[~np.isin(rest, order_S)]])[: len(rows)]
            drawn[rows] = requests.offsets[request] + order_S
        return drawn


def factories(
    registry: Path | None, run: Path | None = None, on_progress: Callable[[str], None] | None = None
) -> dict[str, PolicyFactory]:
    """The kinds `bundle:VERSION` and `feed:VERSION` (or `:live`) for `pipelines.replay.policies.resolve`."""
    read: list[tuple[History, Histories]] = []  # the last log's, for all policies of its replay

    def make(kind: str, version: str, history: History) -> BundlePolicy:
        where = registry or (run / "registry" if run is not None else None)
        if where is None:
            raise ValueError(f"policy {kind}:{version}: say where bundles are published (--registry or --run)")
        opened = Registry(where).open(None if version in ("", "live") else version)
        counters = Dataset.load(run / "dataset") if run is not None else None
        if not read or read[0][0] is not history:
            read[:] = [(history, Histories(history.log))]
        return BundlePolicy(FeedBundle.load(opened), read[0][1], history.start_ms, counters, kind, on_progress)

    return {kind: lambda version, history, k=kind: make(k, version, history) for kind in (BUNDLE, FEED)}


def _by_request(slates: Slates) -> list[tuple[int, Ints]]:
    """Each request with its rows, top slot first."""
    requests, first = np.unique(slates.request, return_index=True)
    rows = np.split(np.arange(len(slates.request)), first[1:])
    return list(zip(requests.tolist(), rows, strict=True))


def _as_of(bundle: FeedBundle, counters: Dataset | None, first_ts_ms: int, name: str) -> FeedBundle:
    """The bundle with counters that end before the window; raises ValueError when only later ones are there."""
    if bundle.newest_event_ms < first_ts_ms:
        return bundle
    if counters is None:
        raise ValueError(
            f"{name} was made from logs up to {_day(bundle.newest_event_ms)}, the replayed window begins "
            f"{_day(first_ts_ms)}: its counters have seen the answers. Replay later logs, or give --run, the run that "
            "made the bundle"
        )
    day = int(np.searchsorted(np.array(counters.dates), _day(first_ts_ms)))
    found = counters.counters
    return replace(bundle, user_counters=found.user_day[day], video_counters=found.video_day[day])


def _day(ts_ms: int) -> str:
    return str(np.datetime64(ts_ms, "ms").astype("datetime64[D]"))
