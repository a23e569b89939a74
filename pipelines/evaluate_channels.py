"""What each candidate source brings to the pool: alone at its quota, and on top of the others.

Q queries (a user on a test day, see `pipelines.evaluate_retrieval`), K places of a pool, S sources. The sources are
those that serving opens, with everything counted before the first test day; they answer at each query's instant.
Relevant are the day's unseen positives that were uploaded by then: nothing can find the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from candidate_gen.blend import BlendConfig, Pool, blend
from candidate_gen.index import VideoIndex
from candidate_gen.infer import Towers
from candidate_gen.popular import segments
from candidate_gen.sources import Retrieved, SourceQuery
from candidate_gen.timeline import HOUR_MS
from candidate_gen.train import index_instant
from features.dataset import Dataset
from features.eligibility import Attributes, Viewer
from pipelines.evaluate_retrieval import Queries, make_queries, user_vectors
from pipelines.recipes import Recipe
from serving.channels import Channels, open_channels, write_channels
from serving.config import FeedConfig

AT_MOST = 2_000
"""Queries measured."""
COLD_H = 24.0
"""Videos up to this old at the request are the cold slice."""
NEW_USER_SEEN = 10
"""Users who had seen fewer videos than this before the request are the new users."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What every source answered to every query, before any quota."""

    queries: Queries
    retrieved: list[dict[str, Retrieved]]
    followed: list[np.ndarray]
    """Authors that the user of each query followed at its instant, ascending."""
    author_id: np.ndarray
    upload_ts_ms: np.ndarray

    def relevant(self, oldest_h: float | None = None) -> list[np.ndarray]:
        """Of each query, the unseen positives uploaded by its instant and at most `oldest_h` before it."""
        found = []
        for rows, now_ms in zip(self.queries.relevant, self.queries.ts_ms_Q, strict=True):
            age_ms = now_ms - self.upload_ts_ms[rows]
            known = self.upload_ts_ms[rows] >= 0
            young = known & (age_ms <= oldest_h * HOUR_MS) if oldest_h is not None else np.ones(len(rows), bool)
            found.append(rows[young & (age_ms >= 0)])
        return found

    def pools(self, config: BlendConfig, without: str | None = None) -> list[Pool]:
        """The blended pool of each query, with all sources or without one."""
        return [
            blend(
                {name: found for name, found in retrieved.items() if name != without},
                author_id=self.author_id,
                followed_authors=followed,
                config=config,
            )
            for retrieved, followed in zip(self.retrieved, self.followed, strict=True)
        ]


def ask_sources(
    dataset: Dataset,
    towers: Towers,
    index: VideoIndex,
    follows: pa.Table | None,
    recipe: Recipe,
    dates: tuple[str, ...],
    folder: Path,
) -> Answers:
    """Count what the sources read before `dates`, write it into `folder`, and ask about the users of `dates`.

    `index` holds vectors as of the first instant of `dates` too. Raises ValueError where nothing can be measured.
    """
    first_day, first_ms = index_instant(dataset, dates)
    days = recipe.popular_days or first_day
    examples = dataset.rows_on(dataset.dates[max(first_day - days, 0) : first_day])
    # Logs do not say who was watching: nothing is held back for anybody's age, region or language.
    open_to_all = Attributes.unlimited(len(dataset.eligible))
    write_channels(folder, dataset, recipe.feed, open_to_all, popular_examples=examples, before_ms=first_ms)
    upload_ts_ms = np.asarray(dataset.upload_ts_ms)
    channels = open_channels(folder, recipe.feed, index, upload_ts_ms, np.asarray(dataset.eligible), open_to_all)
    queries = make_queries(dataset, dates, recipe.retrieval_signal, at_most=AT_MOST)
    if len(queries) == 0:
        raise ValueError(f"no user has an unseen positive of {recipe.retrieval_signal!r} on {', '.join(dates)}")
    followed = _followed(dataset, follows, queries)
    vectors_QD = user_vectors(dataset, towers, queries)
    asked = _source_queries(dataset, channels, recipe.feed, queries, vectors_QD, followed)
    k = recipe.feed.blend.k
    return Answers(
        queries=queries,
        retrieved=[{source.name: source.retrieve(query, k) for source in channels.sources} for query in asked],
        followed=followed,
        author_id=np.asarray(dataset.author_id),
        upload_ts_ms=upload_ts_ms,
    )


