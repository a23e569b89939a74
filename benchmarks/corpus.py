"""Vectors at scale for the index benchmarks: a trained video tower's, of videos beyond the world it was trained on.

    python -m benchmarks.corpus --out FOLDER --videos 100e6 [--run RUN --scale small] [--workers 1]

RUN is the folder of a simulated world with trained towers; it is made when it is missing. Further videos come from
the world's own population model (its authors, topics, durations, content), with ids that training never saw, and go
through the run's encoder and video tower as any upload does. Counters and age are those of a catalogue video of the
same author at the index's instant, the age a tenth up or down. Queries are the user tower's, of the test day's
requests. All is drawn by shard and block from the world's seed, so that any shard can be made alone, and again.

FOLDER/videos-00000.npy ...   float16 (1,000,000, D), rows 1 .. 1,000,000 of the catalogue, and so on
FOLDER/queries.npy            float32 (1,000, D): what benchmarks ask
FOLDER/train_queries.npy      float32 (the rest of the test day's users, D): what quantizers may be trained with
FOLDER/meta.json              what it is made of
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xxhash

from candidate_gen.infer import Towers
from candidate_gen.train import index_instant
from features.dataset import Dataset
from features.entities import Entities
from features.inputs import age_features
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.console import Stages
from pipelines.day import Day
from pipelines.embed import embed, opened, split_rows, tower_digest
from pipelines.evaluate_retrieval import make_queries, user_vectors
from pipelines.execute import execute
from pipelines.plan import Selection
from pipelines.recipes import recipe
from pipelines.workspace import Workspace
from pipelines.world import SCALES, generate
from pipelines.world.config import WorldConfig, read_config
from pipelines.world.ids import opaque_ids
from pipelines.world.population import Population, draw_videos, populate, stream
from pipelines.world.tables import videos_table

SHARD_ROWS = 1_000_000
BLOCK_ROWS = 50_000
QUERIES = 1_000
AGE_NOISE = 0.1
"""Standard deviation of the log of a generated video's age over its donor's."""
STREAM = 100
"""First place of this module's streams in the world's seed, clear of the world's own."""


def main() -> None:
    """Make the run if need be, then queries, then shards; goes on where it stopped."""
    parser = argparse.ArgumentParser(prog="benchmarks.corpus", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=float, required=True, help="how many, e.g. 100e6")
    parser.add_argument("--scale", default="small", help="the world that the towers are trained on")
    parser.add_argument("--run", type=Path, help="its run folder; default: runs/corpus-SCALE")
    parser.add_argument("--workers", type=int, default=1, help="processes that make shards")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shown = Stages()
    ws = trained_world(options.run or Path("runs") / f"corpus-{options.scale}", options.scale, shown)
    source = Generated.of(ws, int(options.videos))
    claim(options.out, describe(ws, source))
    if not (options.out / "queries.npy").exists():
        with shown.stage("queries") as stage:
            stage.rows = write_queries(ws, options.out)
    with shown.stage("embed") as stage:
        made = embed(source, options.out, workers=options.workers, on_progress=lambda p: stage.progress(str(p)))
        stage.rows, stage.note = sum(shard.n_rows for shard in made), f"{len(made)} shards in {options.out}"


def trained_world(root: Path, scale: str, shown: Stages) -> Workspace:
    """A run of the world of this scale with trained towers, made unless it is there."""
    if (root / "towers" / "towers.json").exists():
        return Workspace.open(root)
    ws = Workspace.create(root, recipe(f"world-{scale}"))
    with shown.stage("generate") as stage:
        generate(SCALES[scale], ws.root / "raw", lambda *told: stage.progress(" ".join(map(str, told))))
    day = Day(ws=ws, adapter=CanonicalAdapter(ws.root / "raw"))
    with ws.locked():
        execute(day, shown, Selection(only=("ingest", "examples", "train-towers")))
    return ws


def write_queries(ws: Workspace, out: Path) -> int:
    """User vectors of the test day's requests in random order, the first QUERIES apart from the rest."""
    dataset = ws.dataset()
    asked = make_queries(dataset, ws.split(dataset).test, ws.recipe.retrieval_signal)
    vector_QD = user_vectors(dataset, Towers.load(ws.towers), asked)
    vector_QD = vector_QD[np.random.default_rng(STREAM).permutation(len(vector_QD))]
    np.save(out / "train_queries.npy", vector_QD[QUERIES:], allow_pickle=False)
    np.save(out / "queries.npy", vector_QD[:QUERIES], allow_pickle=False)
    return len(vector_QD)


