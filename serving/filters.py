"""What must never be shown, and how many videos each rule removed.

Each rule is used twice: in the `Allowed` rows that the sources search inside, so that filtering never leaves a source
short, and again on what came back (K), so that no source has to be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from candidate_gen.allowed import Allowed
from candidate_gen.timeline import HOUR_MS
from features.eligibility import Viewer
from serving.bundle import FeedBundle
from serving.hydrate import Query


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one request; every list is sorted and distinct."""

    bundle: FeedBundle
    query: Query
    excluded_rows: np.ndarray
    blocked_authors: np.ndarray
    viewer: Viewer
    changes: int
    """Of the bundle's videos, before any of them was looked at."""

    @classmethod
    def of(
        cls,
        bundle: FeedBundle,
        query: Query,
        excluded_video_ids: np.ndarray,
        blocked_authors: np.ndarray,
        viewer: Viewer,
    ) -> Rules:
        """`viewer` is what the request says; the rest is the bundle's `filters.viewer`."""
        changes = bundle.changes
        excluded = np.unique(bundle.videos.rows_of(excluded_video_ids))
        known = viewer.or_else(bundle.config.filters.viewer)
        return cls(bundle, query, excluded[excluded > 0], np.unique(blocked_authors), known, changes)

    @property
    def oldest_ms(self) -> int | None:
        """Uploads before this are too old."""
        max_age_h = self.bundle.config.filters.max_age_h
        return None if max_age_h is None else self.query.now_ms - int(max_age_h * HOUR_MS)

    @property
    def seen_rows(self) -> np.ndarray:
        return self.query.seen_rows if self.bundle.config.filters.seen else np.zeros(0, np.int64)

    def allowed(self) -> tuple[Allowed, dict[str, int]]:
        """What may be shown, and what each rule took; a video under two rules counts for the first."""
        shared = self.bundle.eligibility.at(self.query.now_ms, self.viewer)
        own = self.bundle.uploads.of(np.array([self.query.user_id]))
        blocked = self.bundle.uploads.of(self.blocked_authors)
        allowed, (seen, excluded, own, blocked) = shared.without(self.seen_rows, self.excluded_rows, own, blocked)
        removed = {
            "ineligible": len(self.bundle.videos) - self.bundle.eligibility.n_eligible,
            **shared.removed,
            "seen": seen,
            "excluded": excluded,
            "own": own,
            "blocked_author": blocked,
        }
        return allowed, {reason: count for reason, count in removed.items() if count}

    def broken(self, rows_K: np.ndarray, unconnected_K: np.ndarray) -> dict[str, np.ndarray]:
        """The same rules asked of single videos: a mask (K,) a reason, True where the rule is broken."""
        bundle, author_K = self.bundle, self.bundle.author_id[rows_K]
        upload_K = bundle.upload_ts_ms[rows_K]
        masks = {
            "ineligible": ~bundle.eligible[rows_K],
            "not_yet_uploaded": upload_K > self.query.now_ms,
            **bundle.attributes.broken(self.viewer, rows_K, self.query.now_ms),
            "seen": np.isin(rows_K, self.seen_rows),
            "excluded": np.isin(rows_K, self.excluded_rows),
            "own": (author_K == self.query.user_id) & (author_K != 0),
            "blocked_author": np.isin(author_K, self.blocked_authors),
            "followed_in_unconnected": unconnected_K & np.isin(author_K, self.query.followed_authors),
        }
        if self.oldest_ms is not None:
            masks["too_old"] = (upload_K >= 0) & (upload_K < self.oldest_ms)
        return masks
