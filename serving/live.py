"""One bundle and everything that came or went since it was made: what a running server answers from.

`LiveBundle.bundle` is the loaded bundle with its video columns, rules and channels exchanged for those of a `Catalogue`
and a `LiveIndex`; the funnel reads both the same way. The truth is the store, which has every change before `put` and
`remove` make it visible: a start replays it, so the index's own folder is made afresh and never trusted.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from candidate_gen.live import LiveConfig, LiveIndex
from candidate_gen.sources import AnnSource, FollowedSource, FreshSource, Source
from serving.arrivals import Arrivals
from serving.bundle import FeedBundle
from serving.catalogue import BUNDLE, Catalogue, Column, Counters, LiveAttributes, LiveVideos
from serving.encode import Encoded, encode
from serving.live_channels import LiveAnn, LiveEligibility, LiveUploads
from serving.messages import RemoveOutcome, UpsertOutcome, Video
from serving.upload_store import Change

_log = logging.getLogger(__name__)
_AT_ONCE = 10_000
"""Stored changes encoded together while a bundle loads."""


class LiveBundle:
    """A bundle that takes uploads and removals. One writer at a time; `bundle` is for any number of threads."""

    def __init__(self, known: FeedBundle, folder: Path, config: LiveConfig) -> None:
        """`folder` is removed, made anew and this object's own until `close`."""
        shutil.rmtree(folder, ignore_errors=True)
        self.known = known
        self.applied = 0
        """Number of the last stored change that is visible here."""
        self._folder = folder
        self._instant_ms, self._known_until_ms = known.newest_event_ms + 1, known.known_until_ms
        videos, eligibility, limits = known.videos, known.eligibility, known.attributes
        if (
            isinstance(videos, LiveVideos)
            or isinstance(eligibility, LiveEligibility)
            or isinstance(limits, LiveAttributes)
        ):
            raise TypeError(f"bundle {known.version} takes uploads already: a live bundle is made of a loaded one")
        self._eligibility, self._known_limits = eligibility, limits
        self._index = LiveIndex(folder, known.index, known.ids_by_row, config)
        self._catalogue, self._arrivals = Catalogue(videos, known.index.dim), Arrivals()
        self._uploads = LiveUploads(known.uploads, self._catalogue, self._arrivals)
        self._ann = LiveAnn(
            AnnSource(known.index, known.uploads), self._index, self._catalogue, self._uploads, self._arrivals
        )
        self.bundle = self._exchanged()

    def _exchanged(self) -> FeedBundle:
        known, catalogue = self.known, self._catalogue
        columns = {
            name: Column(catalogue, getattr(known, name), name)
            for name in ("upload_ts_ms", "author_id", "eligible", "duration_ms", "vectors")
        }
        ours: dict[str, Source] = {
            source.name: source for source in (self._ann, FollowedSource(self._uploads), FreshSource(self._uploads))
        }
        return replace(
            known,
            videos=LiveVideos(catalogue),
            video_counters=Counters(catalogue, known.video_counters),
            sources=tuple(ours.get(source.name, source) for source in known.sources),
            uploads=self._uploads,
            attributes=LiveAttributes(catalogue, self._known_limits),
            eligibility=LiveEligibility(
                self._eligibility, known.upload_ts_ms, self._known_limits, catalogue, self._arrivals
            ),
            catalogue=catalogue,
            **columns,
        )

    def encode(self, videos: Sequence[Video]) -> Encoded:
        """What `put` takes; of an id given twice the last counts."""
        distinct = {video.video_id: video for video in videos}
        return encode(self.known, list(distinct.values()), self._instant_ms)

    def put(self, encoded: Encoded) -> UpsertOutcome:
        """Show what uploads said from now on, to every request that starts."""
        ids_N, said = encoded.ids_N, encoded.slots
        rows_N = self._catalogue.rows_of(ids_N)
        known_N = rows_N > 0
        self._forget(rows_N[known_N])
        rows_N = self._catalogue.put(ids_N, said, encoded.limits)
        self._ann.let_through(rows_N[rows_N < self._catalogue.n_known])
        self._show(rows_N[said.eligible])
        self._index.upsert(ids_N, said.vectors, said.eligible)
        return UpsertOutcome(int((~known_N).sum()), int(known_N.sum()))

    def remove(self, ids: Iterable[int]) -> RemoveOutcome:
        """Show these no longer to any request that starts."""
        ids_N = np.unique(np.fromiter(ids, np.int64))
        rows_N = self._catalogue.rows_of(ids_N)
        known_N = rows_N > 0
        self._index.remove(ids_N[known_N])
        self._forget(rows_N[known_N])
        self._catalogue.remove(rows_N[known_N])
        return RemoveOutcome(int(known_N.sum()), int((~known_N).sum()))

    def catch_up(self, changes: Iterable[Change]) -> int:
        """Make stored changes visible, in their order, less those that the bundle contains; returns how many."""
        done, waiting, began = 0, [], time.perf_counter()
        for change in changes:
            waiting.append(change)
            if len(waiting) == _AT_ONCE:
                done, waiting = done + self._replay(waiting), []
        done += self._replay(waiting)
        if done:
            took_s = time.perf_counter() - began
            _log.info("bundle %s: %d uploads and removals since, in %.1f s", self.known.version, done, took_s)
        return done

    def contains(self, changes: Sequence[Change]) -> np.ndarray:
        """(N,) bool: whether the bundle was made with what the change says, or with something newer.

        So it was where its logs reach beyond the change's acknowledgement (a platform's tables are exported together
        with its events) and it knows the uploaded video, or does not show the removed one. Only an upload undoes a
        removal: it holds against a bundle that still shows the video, however new that is.
        """
        row_N = self.known.videos.rows_of(np.array([change.video_id for change in changes], np.int64))
        older_N = np.array([change.acknowledged_ms for change in changes], np.int64) <= self._known_until_ms
        removed_N = np.array([change.removed for change in changes], bool)
        return older_N & np.where(removed_N, ~self.known.eligible[row_N], row_N > 0)

    def close(self) -> None:
        """Let go of the folder; requests in flight may go on reading."""
        self._index.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _replay(self, changes: Sequence[Change]) -> int:
        wanted = [change for change, has in zip(changes, self.contains(changes), strict=True) if not has]
        videos = [change.video for change in wanted if change.video is not None]
        if videos:
            self.put(self.encode(videos))
        if removed := [change.video_id for change in wanted if change.removed]:
            self.remove(removed)
        self.applied = max([self.applied, *(change.number for change in changes)])
        return len(wanted)

    def _forget(self, rows_N: np.ndarray) -> None:
        """Take rows out of the orders that they stand in, before they change."""
        slot_N = self._catalogue.slots_of(rows_N)
        slot_N = np.full(len(rows_N), BUNDLE) if slot_N is None else slot_N
        first_time = rows_N[slot_N == BUNDLE]
        first_time = first_time[self.known.eligible[first_time]]
        arrivals, limits = self._arrivals, self._known_limits
        arrivals.hidden = arrivals.hidden.with_(first_time, first_time, self.known.upload_ts_ms[first_time], limits)
        slots = self._catalogue.slots
        shown_N = (slot_N > 0) & slots.eligible[slot_N]
        rows_N, slot_N = rows_N[shown_N], slot_N[shown_N]
        arrivals.shown = arrivals.shown.without(rows_N, slot_N, slots.upload_ts_ms[slot_N], self._catalogue.limits)
        arrivals.drop(rows_N, slots.author_id[slot_N])

    def _show(self, rows_N: np.ndarray) -> None:
        """Put uploaded rows into the orders."""
        slot_N = self._catalogue.slots_of(rows_N)
        if slot_N is not None:
            slots, arrivals, limits = self._catalogue.slots, self._arrivals, self._catalogue.limits
            arrivals.shown = arrivals.shown.with_(rows_N, slot_N, slots.upload_ts_ms[slot_N], limits)
            arrivals.add(rows_N, slots.author_id[slot_N])
