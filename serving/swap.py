"""Which bundle answers: follows the registry's LIVE pointer without ever answering from half a bundle.

A new version is verified, loaded and asked its golden requests before one reference is assigned. A version that fails
changes nothing but a counter and a log line. Requests keep the feed they began with, so none mixes two versions.
Uploads and removals since are encoded and embedded again by the new version's own models before it answers; those that
it was made with are passed over, and forgotten once no version that one would go back to needs them.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence

import numpy as np

from candidate_gen.live import LiveConfig
from features.artifacts import ArtifactError, Registry
from serving.bundle import FeedBundle
from serving.encode import content_width
from serving.feed import Feed
from serving.golden import NAME, check
from serving.limits import check_removals, check_uploads
from serving.live import LiveBundle
from serving.messages import RemoveOutcome, UpsertOutcome, Video
from serving.scorer import Scorer, accelerate
from serving.store import EventStore, StoreUnavailableError
from serving.upload_store import Said

KEPT_MS = 7 * 86_400_000
"""Uploads and removals stay in the store this long, whatever bundles hold: a week's versions can be gone back to."""
_log = logging.getLogger(__name__)


def load_bundle(
    registry: Registry, version: str | None = None, scan_on: str | None = None, scorer: Scorer = "plain"
) -> FeedBundle:
    """Verify, open and check the named (or live) version; raises with the reason when it must not serve.

    Golden answers are those of the index as it was published and of the plain scorer; a faster one takes over after it
    was compared with that. Where a device scans all vectors instead, which finds
    what lists may miss, the bundle is opened again for it after it was checked."""
    start = time.perf_counter()
    verified = registry.open(version)
    bundle = FeedBundle.load(verified)
    answered = check(bundle, verified.path(NAME))
    if scan_on is not None:
        bundle = FeedBundle.load(verified, scan_on=scan_on)
    accelerate(bundle.ranker, verified.folder / "ranker", scorer, scan_on or "cpu")
    took_s = time.perf_counter() - start
    _log.info("bundle %s loaded in %.1f s, %d golden answers as published", bundle.version, took_s, answered)
    return bundle


