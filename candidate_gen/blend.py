"""One pool from many sources: each video once, each source its quota, and a reason for every item.

K items of the pool, S sources, F finds (a row of a source), U distinct rows found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from candidate_gen.sources import Retrieved
from features.entities import ByRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How much of the pool a source may fill."""

    source: str
    share: float
    """Of the pool, before what others leave over is handed out."""
    at_least: int = 0
    """Items it gets, where it has them, before any share is honoured."""
    at_most: int | None = None
    """Items it never exceeds, even when others come up short."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"Quota of {self.source}: share {self.share} must lie in 0 .. 1")
        if self.at_least < 0 or (self.at_most is not None and self.at_most < self.at_least):
            raise ValueError(
                f"Quota of {self.source}: wants 0 <= at_least ({self.at_least}) <= at_most ({self.at_most})"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    """Size of the pool and the quotas in order of priority: a video that several sources found counts for the first
    whose quota it fits, and what is left over is handed out in this order."""

    k: int = 1000
    quotas: tuple[Quota, ...] = (
        Quota(source="followed", share=0.1, at_most=200),
        Quota(source="covisit", share=0.2),
        Quota(source="ann", share=0.64),
        Quota(source="fresh", share=0.03, at_least=20, at_most=100),
        Quota(source="popular", share=0.03, at_least=20, at_most=100),
    )
    """Chosen on validation days, of KuaiRand and the world `small`: between 0.1 and 0.4 for co-visitation the pool's
    recall changes by .01, below that KuaiRand loses, above it new videos do. The last two cost about .01 of recall for
    each further tenth; they are there so that new videos get seen and new users get something."""

    def __post_init__(self) -> None:
        names = [quota.source for quota in self.quotas]
        if len(set(names)) != len(names):
            raise ValueError(f"BlendConfig.quotas names a source twice: {names}")
        if self.k < 0:
            raise ValueError(f"BlendConfig.k is {self.k}: give 0 or more")


@dataclass(frozen=True, slots=True)
class Pool:
    """Candidates of one request, by place within their source: cut anywhere, every source is still there."""

    rows_K: np.ndarray
    source_K: np.ndarray
    """Index into `sources` of the source the item counts for."""
    sources: tuple[str, ...]
    score_K: np.ndarray
    """By that source; not comparable between sources."""
    found_by_KS: np.ndarray
    """(K, S) bool."""
    connected_K: np.ndarray
    """The author is followed."""

    def __len__(self) -> int:
        return len(self.rows_K)

    def reason(self, item: int) -> str:
        """Who found it: `ann`, or `ann, also popular fresh`."""
        own = int(self.source_K[item])
        others = [name for s, name in enumerate(self.sources) if self.found_by_KS[item, s] and s != own]
        return f"{self.sources[own]}, also {' '.join(others)}" if others else self.sources[own]


def blend(
    retrieved: Mapping[str, Retrieved], *, author_id: ByRow, followed_authors: np.ndarray, config: BlendConfig
) -> Pool:
    """Merge what the sources found. `author_id` is by video row; sources without a quota raise ValueError."""
    quotas = config.quotas
    names = tuple(quota.source for quota in quotas)
    if unknown := set(retrieved) - set(names):
        raise ValueError(f"no quota for source {sorted(unknown)}: add one to BlendConfig.quotas")
    nothing = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32))
    found = [retrieved.get(name, nothing) for name in names]
    rows = np.concatenate([f.rows for f in found])
    scores = np.concatenate([f.scores for f in found])
    source = np.repeat(np.arange(len(names)), [len(f.rows) for f in found])
    distinct, row_F = np.unique(rows, return_inverse=True)
    found_by = np.zeros((len(distinct), len(names)), bool)
    found_by[row_F, source] = True
    chosen = _choose(row_F, np.array([len(f.rows) for f in found]), quotas, config.k)
    place = np.arange(len(chosen)) - np.searchsorted(source[chosen], source[chosen])
    chosen = chosen[np.lexsort((source[chosen], place))]
    return Pool(
        rows_K=rows[chosen],
        source_K=source[chosen],
        sources=names,
        score_K=scores[chosen],
        found_by_KS=found_by[row_F[chosen]],
        connected_K=np.isin(author_id[rows[chosen]], followed_authors),
    )


def _choose(row_F: np.ndarray, found_S: np.ndarray, quotas: tuple[Quota, ...], k: int) -> np.ndarray:
    """Finds that make the pool (K,), by source, then place: each source in turn takes its best that nobody has taken,
    first what it is allotted, then, where others came up short of new videos, up to its limit."""
    taken_U, count_S = np.zeros(row_F.max(initial=-1) + 1, bool), np.zeros(len(quotas), np.int64)
    start_S, chosen = np.cumsum(found_S) - found_S, [np.zeros(0, np.int64)]
    for target_S in (allot(found_S, quotas, k), _limits(found_S, quotas)):
        for s, start in enumerate(start_S):
            room = max(min(target_S[s] - count_S[s], k - count_S.sum()), 0)
            free = start + np.flatnonzero(~taken_U[row_F[start : start + found_S[s]]])[:room]
            taken_U[row_F[free]] = True
            count_S[s] += len(free)
            chosen.append(free)
    return np.sort(np.concatenate(chosen))


def allot(available_S: np.ndarray, quotas: tuple[Quota, ...], k: int) -> np.ndarray:
    """Items each source contributes (S,): guarantees first, then shares, then what is left over, by priority."""
    limit = _limits(available_S, quotas)
    take = [0] * len(quotas)
    for wish in ([q.at_least for q in quotas], [max(q.at_least, round(q.share * k)) for q in quotas], limit):
        for s, wanted in enumerate(wish):
            take[s] += min(max(min(int(wanted), int(limit[s])) - take[s], 0), k - sum(take))
    return np.array(take, dtype=np.int64)


def _limits(available_S: np.ndarray, quotas: tuple[Quota, ...]) -> list[int]:
    return [int(n) if q.at_most is None else min(int(n), q.at_most) for n, q in zip(available_S, quotas, strict=True)]
