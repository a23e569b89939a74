"""Two bundles asked the same questions: the test days' impressions, and which videos their users would watch next.

Each bundle answers with its own encoder, ranker and towers; the events, histories, counters and instants are the run's,
the same for both, as they stood before the first of the days. So what differs is what each has learnt.
N rows (impressions), Q queries (a user on a test day), R videos, K returned, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from candidate_gen.train import features_at, index_instant
from features.dataset import Dataset
from features.transforms import Encoder
from pipelines.evaluate_ranking import score_examples
from pipelines.evaluate_retrieval import Queries, exact_top, make_queries, user_vectors
from pipelines.gate.config import GateConfig
from pipelines.recipes import Split
from pipelines.replay.keys import uniforms
from pipelines.stages import canonical_table, encoded
from pipelines.workspace import Workspace
from serving.bundle import FeedBundle

BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every bundle."""

    dates: tuple[str, ...]
    rows_N: np.ndarray
    """Examples of the dates, of at most so many users."""
    queries: Queries
    """Their videos are positions in `video_rows_R`."""
    video_rows_R: np.ndarray
    """Eligible videos, ascending."""
    ks: tuple[int, ...]

    @classmethod
    def draw(
        cls, dataset: Dataset, dates: tuple[str, ...], signal: str, ks: tuple[int, ...], config: GateConfig
    ) -> Question:
        """Raises ValueError when nobody on the dates has an unseen positive."""
        rows = dataset.rows_on(dates)
        users = np.unique(dataset.examples.user_row[rows])
        if len(users) > config.at_most_users:
            drawn = np.argsort(uniforms(users, config.seed))[: config.at_most_users]
            rows = rows[np.isin(dataset.examples.user_row[rows], users[drawn])]
        queries = make_queries(dataset, dates, signal, at_most=config.at_most_queries, seed=config.seed)
        if len(queries) == 0:
            raise ValueError(f"no user has an unseen positive of {signal!r} on {', '.join(dates)}: nothing to judge by")
        videos = np.flatnonzero(dataset.eligible)
        if len(videos) > config.at_most_videos:
            drawn = videos[np.argsort(uniforms(videos, config.seed))[: config.at_most_videos]]
            videos = np.union1d(drawn, np.concatenate(queries.relevant))
        ks = tuple(k for k in ks if k < len(videos)) or (max(1, len(videos) // 10),)
        return cls(dates, rows, _among(queries, videos), videos, ks)

    @property
    def k(self) -> int:
        """The first of the list that users meet."""
        return min(self.ks)


@dataclass(frozen=True, slots=True)
class Answers:
    """One bundle's."""

    tasks: tuple[str, ...]
    probability_NT: np.ndarray
    top_QK: np.ndarray
    """Positions in `Question.video_rows_R`, best first."""
    shortest: float = 1.0
    """Length of the shortest vector of a user or video; all are made to be 1."""

    def of_task(self, task: str) -> np.ndarray:
        """(N,)."""
        return self.probability_NT[:, self.tasks.index(task)]


def ask(bundle: FeedBundle, view: Dataset, question: Question) -> Answers:
    """`view`: the run's data as this bundle's encoder reads it. Raises ValueError or RuntimeError where its models
    cannot answer."""
    probability_NT, _ = score_examples(view, bundle.ranker, question.rows_N)
    if not np.isfinite(probability_NT).all():
        raise ValueError(f"bundle {bundle.version}: its ranker gives probabilities that are not finite")
    day, now_ms = index_instant(view, question.dates)
    vectors_RD = video_vectors(bundle, view, question.video_rows_R, day, now_ms)
    users_QD = user_vectors(view, bundle.towers, question.queries)
    everything_R = np.ones(len(vectors_RD), bool)
    top_QK = exact_top(vectors_RD, users_QD, question.queries, everything_R, max(question.ks))
    shortest = min(float(np.linalg.norm(vectors, axis=1).min()) for vectors in (vectors_RD, users_QD))
    return Answers(bundle.ranker.tasks, probability_NT, top_QK, shortest)


def video_vectors(bundle: FeedBundle, view: Dataset, rows_R: np.ndarray, day: int, now_ms: int) -> np.ndarray:
    """(R, D) of the bundle's own video tower, as of an instant."""
    return np.concatenate(
        [
            bundle.towers.video_vectors(view.videos, at, features_at(view, at, day, now_ms))
            for at in np.split(rows_R, range(BLOCK, len(rows_R), BLOCK))
        ]
    )


def read_by(encoder: Encoder, ws: Workspace, dataset: Dataset, split: Split) -> Dataset:
    """The run's data as another bundle's encoder reads it; raises ValueError when the tables lack what it reads."""
    if encoder.spec != dataset.encoder.spec:  # other hashes, other counters by them
        dataset = encoded(ws.canonical, encoder.spec, split.train)
    users, videos = (canonical_table(ws.canonical, name) for name in ("users", "videos"))
    return replace(dataset, encoder=encoder, users=encoder.users(users), videos=encoder.videos(videos))


def _among(queries: Queries, videos_R: np.ndarray) -> Queries:
    """The same queries, their videos as positions in a list that holds every relevant one."""

    def positions(rows: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(videos_R, rows), len(videos_R) - 1)
        return at[videos_R[at] == rows]

    return replace(
        queries,
        relevant=[positions(rows) for rows in queries.relevant],
        cold=[positions(rows) for rows in queries.cold],
        seen=[positions(rows) for rows in queries.seen],
    )
