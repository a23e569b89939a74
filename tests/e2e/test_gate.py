"""The gate on real bundles: what it refuses, what it lets through, and what a refusal leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gate import measure
from benchmarks.gate_plants import PLANTS, exchange_names, plant, run_like
from features.artifacts import Bundle, Registry
from features.durable import DiskError
from pipelines.console import Stage, Stages
from pipelines.exits import EXIT_FAILED, EXIT_REFUSED, exit_code
from pipelines.gate import GateConfig, GateError
from pipelines.gate.answers import answers_rule
from pipelines.gate.judge import readable
from pipelines.publish import publish
from pipelines.workspace import Workspace


@pytest.fixture
def ws(demo: Path, tmp_path: Path) -> Workspace:
    """The demo's run, with a registry of its own."""
    like = run_like(Workspace.open(demo), tmp_path / "run")
    return replace(like, registry=Path(shutil.copytree(demo / "registry", tmp_path / "registry")))


def own_ranker(ws: Workspace) -> Path:
    """The frozen ranker as a folder that may be damaged."""
    good = ws.frozen_ranker.resolve()
    ws.frozen_ranker.unlink()
    return Path(shutil.copytree(good, ws.frozen_ranker))


def test_an_encoder_of_another_configuration_is_refused(ws: Workspace, tmp_path: Path):
    what = next(p for p in PLANTS if p.name == "wrong schema")
    broken = [v for v in plant(what, ws, tmp_path / "planted") if not v.passed]
    assert what.noticed([v.rule for v in broken]) == [v.rule for v in broken]
    assert [(v.candidate, v.bound, v.note) for v in broken] == [(1, 0, "seed")]


def test_swapped_heads_are_refused_and_what_was_forced_past_the_gate_stands_in_the_manifest(ws: Workspace):
    what = next(p for p in PLANTS if p.name == "swapped heads")
    exchange_names(own_ranker(ws))
    before = Registry(ws.registry).live()
    version, verdicts = publish(ws, Stage("publish"), force=True)
    meta = Registry(ws.registry).open().meta
    assert Registry(ws.registry).live() == version
    assert meta["judged_against"] == before
    assert meta["forced"]
    assert meta["forced_rules"] == [v.rule for v in verdicts if not v.passed]
    assert what.noticed(meta["forced_rules"])
    assert all(v.candidate is not None and v.bound is not None and v.look_at for v in verdicts if not v.passed)
    beside = [v for v in verdicts if v.rule.startswith(("recall@", "quick_skip: GAUC", "coverage", "concentration"))]
    assert len(beside) == 6
    assert all(v.candidate == v.live for v in beside if v.rule.startswith("recall@")), "the same towers"
    assert all(v.passed for v in beside), "what was not damaged is not below the live bundle's"


def test_a_refusal_leaves_live_and_the_registry_as_they_were(ws: Workspace):
    path = own_ranker(ws) / "ranker.json"
    described = json.loads(path.read_text())
    described["sizes"]["user_names"][0] = "somebody_else"
    path.write_text(json.dumps(described))
    registry = Registry(ws.registry)
    before = (registry.live(), registry.list(), registry.history())
    with pytest.raises(GateError, match="does not help: such a bundle cannot answer") as refusal:
        publish(ws, Stage("publish"), force=True)
    said = "ranker: user tables that the encoder does not fill: found 1, wanted 0 (somebody_else)"
    assert said in str(refusal.value)
    assert exit_code(refusal.value) == EXIT_REFUSED
    assert (registry.live(), registry.list(), registry.history()) == before
    assert list((ws.registry / ".staging").iterdir()) == []


def test_a_live_bundle_of_another_layout_is_told_with_the_cure(ws: Workspace, tmp_path: Path):
    live = Registry(ws.registry).open()
    folder = tmp_path / "older"
    shutil.copytree(live.folder, folder)
    (folder / "layout.json").write_text('{"layout": 3}')
    opened, _, verdicts = readable(Bundle(folder, "v0", live.created, live.meta, live.files))
    assert opened is None
    assert [(v.candidate, v.passed) for v in verdicts] == [(3, False)]
    assert "let this one go without comparison (--force)" in verdicts[0].look_at
    assert readable(live)[0] is not None


def test_a_clean_process_that_cannot_answer_is_quoted(ws: Workspace, tmp_path: Path):
    live = Registry(ws.registry).open()
    folder = tmp_path / "damaged"
    shutil.copytree(live.folder, folder)
    (folder / "ranker" / "ranker.safetensors").write_bytes(b"")
    verdict = answers_rule(folder, GateConfig())
    assert (verdict.passed, verdict.candidate, verdict.bound) == (False, 0, 100)
    assert "exit code 1" in verdict.note
    assert "Error" in verdict.note


def test_a_full_disk_while_publishing_leaves_live_and_exits_with_1(ws: Workspace, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in ws.registry.rglob("*") if f.is_file())
    options = f"size={size + 2_000_000}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    try:
        registry = Registry(shutil.copytree(ws.registry, disk / "registry"))
        live = registry.live()
        with pytest.raises(DiskError, match="the disk is full: free space there") as refusal:
            publish(replace(ws, registry=registry.root), Stage("publish"))
        assert f"Nothing was published; LIVE is still {live}" in str(refusal.value)
        assert exit_code(refusal.value) == EXIT_FAILED
        assert registry.open().version == live
        assert list((registry.root / ".staging").iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_planted_bad_candidates_are_refused_and_ten_equal_retrains_pass(tmp_path: Path):
    found = measure("tiny", 10, tmp_path, Stages())
    assert {row["seed"]: row["broken"] for row in found["retrains"]} == {seed: [] for seed in range(2, 12)}
    assert [row["plant"] for row in found["plants"] if not row["noticed"]] == []
    assert len(found["plants"]) == 10