def evaluate_channels(answers: Answers, config: BlendConfig) -> dict:
    """Recall of the pool by slice, and one row a slice and source.

    `quota` is the source's share of the pool, `filled` the share it had; `alone` the recall of its own first
    quota x K; `marginal` what the pool's recall loses without it; `unique` the recall of what it alone found.
    """
    whole, sources = answers.pools(config), [quota.source for quota in config.quotas]
    lesser = {source: answers.pools(config, without=source) for source in sources}
    new_Q = np.array([len(seen) < NEW_USER_SEEN for seen in answers.queries.seen])
    slices = {
        "all": answers.relevant(),
        f"videos under {COLD_H:g} h": answers.relevant(COLD_H),
        f"users with fewer than {NEW_USER_SEEN} views": [
            rows if new else rows[:0] for rows, new in zip(answers.relevant(), new_Q, strict=True)
        ],
    }
    rows, pools = [], []
    for name, relevant in slices.items():
        queries = sum(len(wanted) > 0 for wanted in relevant)
        if queries:
            recall = _recall([pool.rows_K for pool in whole], relevant)
            pools.append({"slice": name, "queries": queries, "pool recall": recall})
            rows += [{"slice": name, **_row(answers, config, s, whole, lesser, relevant)} for s in range(len(sources))]
    return {"k": config.k, "queries": len(answers.queries), "pools": pools, "rows": rows}


def _row(
    answers: Answers,
    config: BlendConfig,
    s: int,
    whole: list[Pool],
    lesser: dict[str, list[Pool]],
    relevant: list[np.ndarray],
) -> dict:
    quota = config.quotas[s]
    asked = [i for i, wanted in enumerate(relevant) if len(wanted)]
    own = round(quota.share * config.k)
    alone = [retrieved[quota.source].rows[:own] for retrieved in answers.retrieved]
    unique = [pool.rows_K[pool.found_by_KS[:, s] & (pool.found_by_KS.sum(axis=1) == 1)] for pool in whole]
    with_all = _recall([pool.rows_K for pool in whole], relevant)
    return {
        "source": quota.source,
        "quota": quota.share,
        "filled": float(np.mean([(whole[i].source_K == s).mean() if len(whole[i]) else 0.0 for i in asked])),
        "alone": _recall(alone, relevant),
        "marginal": with_all - _recall([pool.rows_K for pool in lesser[quota.source]], relevant),
        "unique": _recall(unique, relevant),
    }


def _recall(found: list[np.ndarray], relevant: list[np.ndarray]) -> float:
    """Mean over queries with something to find of the share that was found."""
    pairs = zip(found, relevant, strict=True)
    return float(np.mean([np.isin(wanted, rows).mean() for rows, wanted in pairs if len(wanted)]))


def _source_queries(
    dataset: Dataset,
    channels: Channels,
    config: FeedConfig,
    queries: Queries,
    vectors_QD: np.ndarray,
    followed: list[np.ndarray],
) -> list[SourceQuery]:
    names = dict(zip(dataset.encoder.surface_rows(list(config.surfaces)).tolist(), config.surfaces, strict=True))
    segment_Q = segments(dataset.users, queries.user_row_Q, config.popular_segment)
    ends_Q = dataset.history.ends_at(queries.user_row_Q, queries.ts_ms_Q)
    length = dataset.encoder.spec.history_length
    return [
        SourceQuery(
            user_vector_D=vectors_QD[q],
            history=dataset.history.windows(queries.user_row_Q[q : q + 1], ends_Q[q : q + 1], length),
            followed_authors=followed[q],
            allowed=channels.eligibility.at(int(queries.ts_ms_Q[q]), Viewer()).without(queries.seen[q])[0],
            now_ms=int(queries.ts_ms_Q[q]),
            surface=names.get(int(queries.surface_Q[q])),
            segment=int(segment_Q[q]),
        )
        for q in range(len(queries))
    ]


def _followed(dataset: Dataset, follows: pa.Table | None, queries: Queries) -> list[np.ndarray]:
    """Authors each query's user had followed before its instant; a follow without a time was there before the log."""
    if follows is None:
        return [np.zeros(0, np.int64)] * len(queries)
    user_row = dataset.users.rows_of(follows["user_id"].to_numpy())
    order = np.argsort(user_row, kind="stable")
    user_row, author_id = user_row[order], follows["author_id"].to_numpy()[order]
    ts_ms = follows["ts_ms"].fill_null(np.iinfo(np.int64).min).to_numpy()[order]
    found = []
    for user, now_ms in zip(queries.user_row_Q, queries.ts_ms_Q, strict=True):
        mine = slice(*np.searchsorted(user_row, [user, user + 1]))
        found.append(np.unique(author_id[mine][ts_ms[mine] < now_ms]))
    return found
