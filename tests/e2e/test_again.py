"""The same day again: nothing is done twice, nothing comes out differently."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from candidate_gen.train import TowersTask
from features.artifacts import Registry
from features.digests import content_sha256, file_sha256
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.cluster import usable_cpus
from pipelines.day import Day
from pipelines.demo import run_demo
from pipelines.execute import log_hashes
from pipelines.plan import Selection, plan
from pipelines.recipes import Recipe
from pipelines.training.trainer import fit
from pipelines.workspace import Workspace


def no_oracle(*_):
    raise AssertionError("nothing is evaluated here")


@pytest.fixture(scope="module")
def copy(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Day:
    """The demo's run in another place, as it was left."""
    folder = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(demo, folder)
    return Day(ws=Workspace.open(folder), adapter=CanonicalAdapter(folder / "raw"), oracle=no_oracle)


def planned(day: Day, recipe: Recipe | None = None) -> dict[str, str]:
    """{stage: why} of the stages that would run."""
    if recipe is not None:
        day = replace(day, ws=replace(day.ws, recipe=recipe))
    return {d.stage.name: d.why for d in plan(day, log_hashes(day), Selection()) if d.run}


def test_a_finished_run_has_nothing_to_do(copy: Day):
    assert planned(copy) == {}


def test_a_change_of_the_recipe_runs_what_hangs_on_it(copy: Day):
    r = copy.ws.recipe
    assert list(planned(copy, replace(r, popular_days=2))) == ["publish"]
    assert list(planned(copy, replace(r, tables="fp32"))) == ["evaluate", "publish"]
    ranker = planned(copy, replace(r, ranker_train=replace(r.ranker_train, epochs=3)))
    assert ranker["train-ranker"] == "configuration changed (ranker_train.epochs: 2 -> 3)"
    assert list(ranker) == ["train-ranker", "evaluate", "publish"]
    assert planned(copy, replace(r, ranker_train=replace(r.ranker_train, prefetch=7))) == {}
    towers = planned(copy, replace(r, towers=replace(r.towers, temperature=0.1)))
    assert list(towers) == ["train-towers", "index", "evaluate", "publish"]
    spec = replace(r.spec, seed=r.spec.seed + 1)
    assert next(iter(planned(copy, replace(r, spec=spec)))) == "examples"


def test_damage_is_found_in_what_serving_reads(copy: Day):
    bundle = Registry(copy.ws.registry).open(None)
    path = bundle.folder / "towers" / "towers.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "towers/towers.safetensors has sha256" in planned(copy)["publish"]
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert planned(copy) == {}


def test_the_report_says_how_each_stage_went_and_what_the_bundle_holds(demo: Path):
    run = json.loads((demo / "run.json").read_text())
    assert (run["status"], run["exit_code"], run["error"]) == ("ok", 0, None)
    day = {stage["name"]: stage for stage in run["stages"] if stage["fingerprint"]}
    assert list(day) == ["ingest", "examples", "train-towers", "train-ranker", "index", "evaluate", "publish"]
    assert {(stage["status"], stage["why"]) for stage in day.values()} == {("ran", "not made yet")}
    assert all(stage["seconds"] > 0 for stage in day.values())
    bundle = Registry(demo / "registry").open(run["bundle"])
    files = {name: entry["sha256"] for name, entry in bundle.files.items()}
    assert run["content_sha256"] == bundle.content_sha256 == content_sha256(files)
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    assert manifest["content_sha256"] == run["content_sha256"]


def test_training_again_gives_the_same_bits_with_all_threads(demo: Path, tmp_path: Path):
    ws = Workspace.open(demo)
    dataset = ws.dataset()
    split = ws.split(dataset)
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cpus())
    try:
        task = TowersTask(dataset, ws.recipe.towers, split.train, split.validation)
        fit(task, ws.recipe.towers_train, out_dir=tmp_path)
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.name for path in (demo / "towers").iterdir())
    assert files == ["towers.json", "towers.safetensors"]
    assert [file_sha256(tmp_path / name) for name in files] == [file_sha256(demo / "towers" / name) for name in files]


@pytest.mark.slow
def test_the_same_day_in_two_folders_gives_the_same_figures_and_the_same_bundle(demo: Path, tmp_path: Path):
    run_demo("tiny", tmp_path / "again")
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (demo, tmp_path / "again"))
    told = ("data", "split", "retrieval", "pools", "channels", "ranking", "primary", "slices", "slots", "watch", "gate")
    assert {name: first[name] for name in told} == {name: second[name] for name in told}
    assert first["content_sha256"] == second["content_sha256"]