class LiveFeed:
    """`feed` is the one to use now; `poll` brings it up to date and is called from one background thread, `upsert` and
    `remove` from another."""

    def __init__(
        self,
        registry: Registry,
        store: EventStore,
        config: LiveConfig,
        scan_on: str | None = None,
        scorer: Scorer = "plain",
    ) -> None:
        self._registry, self._store, self._config = registry, store, config
        self._scan_on = scan_on
        self._scorer: Scorer = scorer
        self._folder = store.folder
        shutil.rmtree(self._folder, ignore_errors=True)
        self._refused: str | None = None
        self._polling, self._changing = threading.Lock(), threading.Lock()
        self._live = self._load(None)
        self.feed = Feed(self._live.bundle, store)
        self.swaps = 0
        self.refusals = 0

    @property
    def version(self) -> str:
        """Of the bundle that answers now."""
        return self.feed.bundle.version

    @property
    def n_uploads(self) -> int:
        """Videos uploaded or removed since the bundle that answers now was made."""
        catalogue = self.feed.bundle.catalogue
        return 0 if catalogue is None else len(catalogue.uploaded_rows())

    def upsert(self, videos: Sequence[Video]) -> UpsertOutcome:
        """Uploads: on disk and in every request that starts, on return; raises InvalidRequestError for the first that
        cannot be one, and then keeps none."""
        with self._changing:
            clock_ms = self.feed.now_ms()
            check_uploads(videos, clock_ms, content_width(self._live.known.encoder))
            encoded = self._live.encode(videos)
            number = self._store.keep(Said(clock_ms, videos=tuple(videos))).result()
            self._catch_up_with_others(before=number - len(videos) + 1)
            outcome = self._live.put(encoded)
            self._live.applied = number
        return outcome

    def remove(self, video_ids: Sequence[int]) -> RemoveOutcome:
        """Removals: on disk and in no request that starts, on return."""
        check_removals(video_ids)
        with self._changing:
            distinct = tuple(dict.fromkeys(video_ids))
            number = self._store.keep(Said(self.feed.now_ms(), removed_ids=distinct)).result()
            self._catch_up_with_others(before=number - len(distinct) + 1)
            outcome = self._live.remove(distinct)
            self._live.applied = number
        return outcome

    def poll(self) -> bool:
        """Follow LIVE once; True when another version serves from now on.

        A refused version is not tried again until LIVE names another one. Of a shared store, what other servers were
        told of videos is followed too.
        """
        with self._polling:
            self._follow_others()
            live = fresh = None
            try:
                live = self._registry.live()
                if live is None or live in (self.feed.bundle.version, self._refused):
                    return False
                fresh = self._load(live)
                before = self._swap(fresh)
            except Exception as error:
                if fresh is not None:
                    fresh.close()
                if isinstance(error, StoreUnavailableError):
                    _log.warning("%s is not loaded yet: %s", live, error)  # the bundle may be good: tried again
                else:
                    self._refuse(live, error)
                return False
            self._refused = None
            self.swaps += 1
            self._retire(before, fresh)
            return True

    def close(self) -> None:
        """No upload, removal or swap after it; a compaction that runs is waited for."""
        self._live.close()

    def _catch_up_with_others(self, before: int) -> None:
        """Changes of other servers that the shared store numbered before ours come before ours here too."""
        if self._store.shared and before > self._live.applied + 1:
            others = (change for change in self._store.changes(self._live.applied) if change.number < before)
            self._live.catch_up(others)

    def _follow_others(self) -> None:
        if not self._store.shared:
            return
        try:
            with self._changing:
                self._live.catch_up(self._store.changes(self._live.applied))
        except StoreUnavailableError as error:
            _log.warning("uploads of other servers are not followed: %s", error)

    def _load(self, version: str | None) -> LiveBundle:
        """A bundle with what came since, up to about now."""
        known = load_bundle(self._registry, version, self._scan_on, self._scorer)
        live = LiveBundle(known, self._folder / known.version, self._config)
        try:
            live.catch_up(self._store.changes(after=0))
        except BaseException:
            live.close()
            raise
        return live

    def _swap(self, fresh: LiveBundle) -> LiveBundle:
        """What came while it loaded is caught up with, uploads waiting, and from then on it answers."""
        with self._changing:
            fresh.catch_up(self._store.changes(after=fresh.applied))
            before, self._live = self._live, fresh
            self.feed = Feed(fresh.bundle, self._store)
        return before

    def _retire(self, before: LiveBundle, fresh: LiveBundle) -> None:
        """Tidy up behind a swap; what fails here costs space and no answer."""
        try:
            self._forget(before, fresh)
            before.close()
        except Exception:
            _log.exception("bundle %s serves, and leftovers of %s remain", fresh.known.version, before.known.version)

    def _forget(self, before: LiveBundle, fresh: LiveBundle) -> None:
        """Changes that both versions were made with, and that are old enough for any version one would roll back to."""
        old = [c for c in self._store.changes(after=0) if c.acknowledged_ms < self.feed.now_ms() - KEPT_MS]
        both = np.flatnonzero(before.contains(old) & fresh.contains(old)).tolist()
        self._store.forget([old[i].number for i in both]).result()
        _log.info(
            "%d uploads and removals are in bundles %s and %s: forgotten",
            len(both),
            before.known.version,
            fresh.known.version,
        )

    def _refuse(self, version: str | None, error: Exception) -> None:
        name = version or f"LIVE ({error})"
        if name == self._refused:
            return
        self._refused = name
        self.refusals += 1
        known = isinstance(error, (ArtifactError, ValueError, RuntimeError, OSError))
        _log.error("%s refused, %s keeps serving: %s", name, self.feed.bundle.version, error, exc_info=not known)
