"""The rules in order: does it fit together, is it new enough, does its index hold, are its models good, not worse than
live, fast, and does it answer in a process of its own?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from features.artifacts import Bundle
from features.dataset import Dataset
from pipelines.evaluate_ranking import score_examples
from pipelines.gate.answers import answers_rule
from pipelines.gate.quality import (
    ranking_against_live,
    ranking_rules,
    retrieval_against_live,
    retrieval_rules,
    table_rules,
)
from pipelines.gate.sides import Answers, Question, ask, read_by
from pipelines.gate.soundness import age_rules, caller_rules, index_rules, layout_of, unreadable, unseen_days
from pipelines.gate.speed import speed_rule
from pipelines.gate.verdict import GateError, Verdict
from pipelines.workspace import Workspace
from ranking.infer import Ranker
from serving.bundle import LAYOUT, FeedBundle

Tell = Callable[[str], None]


def judge(
    ws: Workspace,
    staged: Path,
    metrics: dict,
    *,
    found_by_index: float,
    live: Bundle | None,
    tell: Tell = lambda _: None,
) -> list[Verdict]:
    """Every rule's verdict about a staged bundle with golden answers, whose parts fit together (`fit_rules`).

    `found_by_index`: share of users' exact top that its index returned when it was built; `live`: the verified live
    bundle. Raises GateError when the candidate's models cannot answer at all.
    """
    config, dataset = ws.recipe.gate, ws.dataset()
    split, signal = ws.split(dataset), ws.recipe.retrieval_signal
    candidate = FeedBundle.open(staged, "candidate")
    opened, live_metrics, verdicts = readable(live)
    days = split.test
    if opened is not None:
        days, verdict = unseen_days(split, live_metrics)
        verdicts = [*verdicts, verdict, *caller_rules(staged, opened)]
    verdicts += age_rules(candidate, opened, dataset, split, config)
    tell("gate: the index")
    verdicts += index_rules(candidate, dataset, found_by_index, signal, config)
    tell("gate: the candidate's models")
    question = Question.draw(dataset, days or split.test, signal, ws.recipe.recall_at, config)
    try:
        ours = ask(candidate, dataset, question)
    except (ValueError, RuntimeError) as error:
        raise GateError(f"the gate refused this candidate: its models cannot answer: {error}") from error
    verdicts += ranking_rules(dataset, question, ours, dataset.rows_on(split.validation), metrics, config)
    if (ws.ranker / "ranker.json").exists():
        floats_NT, _ = score_examples(dataset, Ranker.load(ws.ranker), question.rows_N)
        verdicts += table_rules(dataset, question.rows_N, ours, floats_NT, config)
    verdicts += retrieval_rules(question, ours, metrics, config)
    if live is not None and opened is not None:
        if days:
            tell(f"gate: beside the live bundle {live.version} on {', '.join(days)}")
            verdicts += _beside(ws, dataset, live, opened, question, ours, live_metrics)
        tell("gate: speed")
        verdicts.append(speed_rule(candidate, opened, config))
    tell("gate: answers in a clean process")
    return [*verdicts, answers_rule(staged, config)]


def _beside(
    ws: Workspace,
    dataset: Dataset,
    live: Bundle,
    opened: FeedBundle,
    question: Question,
    ours: Answers,
    live_metrics: dict,
) -> list[Verdict]:
    """The candidate's answers held against the live bundle's."""
    try:
        theirs = ask(opened, read_by(opened.encoder, ws, dataset, ws.split(dataset)), question)
    except (ValueError, RuntimeError) as error:  # this data lacks what the live bundle's features read, say
        return [unreadable(live.folder, live.version, str(error))]
    config = ws.recipe.gate
    return [
        *ranking_against_live(dataset, question, ours, theirs, live_metrics, config),
        *retrieval_against_live(dataset, question, ours, theirs, config),
    ]


def readable(live: Bundle | None) -> tuple[FeedBundle | None, dict, list[Verdict]]:
    """The live bundle opened, and its metrics; or the verdict that this release cannot, though every byte of it is as
    published."""
    if live is None:
        return None, {}, []
    if (found := layout_of(live.folder)) != LAYOUT:
        return None, {}, [unreadable(live.folder, live.version, f"{live.version} has layout {found}")]
    try:
        metrics = json.loads(live.path("metrics.json").read_text())
        if not metrics.get("split"):
            raise ValueError("metrics.json does not say which days it was trained on")
        return FeedBundle.load(live), metrics, []
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        return None, {}, [unreadable(live.folder, live.version, f"{type(error).__name__}: {error}")]
