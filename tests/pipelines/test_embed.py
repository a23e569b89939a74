"""Embedding a corpus in shards: the tower's vectors, once each, on disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines.embed
from candidate_gen.infer import Towers
from candidate_gen.model import TowerConfig
from candidate_gen.train import TowersTask, features_at, index_instant
from features.dataset import Dataset
from pipelines.cluster import ClusterConfig, cluster
from pipelines.embed import Catalogue, Progress, embed

SHARD, BLOCK = 23, 9


@pytest.fixture
def corpus(toy_task, tmp_path: Path) -> SimpleNamespace:
    """80 videos in shards of 23 (the last has 11), towers with random weights, and where the shards go."""
    shutil.copytree(toy_task.folder, tmp_path / "dataset")
    dataset, torch_seed = Dataset.load(tmp_path / "dataset"), 3
    config = TowerConfig(dim=18, embedding_dim=8, hidden=32, layers=1, positives=("click",))
    task = TowersTask(dataset, config, dataset.dates[:1], dataset.dates[1:])
    torch.manual_seed(torch_seed)
    task.export(task.build().state_dict(), tmp_path / "towers")
    return SimpleNamespace(dataset=tmp_path / "dataset", towers=tmp_path / "towers", out=tmp_path / "vectors")


def source(corpus: SimpleNamespace) -> Catalogue:
    dates = Dataset.load(corpus.dataset).dates[1:]
    return replace(Catalogue.of(corpus.dataset, corpus.towers, dates), shard_rows=SHARD, block_rows=BLOCK)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def made_by(corpus: SimpleNamespace) -> int:
    """Videos embedded by another run over the same folder."""
    told: list[Progress] = []
    embed(source(corpus), corpus.out, on_progress=told.append)
    return told[-1].videos_done - (told[0].videos_done - BLOCK) if told else 0


def test_shards_hold_the_towers_vectors_of_every_row_in_order(corpus):
    shards = embed(source(corpus), corpus.out)
    dataset = Dataset.load(corpus.dataset)
    rows = np.arange(1, 81)
    day, now_ms = index_instant(dataset, dataset.dates[1:])
    wanted = Towers.load(corpus.towers).video_vectors(dataset.videos, rows, features_at(dataset, rows, day, now_ms))
    assert [len(shard.rows) for shard in shards] == [23, 23, 23, 11]
    np.testing.assert_array_equal(np.concatenate([shard.rows for shard in shards]), rows)
    got = np.concatenate([shard.vectors() for shard in shards])
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, atol=5e-4)  # half a unit in float16's last place below 1
    np.testing.assert_array_equal(got, np.concatenate([np.load(shard.path) for shard in shards]))


def test_a_rerun_makes_nothing_and_a_changed_tower_makes_everything_again(corpus):
    embed(source(corpus), corpus.out)
    before = files(corpus.out)
    assert made_by(corpus) == 0
    assert files(corpus.out) == before
    weights = load_file(corpus.towers / "towers.safetensors")
    weights["video_mlp.0.bias"] += 1.0
    save_file(weights, corpus.towers / "towers.safetensors")
    assert made_by(corpus) == 80
    assert all(files(corpus.out)[name] != content for name, content in before.items())


def test_a_changed_video_makes_only_its_own_shard_again(corpus):
    embed(source(corpus), corpus.out)
    before = files(corpus.out)
    dense = np.load(corpus.dataset / "videos_dense.npy")
    dense[30] += 1.0  # rows 24 .. 46 are the second shard
    np.save(corpus.dataset / "videos_dense.npy", dense)
    assert made_by(corpus) == 23
    changed = {name for name, content in files(corpus.out).items() if content != before[name]}
    assert changed == {"videos-00001.npy", "videos-00001.json"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from pipelines.embed import Catalogue, embed

    class Killed(Catalogue):
        def blocks(self, shard):
            for number, block in enumerate(super().blocks(shard)):
                if (shard, number) == (2, 1):
                    os.kill(os.getpid(), signal.SIGKILL)
                yield block

    dataset, towers, out, *dates = sys.argv[1:]
    made = Catalogue.of(Path(dataset), Path(towers), tuple(dates))
    fields = {name: getattr(made, name) for name in ("dataset_dir", "towers_dir", "towers", "dates", "dim")}
    embed(Killed(**fields, shard_rows=%d, block_rows=%d), Path(out))
"""


def test_kill_9_in_the_middle_of_a_shard_and_a_rerun_give_the_same_bytes(corpus, tmp_path: Path):
    script = textwrap.dedent(KILLED % (SHARD, BLOCK))
    arguments = [corpus.dataset, corpus.towers, corpus.out, *source(corpus).dates]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = files(corpus.out)
    assert {"videos-00000.json", "videos-00001.json"} <= set(left)
    assert "videos-00002.npy" not in left
    assert any(name.endswith(".tmp") for name in left)
    assert made_by(corpus) == 80 - 2 * SHARD
    embed(source(corpus), tmp_path / "unbroken")
    assert files(corpus.out) == files(tmp_path / "unbroken")


def test_a_stop_between_vectors_and_record_leaves_no_record_of_the_tower_before(corpus, monkeypatch):
    embed(source(corpus), corpus.out)
    before = files(corpus.out)
    first = load_file(corpus.towers / "towers.safetensors")
    save_file({**first, "video_mlp.0.bias": first["video_mlp.0.bias"] + 1}, corpus.towers / "towers.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(pipelines.embed.json, "dumps", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(source(corpus), corpus.out)
    assert files(corpus.out)["videos-00000.npy"] != before["videos-00000.npy"]
    save_file(first, corpus.towers / "towers.safetensors")
    assert made_by(corpus) == SHARD
    assert {name: files(corpus.out)[name] for name in before} == before


def stop(*_, **__):
    raise KeyboardInterrupt


def test_ray_tasks_write_the_same_bytes_as_one_process(corpus, tmp_path: Path):
    told: list[Progress] = []
    with cluster(ClusterConfig(cpus=2)):
        spread = embed(source(corpus), tmp_path / "spread", workers=2, on_progress=told.append)
    alone = embed(source(corpus), corpus.out)
    assert [shard.sha256 for shard in spread] == [shard.sha256 for shard in alone]
    assert files(tmp_path / "spread") == files(corpus.out)
    assert (told[-1].videos_done, told[-1].videos, told[-1].eta_s) == (80, 80, 0)


def test_a_flipped_bit_is_refused_and_what_is_truncated_or_gone_is_made_again(corpus):
    shards = embed(source(corpus), corpus.out)
    content = bytearray(shards[0].path.read_bytes())
    content[np.random.default_rng().integers(len(content))] ^= 1 << np.random.default_rng().integers(8)
    shards[0].path.write_bytes(content)
    with pytest.raises(ValueError, match=r"videos-00000.npy is not the file its record describes"):
        shards[0].vectors()
    whole = files(corpus.out)
    shards[3].path.write_bytes(whole["videos-00003.npy"][:-1])
    (corpus.out / "videos-00002.json").write_bytes(whole["videos-00002.json"][:-9])
    shards[1].path.unlink()
    assert made_by(corpus) == 11 + 2 * SHARD
    assert files(corpus.out) == whole


def test_a_tower_that_gives_nan_is_refused_and_leaves_no_shard(corpus):
    weights = load_file(corpus.towers / "towers.safetensors")
    weights["video_mlp.2.bias"][0] = float("nan")
    save_file(weights, corpus.towers / "towers.safetensors")
    with pytest.raises(ValueError, match="did not train properly"):
        embed(source(corpus), corpus.out)
    assert not list(corpus.out.glob("*.npy"))
