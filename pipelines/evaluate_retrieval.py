"""Recall of tomorrow's positives: the towers exactly, through the index, and popularity beside them.

Q queries (a user on a test day), K returned, D vector width. A query is asked at the user's first impression of the
day, knows what happened before it, and its relevant videos are the day's positives that the user had not seen.
Every method ranks the same corpus: eligible videos, less what the user has seen. The cold slice looks for those of
the relevant videos alone that were there, but for less than 24 hours, when the query was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import polars as pl

from candidate_gen.index import VideoIndex
from candidate_gen.infer import Towers
from features.dataset import Dataset
from features.inputs import Inputs, UserRows, assemble
from features.schema import SIGNALS
from pipelines.baselines import popular_videos
from pipelines.metrics import coverage, gini, recall_at_k

CHUNK = 256
COLD_MS = 24 * 3_600_000
TOWERS = "two towers, exact"


@dataclass(frozen=True, slots=True)
class Queries:
    """What is asked, and what counts as found."""

    user_row_Q: np.ndarray
    ts_ms_Q: np.ndarray
    day_Q: np.ndarray
    surface_Q: np.ndarray
    relevant: list[np.ndarray]
    """Video rows of the day's positives, distinct."""
    cold: list[np.ndarray]
    """Those of `relevant` that had been uploaded for less than COLD_MS; empty for most queries."""
    seen: list[np.ndarray]
    """Video rows of everything the user was shown before the query."""

    def __len__(self) -> int:
        return len(self.user_row_Q)