def claim(out: Path, described: dict) -> None:
    """Write meta.json; raises ValueError when the folder holds a corpus that is made of something else."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "meta.json"
    if path.exists():
        there = json.loads(path.read_text())
        differ = sorted(name for name in described if name != "videos" and there.get(name) != described[name])
        if differ:
            raise ValueError(f"{out} holds another corpus ({', '.join(differ)} differ): choose another --out")
        described = {**described, "videos": max(described["videos"], there["videos"])}
    path.write_text(json.dumps(described, indent=2) + "\n")


def describe(ws: Workspace, source: Generated) -> dict:
    """What `meta.json` says."""
    return {
        "what": "vectors of a trained video tower over generated videos, queries of the trained user tower",
        "recipe": ws.recipe.name,
        "world_seed": source.config.seed,
        "towers_sha256": source.towers,
        "videos": source.n_videos,
        "shard_rows": SHARD_ROWS,
        "dim": source.dim,
        "dtype": {"videos": "float16", "queries": "float32"},
        "queries": QUERIES,
        "age_noise": AGE_NOISE,
        "versions": {name: version(name) for name in ("torch", "torchrec", "numpy", "pyarrow")},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """N videos of the population model beyond the world's own, as a source for `pipelines.embed`."""

    run: Path
    config: WorldConfig
    towers: str
    """`tower_digest` of the run's."""
    n_videos: int
    dim: int

    @classmethod
    def of(cls, ws: Workspace, n_videos: int) -> Generated:
        """Of the run's world, through its towers."""
        config, towers = read_config(ws.root / "raw" / "world.json"), tower_digest(ws.towers)
        return cls(run=ws.root, config=config, towers=towers, n_videos=n_videos, dim=ws.recipe.towers.dim)

    def rows(self) -> list[range]:
        """SHARD_ROWS a shard."""
        return split_rows(self.n_videos, SHARD_ROWS)

    def fingerprint(self, shard: int) -> str:
        """Of everything the shard is drawn from, and of the tower."""
        made_from = (self.towers, self.config, self.rows()[shard], BLOCK_ROWS, AGE_NOISE)
        return xxhash.xxh3_128_hexdigest(repr(made_from).encode())

    def blocks(self, shard: int) -> Iterator[np.ndarray]:
        """Drawn, encoded and embedded BLOCK_ROWS at a time."""
        ws = Workspace.open(self.run)
        towers, maker = opened(ws.towers, self.towers), VideoMaker.of(ws, self.config)
        rows = self.rows()[shard]
        for start in range(rows.start, rows.stop, BLOCK_ROWS):
            videos, candidate_dense_NC = maker.block(start, min(BLOCK_ROWS, rows.stop - start))
            yield towers.embed(videos.columns, videos.sparse[1:], videos.dense[1:], candidate_dense_NC)


@dataclass(frozen=True, slots=True)
class VideoMaker:
    """Draws further videos of a world and encodes them as of the index's instant."""

    dataset: Dataset
    config: WorldConfig
    world: Population
    donor_M: np.ndarray
    """Catalogue rows uploaded by the instant, grouped by author."""
    donor_start_A: np.ndarray
    """(authors + 1,) where each author's donors begin."""
    day: int
    now_ms: int

    @classmethod
    def of(cls, ws: Workspace, config: WorldConfig) -> VideoMaker:
        """As of the first instant of the run's test day."""
        dataset, world = ws.dataset(), populate(config)
        day, now_ms = index_instant(dataset, ws.split(dataset).test)
        row_V = dataset.videos.rows_of(world.videos.ids)
        there_V = (row_V > 0) & (world.videos.upload_ts_ms_V < now_ms)
        author_M = world.videos.author_V[there_V]
        order = np.argsort(author_M, kind="stable")
        start_A = np.searchsorted(author_M[order], np.arange(config.n_authors + 1))
        return cls(dataset, config, world, row_V[there_V][order], start_A, day, now_ms)

    def block(self, first: int, n: int) -> tuple[Entities, np.ndarray]:
        """Videos `first` .. `first + n`: encoded, in order of id, and what the prior reads of each (n, C)."""
        config, rng = replace(self.config, n_videos=n), stream(self.config, STREAM, first)
        drawn = draw_videos(config, self.world.authors, rng)
        ids = opaque_ids(n, config.seed * 3 + 3, start=self.config.n_videos + first)
        in_order = np.argsort(ids)  # as the encoder returns them
        drawn = replace(drawn, ids=ids)
        table = videos_table(config, replace(self.world, videos=drawn), noise=rng)
        candidate_dense_NC = self._at_instant(drawn.author_V, rng)
        return self.dataset.encoder.videos(table), candidate_dense_NC[in_order]

    def _at_instant(self, author_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(N, C) of a random donor of the same author; of any, where the author has none."""
        low_N, high_N = self.donor_start_A[author_N], self.donor_start_A[author_N + 1]
        none_N = low_N == high_N
        low_N, high_N = np.where(none_N, 0, low_N), np.where(none_N, len(self.donor_M), high_N)
        donor_N = self.donor_M[rng.integers(low_N, high_N)]
        age_ms_N = self.now_ms - self.dataset.upload_ts_ms[donor_N]
        aged_ms_N = (age_ms_N * np.exp(rng.normal(0, AGE_NOISE, len(donor_N)))).astype(np.int64)
        counters_NC = self.dataset.counters.video(np.full(len(donor_N), self.day), donor_N)
        return np.concatenate([counters_NC, age_features(np.asarray(self.now_ms), self.now_ms - aged_ms_N)], axis=1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
