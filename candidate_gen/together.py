"""Searches of many threads, combined where that shares work: one query each, exclusions of their own.

K results, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from candidate_gen.combine import Combiner

Found = tuple[np.ndarray, np.ndarray]


class Searched(Protocol):
    """An index of rows or of ids: `VideoIndex` with its `RowFilter`, `LiveIndex` with its `Filter`."""

    @property
    def search(self) -> Callable[..., Found]:
        """search(query_QD, k, allowed=, excluded_...=[one array a query]) -> best (Q, k) and their scores (Q, k)."""
        ...

    def shares_work(self, allowed: Any, k: int) -> bool:
        """Whether searches under a filter cost less asked together."""
        ...

    @property
    def slots(self) -> int | None:
        """How many searches at once the machine has room for; None: one a core."""
        ...


@dataclass(frozen=True, slots=True)
class _Asked:
    query_D: np.ndarray
    k: int
    allowed: Any
    excluded: dict[str, np.ndarray]


class SearchTogether:
    """Ask one query; those that meet under the same filter, where one scan can answer all of them, share the scan.

    `benchmarks.combining`, two cores, 8 and 16 threads: scans of 10,000 and 20,000 videos answer 1.8 to 3 times as many
    queries a second combined as alone; inverted lists .7 to 1.1 times, so these are asked at once and alone.
    """

    def __init__(self, index: Searched) -> None:
        self._index = index
        self._combined: Combiner[_Asked, Found] = Combiner(self._search, slots=index.slots)

    def __call__(self, query_D: np.ndarray, k: int, allowed: Any, **excluded: np.ndarray) -> Found:
        """What `index.search(query_D[None], k, allowed=allowed, **excluded)` gives, (k,) each."""
        asked = _Asked(query_D, k, allowed, excluded)
        if self._index.shares_work(allowed, k):
            return self._combined((id(allowed), k, *sorted(excluded)), asked)
        return self._search([asked])[0]

    def _search(self, together: list[_Asked]) -> list[Found]:
        first = together[0]
        excluded = {name: [asked.excluded[name] for asked in together] for name in first.excluded}
        query_QD = np.stack([asked.query_D for asked in together])
        found = self._index.search(query_QD, first.k, allowed=first.allowed, **excluded)
        return list(zip(*found, strict=True))