def make_queries(
    dataset: Dataset, dates: tuple[str, ...], signal: str, *, at_most: int | None = None, seed: int = 0
) -> Queries:
    """One query a (user, date) with at least one unseen positive; `at_most` draws a sample without replacement."""
    e, rows = dataset.examples, dataset.rows_on(dates)
    rows = rows[e.user_row[rows] > 0]
    order = rows[np.lexsort((e.ts_ms[rows], e.user_row[rows], e.day[rows]))]
    keys = e.day[order] * (len(dataset.users) + 1) + e.user_row[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    if at_most is not None and len(starts) > at_most:
        picked = np.sort(np.random.default_rng(seed).choice(len(starts), at_most, replace=False))
    else:
        picked = np.arange(len(starts))
    ends = np.r_[starts[1:], len(order)]
    positive = e.signals[:, SIGNALS.index(signal)] == 1
    asked, relevant, cold, seen = [], [], [], []
    for i in picked:
        group = order[starts[i] : ends[i]]
        first = group[0]
        begin, end = dataset.history.user_start[e.user_row[first]], e.history_end[first]
        before = np.unique(dataset.history.video_row[begin:end])
        wanted = np.setdiff1d(e.video_row[group[positive[group]]], before)
        wanted = wanted[dataset.eligible[wanted]]
        if wanted.size:
            asked.append(first)
            relevant.append(wanted)
            cold.append(_younger(dataset, wanted, int(e.ts_ms[first])))
            seen.append(before)
    at = np.array(asked, dtype=np.int64)
    return Queries(e.user_row[at], e.ts_ms[at], e.day[at], e.surface[at], relevant, cold, seen)


def query_inputs(dataset: Dataset, queries: Queries, at: np.ndarray) -> Inputs:
    """Contexts without candidates for the queries `at`, as serving's hydration builds them."""
    user_row, ts_ms = queries.user_row_Q[at], queries.ts_ms_Q[at]
    none = np.zeros(0, np.int64)
    return assemble(
        user=UserRows.take(dataset.users, user_row),
        user_counters_BC=dataset.counters.user(np.full(len(at), queries.day_Q.min()), user_row),
        surface_B=queries.surface_Q[at],
        now_ms_B=ts_ms,
        history=dataset.history.windows(
            user_row, dataset.history.ends_at(user_row, ts_ms), dataset.encoder.spec.history_length
        ),
        videos=dataset.videos,
        candidate_rows_N=none,
        owner_N=none,
        candidate_counters_NC=dataset.counters.video(none, none),
        candidate_upload_ts_ms_N=none,
        slot_N=none,
    )


def user_vectors(dataset: Dataset, towers: Towers, queries: Queries) -> np.ndarray:
    """(Q, D) float32."""
    chunks = [
        towers.user_vectors(query_inputs(dataset, queries, np.arange(s, min(s + CHUNK, len(queries)))))
        for s in range(0, len(queries), CHUNK)
    ]
    return np.concatenate(chunks)


def exact_top(
    vectors_VD: np.ndarray, users_QD: np.ndarray, queries: Queries, eligible_V: np.ndarray, k: int
) -> np.ndarray:
    """Rows (Q, k) of the k best eligible unseen videos by inner product; the reference for every index."""
    out = np.empty((len(queries), k), np.int64)
    barred = ~eligible_V
    for start in range(0, len(queries), CHUNK):
        stop = min(start + CHUNK, len(queries))
        scores = users_QD[start:stop] @ vectors_VD.T
        scores[:, barred] = -np.inf
        for i, q in enumerate(range(start, stop)):
            scores[i, queries.seen[q]] = -np.inf
        best = np.argpartition(-scores, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        out[start:stop] = np.take_along_axis(best, order, axis=1)
    return out


def index_top(index: VideoIndex, users_QD: np.ndarray, queries: Queries, eligible_V: np.ndarray, k: int) -> np.ndarray:
    """Rows (Q, k) through the index, the filter inside the search; -1 where it ran out."""
    return np.concatenate(
        [
            index.search(users_QD[q : q + 1], k, allowed=eligible_V, excluded_rows=queries.seen[q])[0]
            for q in range(len(queries))
        ]
    )


def popularity_lists(
    dataset: Dataset, events: pl.DataFrame, signal: str, windows_days: Sequence[int | None]
) -> dict[str, np.ndarray]:
    """Eligible video rows by positives of the signal, best first, by name of the list: one for each window at the end
    of `events`, None for all of them."""
    lists = {}
    for days in windows_days:
        rows = dataset.videos.rows_of(popular_videos(events, signal, len(dataset.videos), days=days))
        name = "whole log" if days is None else f"last {days} day{'s' if days > 1 else ''}"
        lists[f"popularity, {name}"] = rows[dataset.eligible[rows]]
    return lists


def popular_top(popular_rows: np.ndarray, queries: Queries, k: int) -> np.ndarray:
    """Rows (Q, k) of the most popular unseen videos, the same order for everybody; -1 where the list ran out."""
    out = np.full((len(queries), k), -1, np.int64)
    for q in range(len(queries)):
        unseen = popular_rows[~np.isin(popular_rows, queries.seen[q])][:k]
        out[q, : len(unseen)] = unseen
    return out


def evaluate_retrieval(
    dataset: Dataset,
    towers: Towers,
    index: VideoIndex,
    vectors_VD: np.ndarray,
    popularity: Mapping[str, np.ndarray],
    *,
    dates: tuple[str, ...],
    signal: str,
    ks: Sequence[int] = (100, 500),
    at_most: int | None = 5_000,
    index_queries: int = 500,
) -> dict:
    """Recall table (one row a method), index recall of the exact top, queries asked. Random stands for chance."""
    queries = make_queries(dataset, dates, signal, at_most=at_most)
    if len(queries) == 0:
        raise ValueError(f"no user has an unseen positive of {signal!r} on {', '.join(dates)}: nothing to measure")
    users_QD, k = user_vectors(dataset, towers, queries), max(ks)
    exact = exact_top(vectors_VD, users_QD, queries, dataset.eligible, k)
    probe = _first(queries, min(index_queries, len(queries)))
    through = index_top(index, users_QD[: len(probe)], probe, dataset.eligible, k)
    k0 = min(ks)
    found = np.mean([np.isin(exact[q, :k0], through[q, :k0]).mean() for q in range(len(probe))])
    catalogue = int(dataset.eligible.sum())
    rows = [
        method_row(TOWERS, exact, queries, ks, catalogue),
        *(method_row(name, popular_top(rows, queries, k), queries, ks, catalogue) for name, rows in popularity.items()),
    ]
    rows.append({"name": "chance", **{f"recall@{k}": min(1.0, k / catalogue) for k in ks}, "coverage": None})
    return {
        "signal": signal,
        "dates": list(dates),
        "queries": len(queries),
        "catalogue": catalogue,
        "rows": rows,
        "index_recall": {"k": k0, "queries": len(probe), "of_exact": float(found)},
        "through_index": method_row("two towers, index", through, probe, ks, catalogue),
    }


def tower_recall(retrieval: dict, k: int) -> float:
    """The towers' exact recall in what `evaluate_retrieval` returned."""
    return next(row for row in retrieval["rows"] if row["name"] == TOWERS)[f"recall@{k}"]


def popularity_recall(retrieval: dict, k: int) -> float:
    """The best of the popularity lists."""
    return max(row[f"recall@{k}"] for row in retrieval["rows"] if row["name"].startswith("popularity"))


def method_row(name: str, top_QK: np.ndarray, queries: Queries, ks: Sequence[int], catalogue: int) -> dict:
    """Recall at each of `ks` (of all relevant videos, and of the cold ones; None without any), then at the least of
    them the share of the catalogue that was returned and how unevenly."""
    recall, cold = recall_at_k(top_QK, queries.relevant, ks), recall_at_k(top_QK, queries.cold, ks)
    shown = top_QK[:, : min(ks)]
    exposures = np.unique(shown[shown > 0], return_counts=True)[1]
    return {
        "name": name,
        **{f"recall@{k}": recall[k] for k in ks},
        **{f"cold@{k}": cold[k] if cold[k] == cold[k] else None for k in ks},
        "coverage": coverage(shown, catalogue),
        "gini": gini(np.pad(exposures, (0, catalogue - len(exposures)))),
    }


def _younger(dataset: Dataset, rows: np.ndarray, now_ms: int) -> np.ndarray:
    upload_ms = dataset.upload_ts_ms[rows]
    return rows[(upload_ms >= 0) & (upload_ms <= now_ms) & (now_ms - upload_ms < COLD_MS)]


def _first(queries: Queries, n: int) -> Queries:
    return Queries(**{f.name: getattr(queries, f.name)[:n] for f in fields(Queries)})
