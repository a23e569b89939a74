"""Rules about the bundle as a thing: do its parts fit together, do callers still find what they send, is it new enough,
does its index say what its towers say?"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np

from candidate_gen.index.check import exact_top
from candidate_gen.train import index_instant
from features.dataset import Dataset
from features.spec import FeatureSpec
from features.transforms import Encoder
from pipelines.evaluate_retrieval import make_queries, user_vectors
from pipelines.gate.config import GateConfig
from pipelines.gate.sides import video_vectors
from pipelines.gate.verdict import Verdict
from pipelines.recipes import Split
from serving.bundle import LAYOUT, FeedBundle
from serving.config import FeedConfig
from serving.encode import content_width

PROBED_USERS, PROBED_VIDEOS, PROBED_K = 200, 100_000, 100


def fit_rules(folder: Path, encoder: Encoder) -> list[Verdict]:
    """Do the bundle's encoder and models read what the models were trained on? Of a staged folder, before anything
    of it is opened; `encoder` is the training data's."""
    spec = FeatureSpec.from_json((folder / "encoder" / "spec.json").read_text())
    odd = _differing(spec, encoder.spec)
    verdicts = [_none("features of the bundle's encoder that differ from the training data's", odd,
                      "encoder/spec.json: bring the spec that the models were trained with")]  # fmt: skip
    towers = json.loads((folder / "towers" / "towers.json").read_text())["sizes"]
    ranker = json.loads((folder / "ranker" / "ranker.json").read_text())["sizes"]
    for side in ("user", "video"):
        columns = encoder.columns(side)
        tables = list(zip(columns.names, columns.table_rows, strict=True))
        read = {
            "towers": [tuple(table) for table in towers[f"{side}_tables"]],
            "ranker": list(zip(ranker[f"{side}_names"], ranker[f"{side}_table_rows"], strict=True)),
        }
        for model, found in read.items():
            wanted = tables if model == "towers" else [table for table in tables if table in found]
            odd = [name for name, _ in set(found) ^ set(wanted)]
            verdicts.append(_none(f"{model}: {side} tables that the encoder does not fill", odd,
                                  f"{model}/{model}.json: it was trained on other features"))  # fmt: skip
    return verdicts


def caller_rules(folder: Path, live: FeedBundle) -> list[Verdict]:
    """What callers of the live bundle send must still be understood: surfaces, and the width of uploads' content."""
    encoder, config = Encoder.load(folder / "encoder"), FeedConfig.from_json((folder / "feed.json").read_text())
    gone = [surface for surface in live.config.surfaces if surface not in config.surfaces]
    ours, theirs = content_width(encoder) or 0, content_width(live.encoder) or 0
    return [
        _none("surfaces of the live bundle that requests could name no more", gone, "the recipe's feed.surfaces"),
        Verdict("width of the content embeddings that uploads carry, as the live bundle has it", ours, theirs, theirs,
                ours == theirs, look_at="the spec's Content feature: uploads of the old width would be refused"),
    ]  # fmt: skip


def layout_of(folder: Path) -> int:
    """Of a bundle; 1 for those from before it was written down."""
    path = folder / "layout.json"
    return json.loads(path.read_text())["layout"] if path.exists() else 1


def unreadable(folder: Path, version: str, why: str) -> Verdict:
    """The live bundle cannot be asked by this release."""
    return Verdict(
        "the live bundle can be read by this release (layout)", layout_of(folder), LAYOUT, None, False, why,
        f"the release that published {version}: judge there; or make a readable version live (`reelrank registry "
        "rollback`); or let this one go without comparison (--force)",
    )  # fmt: skip


def unseen_days(split: Split, live_metrics: dict) -> tuple[tuple[str, ...], Verdict]:
    """The test days after the last one that the live bundle was trained or chosen on: on the others it has seen the
    answers. Without any, nothing can be compared, and the rule is broken."""
    seen = [*live_metrics["split"]["train"], *live_metrics["split"]["validation"]]
    unseen = tuple(day for day in split.test if day > max(seen))
    verdict = Verdict(
        "test days that the live bundle was not trained or chosen on", len(unseen), 1, None, bool(unseen),
        f"its last one is {max(seen)}, the candidate's test days are {', '.join(split.test)}",
        "the split: bring newer days, or hold more out (split.test_days)",
    )  # fmt: skip
    return unseen, verdict


