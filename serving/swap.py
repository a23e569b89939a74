"""Which bundle answers: follows the registry's LIVE pointer without ever answering from half a bundle.

A new version is verified, loaded and asked its golden requests before one reference is assigned. A version that fails
changes nothing but a counter and a log line. Requests keep the feed they began with, so none mixes two versions.
"""

from __future__ import annotations

import logging
import threading
import time

from features.artifacts import ArtifactError, Registry
from serving.bundle import FeedBundle
from serving.feed import Feed
from serving.golden import NAME, check
from serving.store import Store

_log = logging.getLogger(__name__)


def load_feed(registry: Registry, store: Store, version: str | None = None, scan_on: str | None = None) -> Feed:
    """Verify, open and check the named (or live) version; raises with the reason when it must not serve.

    Golden answers are those of the index as it was published. Where a device scans all vectors instead, which finds
    what lists may miss, the bundle is opened again for it after it was checked."""
    start = time.perf_counter()
    verified = registry.open(version)
    bundle = FeedBundle.load(verified)
    answered = check(bundle, verified.path(NAME))
    if scan_on is not None:
        bundle = FeedBundle.load(verified, scan_on=scan_on)
    took_s = time.perf_counter() - start
    _log.info("bundle %s loaded in %.1f s, %d golden answers as published", bundle.version, took_s, answered)
    return Feed(bundle, store)


class LiveFeed:
    """`feed` is the one to use now; `poll` brings it up to date and is called from one background thread."""

    def __init__(self, registry: Registry, store: Store, scan_on: str | None = None) -> None:
        self._registry, self._scan_on = registry, scan_on
        self._store = store
        self._refused: str | None = None
        self._polling = threading.Lock()
        self.feed = load_feed(registry, store, scan_on=scan_on)
        self.swaps = 0
        self.refusals = 0

    def poll(self) -> bool:
        """Follow LIVE once; True when another version serves from now on.

        A refused version is not tried again until LIVE names another one.
        """
        with self._polling:
            live = None
            try:
                live = self._registry.live()
                if live is None or live in (self.feed.bundle.version, self._refused):
                    return False
                fresh = load_feed(self._registry, self._store, live, self._scan_on)
            except Exception as error:
                self._refuse(live, error)
                return False
            self._refused = None
            self.feed = fresh
            self.swaps += 1
            return True

    def _refuse(self, version: str | None, error: Exception) -> None:
        name = version or f"LIVE ({error})"
        if name == self._refused:
            return
        self._refused = name
        self.refusals += 1
        known = isinstance(error, (ArtifactError, ValueError, RuntimeError, OSError))
        _log.error("%s refused, %s keeps serving: %s", name, self.feed.bundle.version, error, exc_info=not known)
