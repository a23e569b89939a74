"""Ten ways to make a bad candidate of a good one, each as it happens to people, and the rules that are meant to notice.

A plant gets a run whose parts are links to the good candidate's and may replace what it likes before the bundle is laid
out (models, data) or after (files of the bundle). Most damage is done to copies; three plants train a ranker.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from candidate_gen.index import VideoIndex
from features.artifacts import Bundle, Registry
from features.dataset import Dataset
from pipelines import ingest, stages
from pipelines.cluster import ClusterConfig, cluster
from pipelines.console import Stage
from pipelines.gate import GateError, Verdict, passed
from pipelines.gate.judge import judge
from pipelines.gate.soundness import fit_rules
from pipelines.publish import write_candidate
from pipelines.workspace import Workspace
from ranking.freeze import freeze
from serving.golden import record

LINKED = ("canonical", "dataset", "towers", "ranker", "ranker-frozen", "metrics.json", "recipe.json",
          "recipe-name.json")  # fmt: skip
BLOATED = 1_536
"""Hidden units of an expert, where 64 do: the same answers at several times the work."""


@dataclass(frozen=True, slots=True)
class Plant:
    """A bad candidate."""

    name: str
    how: str
    meant: tuple[str, ...]
    """Beginnings or ends of the rules that may notice; one of them must."""
    before: Callable[[Workspace], None] = lambda ws: None
    """On a run with links to the good one's parts."""
    after: Callable[[Path, Bundle], None] = lambda staged, live: None
    """On the laid-out bundle, before its golden answers are recorded."""
    trains: bool = False

    def noticed(self, broken: list[str]) -> list[str]:
        """Those of the broken rules that are meant to notice this plant."""
        return [rule for rule in broken if any(part in rule for part in self.meant)]


def run_like(good: Workspace, folder: Path) -> Workspace:
    """A run whose parts are links to another's; its registry is the same."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in LINKED:
        (folder / name).symlink_to((good.root / name).resolve())
    return Workspace.open(folder, good.registry)


def plant(what: Plant, good: Workspace, folder: Path) -> list[Verdict]:
    """Make the bad candidate and have it judged as `publish` would."""
    ws = run_like(good, folder)
    what.before(ws)
    return judged(ws, what.after)


def judged(ws: Workspace, after: Callable[[Path, Bundle], None] = lambda staged, live: None) -> list[Verdict]:
    """Verdicts about a run's candidate beside the registry's live bundle; nothing is published."""
    live, staged = Registry(ws.registry).open(), ws.root / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    dataset, metrics = ws.dataset(), json.loads(ws.metrics.read_text())
    found_by_index = write_candidate(ws, dataset, staged, metrics, Stage("write"))
    after(staged, live)
    fits = fit_rules(staged, dataset.encoder)
    if not passed(fits):
        return fits
    record(staged, now_ms=int(dataset.examples.ts_ms.max()) + 1)
    try:
        return fits + judge(ws, staged, metrics, found_by_index=found_by_index, live=live)
    except GateError as error:
        return [*fits, Verdict(str(error), None, None, None, False)]


def shuffle_labels(ws: Workspace) -> None:
    """A join gone wrong: each training impression gets the outcome of another one."""
    dataset = ws.dataset()
    split = ws.split(dataset)
    rows = dataset.rows_on((*split.train, *split.validation))
    others = np.random.default_rng(1).permutation(rows)
    signals, watch_ms = np.array(dataset.examples.signals), np.array(dataset.examples.watch_ms)
    signals[rows], watch_ms[rows] = signals[others], watch_ms[others]
    good = ws.dataset_dir.resolve()
    _replace_dataset(ws, replace(dataset, examples=replace(dataset.examples, signals=signals, watch_ms=watch_ms)))
    _train_ranker(ws)
    shutil.rmtree(ws.dataset_dir)
    ws.dataset_dir.symlink_to(good)  # the test days are judged with their own labels


def leak_the_outcome(ws: Workspace) -> None:
    """Histories that end with the impression itself: the model reads what it is to predict."""
    dataset = ws.dataset()
    e = dataset.examples
    ends = dataset.history.ends_at(np.asarray(e.user_row), np.asarray(e.ts_ms) + 1)
    _replace_dataset(ws, replace(dataset, examples=replace(e, history_end=ends)))
    _train_ranker(ws)


def zero_towers(ws: Workspace) -> None:
    """An export that wrote the parameters before they were there."""
    _rewrite(ws.towers, "towers.safetensors", torch.zeros_like)


def over_quantise(ws: Workspace) -> None:
    """Tables of one bit a number: the sign, and one size a row."""

    def coarse(name: str, values: torch.Tensor) -> torch.Tensor:
        if "_ebc." not in name:
            return values
        return torch.sign(values) * values.abs().mean(dim=1, keepdim=True)

    kept = ws.ranker.resolve()
    ws.ranker.unlink()
    shutil.copytree(kept, ws.ranker)
    tensors = {name: coarse(name, values) for name, values in load_file(kept / "ranker.safetensors").items()}
    save_file(tensors, ws.ranker / "ranker.safetensors")
    _freeze(ws)
    shutil.rmtree(ws.ranker)
    ws.ranker.symlink_to(kept)  # the float tables, as training exported them


def end_the_log_early(ws: Workspace) -> None:
    """Yesterday's log once more: the data ends a day before what the live bundle knows."""
    dataset, canonical = ws.dataset(), ws.canonical
    dates = dataset.dates[:-1]
    shorter = Dataset.build(
        dataset.encoder.spec,
        users=stages.canonical_table(canonical, "users"),
        videos=stages.canonical_table(canonical, "videos"),
        events=ingest.load_events(canonical, dates),
        undated=ingest.load_table(canonical, "undated"),
        follows=ingest.load_table(canonical, "follows"),
        train_dates=ws.recipe.split.resolve(dates).train,
    )
    _replace_dataset(ws, shorter)