def age_rules(
    candidate: FeedBundle, live: FeedBundle | None, dataset: Dataset, split: Split, config: GateConfig
) -> list[Verdict]:
    """No older than what it replaces, and trained on days near the log's end."""
    trained_to = max((*split.train, *split.validation))
    age = (date.fromisoformat(dataset.dates[-1]) - date.fromisoformat(trained_to)).days
    verdicts = [
        Verdict("days from the last day trained or chosen on to the log's end", age, config.max_training_age_days, None,
                age <= config.max_training_age_days, f"{trained_to} to {dataset.dates[-1]}",
                "the split (split.test_days), or train again on the newer days")
    ]  # fmt: skip
    if live is not None:
        ours, theirs = (bundle.newest_event_ms / 86_400_000 for bundle in (candidate, live))
        verdicts.append(
            Verdict("last event known, in days since 1970: no older than the live bundle's", ours, theirs, theirs,
                    ours >= theirs, f"{_instant(candidate)} against {_instant(live)}",
                    "the data: it ends before what the live bundle already knows")
        )  # fmt: skip
    return verdicts


def index_rules(
    bundle: FeedBundle, dataset: Dataset, found_of_its_own: float, signal: str, config: GateConfig
) -> list[Verdict]:
    """`found_of_its_own`: share of users' exact top, over the vectors it was built from, that the index returned. The
    second rule asks for the exact top over vectors that the bundle's towers give now, as of the log's end."""
    verdicts = [
        Verdict("index returns the exact top of its own vectors", found_of_its_own, config.min_index_recall, None,
                found_of_its_own >= config.min_index_recall, look_at="the recipe's index: probes, rerank, stored type")
    ]  # fmt: skip
    queries = make_queries(dataset, dataset.dates[-1:], signal, at_most=PROBED_USERS, seed=config.seed)
    if len(queries) == 0:
        return verdicts
    rng = np.random.default_rng(config.seed)
    rows = np.flatnonzero(dataset.eligible)
    rows = np.sort(rng.choice(rows, min(len(rows), PROBED_VIDEOS), replace=False))
    k = min(PROBED_K, max(1, len(rows) // 2))
    fresh_RD = video_vectors(bundle, dataset, rows, *index_instant(dataset, ()))
    users_QD = user_vectors(dataset, bundle.towers, queries)
    exact_QK, _ = exact_top([(rows, fresh_RD)], users_QD, k)
    allowed = np.isin(np.arange(bundle.index.n_rows), rows)
    found_QK, _ = bundle.index.search(users_QD, k, allowed=allowed)
    share = float(np.mean([np.isin(exact, found).mean() for exact, found in zip(exact_QK, found_QK, strict=True)]))
    return [
        *verdicts,
        Verdict(f"index returns the exact top {k} of vectors the bundle's towers give now", share,
                config.min_index_recall, None, share >= config.min_index_recall,
                f"{len(queries)} users, {len(rows):,} videos",
                "where the index came from: it holds vectors of other towers, or of an earlier instant"),
    ]  # fmt: skip


def _differing(found: FeatureSpec, wanted: FeatureSpec) -> list[str]:
    """Names of features and settings that are not the same in both."""
    odd = [
        f"{side} {feature.name}"
        for side in ("user", "video")
        for feature in set(getattr(found, side)) ^ set(getattr(wanted, side))
    ]
    for side in ("user", "video"):
        if not odd and getattr(found, side) != getattr(wanted, side):
            odd.append(f"order of {side} features")
    settings = ("history_length", "surface_rows", "max_slot", "seed")
    return sorted({*odd, *(name for name in settings if getattr(found, name) != getattr(wanted, name))})


def _none(rule: str, odd: list[str], look_at: str) -> Verdict:
    return Verdict(rule, len(odd), 0, None, not odd, ", ".join(sorted(odd)), look_at)


def _instant(bundle: FeedBundle) -> str:
    return f"{np.datetime64(bundle.newest_event_ms, 'ms')} in {bundle.version}"