def bloat(ws: Workspace) -> None:
    """Experts with 24 times the hidden units, the new ones at zero: the same answers, later."""
    kept = _copy(ws.frozen_ranker)
    description = json.loads((kept / "ranker.json").read_text())
    hidden, out = description["config"]["expert_widths"]
    tensors = load_file(kept / "ranker.safetensors")
    experts, _, _ = tensors["mixture.out_EHO"].shape

    def padded(values: torch.Tensor) -> torch.Tensor:
        by_expert = values.reshape(experts, hidden, -1)
        return torch.nn.functional.pad(by_expert, (0, 0, 0, BLOATED - hidden))

    for name in ("mixture.hidden.weight", "mixture.hidden.bias"):
        shape = tensors[name].shape[1:]
        tensors[name] = padded(tensors[name]).reshape(experts * BLOATED, *shape).contiguous()
    tensors["mixture.out_EHO"] = padded(tensors["mixture.out_EHO"]).contiguous()
    description["config"]["expert_widths"] = [BLOATED, out]
    (kept / "ranker.json").write_text(json.dumps(description))
    save_file(tensors, kept / "ranker.safetensors")


def keep_the_old_index(staged: Path, live: Bundle) -> None:
    """The towers are new, the index is the live bundle's."""
    shutil.rmtree(staged / "index")
    VideoIndex(live.folder / "index").copy_to(staged / "index")


def change_the_hash(staged: Path, live: Bundle) -> None:
    """An encoder of another configuration: every table fits, every id means somebody else."""
    path = staged / "encoder" / "spec.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, "seed": spec["seed"] + 1}))


def flatten_scores(staged: Path, live: Bundle) -> None:
    """Every impression gets its task's base rate: calibrated, and of no use."""
    path = staged / "ranker" / "calibration.json"
    rates = json.loads((staged / "ranker" / "ranker.json").read_text())["base_rates"]
    tasks = json.loads(path.read_text())
    rate = dict(zip(tasks, rates, strict=True)) if isinstance(rates, list) else rates
    flat = {task: {"slope": 0.0, "intercept": float(np.log(rate[task] / (1 - rate[task])))} for task in tasks}
    path.write_text(json.dumps(flat))


def swap_heads(staged: Path, live: Bundle) -> None:
    """Two heads under each other's name: alike in order, unlike in rate."""
    exchange_names(staged / "ranker")


def exchange_names(ranker: Path) -> None:
    """Of click and long_view, in the folder of a ranker."""
    swapped = {"click": "long_view", "long_view": "click"}
    path = ranker / "ranker.json"
    description = json.loads(path.read_text())
    tasks = [swapped.get(task, task) for task in description["sizes"]["tasks"]]
    description["sizes"]["tasks"] = tasks
    path.write_text(json.dumps(description))
    path = ranker / "calibration.json"
    rows = list(json.loads(path.read_text()).values())
    path.write_text(json.dumps(dict(zip(tasks, rows, strict=True))))


PLANTS = (
    Plant("shuffled labels", "ranker trained on other rows' outcomes", ("better than chance", "GAUC not below"),
          before=shuffle_labels, trains=True),
    Plant("zeroed tower", "every parameter of the towers is 0", ("shortest vector", "recall@", "distinct videos"),
          before=zero_towers),
    Plant("stale index", "the live bundle's index beside new towers", ("towers give now",), after=keep_the_old_index),
    Plant("wrong schema", "encoder with another hash seed", ("features of the bundle's encoder",),
          after=change_the_hash),
    Plant("constant scores", "each task's base rate for everything", ("better than chance",), after=flatten_scores),
    Plant("swapped heads", "click and long_view exchanged", ("calibration", "log loss"), after=swap_heads),
    Plant("over-quantised tables", "one bit a number", ("coded tables",), before=over_quantise),
    Plant("leaked feature", "histories include the impression itself", ("too good to be true",),
          before=leak_the_outcome, trains=True),
    Plant("too old", "the log ends a day before the live bundle's", ("no older than",), before=end_the_log_early),
    Plant("twice as slow", "24 times the hidden units, the same answers", ("processor time",), before=bloat),
)  # fmt: skip


def _replace_dataset(ws: Workspace, dataset: Dataset) -> None:
    ws.dataset_dir.unlink()
    dataset.save(ws.dataset_dir)


def _train_ranker(ws: Workspace) -> None:
    shutil.rmtree(ws.training, ignore_errors=True)
    ws.ranker.unlink()
    with cluster(ClusterConfig()):
        stages.train_model(ws, "ranker", Stage("train"))
    _freeze(ws)


def _freeze(ws: Workspace) -> None:
    ws.frozen_ranker.unlink()
    freeze(ws.ranker, ws.frozen_ranker, ws.recipe.tables)


def _copy(link: Path) -> Path:
    """The link's target as a folder of its own."""
    kept = link.resolve()
    link.unlink()
    shutil.copytree(kept, link)
    return link


def _rewrite(link: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    folder = _copy(link)
    save_file({key: change(values) for key, values in load_file(folder / name).items()}, folder / name)
