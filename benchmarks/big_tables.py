"""A ranker with 100 million embedding rows, trained by two workers on one machine, exported, and loaded to score.

    python -m benchmarks.big_tables --rows 100e6 [--scatter] [--json FILE]           # needs about 10 GiB, 25 GB of disk
    python -m benchmarks.big_tables --plan-only --gpus 8 --rows 1e9 [--out FILE]     # the plan alone; needs no GPU

The simulated world's ranker with its user, video and author tables enlarged to 40, 50 and 10% of the rows, 32-d in
fp16 with fp32 row-wise accumulators: 68 bytes a row, 6.8 GB in all, where 64-d fp32 would be 26 GB. Each worker draws
the rows it holds, tables are split by rows into parts of 10 million, and the export passes through a mapped file. The
world's ids hash to few of the rows; --scatter moves the ids of every step elsewhere, so that lookups and updates miss
caches as those of a hundred million users and videos would (such a model learns nothing from ids).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torchrec.distributed.planner import Topology

from benchmarks.machine import describe, line
from features.dataset import Dataset
from features.inputs import Collated
from pipelines import ingest as ingestion
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.recipes import Split, recipe, world_spec
from pipelines.stages import encoded
from pipelines.training.sharding import Traffic, placement, plan_alone, plan_table, table_planner
from pipelines.training.trainer import TrainConfig, TrainResult, fit
from pipelines.world import SCALES, generate
from ranking.config import RankerSizes
from ranking.freeze import freeze
from ranking.infer import Ranker
from ranking.model import RankerModel
from ranking.train import RankerTask

SHARES = {"user_rows": 0.4, "video_rows": 0.5, "author_rows": 0.1}
ROWS_A_PART = 10_000_000
CONFIG = TrainConfig(
    epochs=1,
    batch_size=512,
    lr_dense=3e-3,
    num_workers=2,
    threads=1,
    rows_a_part=ROWS_A_PART,
    warmup_steps=20,
    background_checkpoints=False,
)
PLANNED_BATCH, VIDEOS_A_SAMPLE, TAGS_A_VIDEO = 8192, 20, 2.5
"""A GPU's batch, and what the world `small` shows at batch 1,024: distinct videos a sample, tags a video."""
GPU_GIB = 80
SCATTERED_ABOVE = 1_000_000
"""Tables of more rows are scattered."""


def main() -> None:
    """Plan, or train, export and score."""
    parser = argparse.ArgumentParser(prog="benchmarks.big_tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=float, default=100e6)
    parser.add_argument("--dim", type=int, help="default: 32, and 64 with --plan-only")
    parser.add_argument("--work", type=Path, default=Path("runs/big-tables"))
    parser.add_argument("--scatter", action="store_true")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where --plan-only also writes the plan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    if options.plan_only:
        text = planned(int(options.rows), options.gpus, options.dim or 64)
        console.print(text, highlight=False)
        if options.out:
            options.out.write_text(text + "\n")
        return
    figures = measure(int(options.rows), options.dim or 32, options.work, options.scatter, console)
    console.print(line(figures["machine"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def planned(rows: int, gpus: int, dim: int) -> str:
    """What TorchRec's planner does with the recipe's ranker on so many GPUs of one host."""
    spec = world_spec(**sizes_of(rows))
    config = replace(recipe("world-small").ranker, embedding_dim=dim, half_tables=True)
    with torch.device("meta"):
        model = RankerModel(config, _sizes(spec), {"click": 0.3}, tables_on=torch.device("meta"))
    topology = Topology(
        world_size=gpus, local_world_size=gpus, compute_device="cuda", hbm_cap=GPU_GIB * 2**30, ddr_cap=128 * 2**30
    )
    videos = Traffic(PLANNED_BATCH * VIDEOS_A_SAMPLE, 1.0)
    traffic = {name: Traffic(PLANNED_BATCH, 1.0) for name in model.sizes.user_names}
    traffic |= dict.fromkeys(model.sizes.video_names, videos) | {"tags": Traffic(videos.bags, TAGS_A_VIDEO)}
    planner = table_planner(model, topology, batch_size=PLANNED_BATCH, traffic=traffic)
    plan = placement(plan_alone(planner, model), model)
    a_rank = [sum(t.mib / len(t.ranks) for t in plan if rank in t.ranks) / 1024 for rank in range(gpus)]
    head = (
        f"{rows:,} rows x {dim}, fp16 and fp32 accumulators, {gpus} GPUs of {GPU_GIB} GiB, batch {PLANNED_BATCH} each"
    )
    foot = "GiB of tables a GPU: " + ", ".join(f"{gib:.1f}" for gib in a_rank)
    return "\n".join([head, "", plan_table(plan), "", foot])


def sizes_of(rows: int) -> dict[str, int]:
    """Rows of the three large tables."""
    return {name: int(rows * share) for name, share in SHARES.items()}


def measure(rows: int, dim: int, work: Path, scatter: bool, console: Console) -> dict[str, Any]:
    """Train in two processes, then score from what they exported."""
    machine = describe(("torch", "torchrec", "fbgemm-gpu-cpu"))
    folder, split = _dataset(rows, work)
    out = work.absolute() / "ranker"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    console.print("training on 2 workers")
    workers = [context.Process(target=_work, args=(rank, folder, split, dim, scatter, out, answers)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"exit codes of the workers: {[w.exitcode for w in workers]}; a traceback stands above")
    peaks = dict(answers.get() for _ in workers)
    result = TrainResult.from_json((out / "training.json").read_text())
    console.print(plan_table(result.plan), highlight=False)
    figures = {
        "machine": machine,
        "rows": sum(t.rows for t in result.plan),
        "dim": dim,
        "scattered": scatter,
        "tables_gib": sum(t.mib for t in result.plan) / 1024,
        "samples_per_s": result.epochs[0].samples_per_s,
        "validation_loss": result.best_validation_loss,
        "wall_s": result.wall_s,
        "peak_gib_of_workers": [peaks[rank] for rank in (0, 1)],
        "export_gb": (out / "ranker.safetensors").stat().st_size / 1e9,
        "scoring": _score(folder, split, out),
        "plan": [asdict(t) for t in result.plan],
    }
    for name in ("rows", "tables_gib", "samples_per_s", "validation_loss", "wall_s", "peak_gib_of_workers",
                 "export_gb", "scoring"):  # fmt: skip
        console.print(f"{name}: {figures[name]}")
    return figures


@dataclass(frozen=True)
class Scattered:
    """A ranker task whose ids of large tables lie elsewhere in every step."""

    task: RankerTask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def collate(self, units: np.ndarray, *, seed: int, seed_of_all: int) -> Collated:
        """Ids are moved by one draw a step: distinct ones stay distinct."""
        made = self.task.collate(units, seed=seed, seed_of_all=seed_of_all)
        inputs, rng = made.inputs, np.random.default_rng(seed)
        users, videos = inputs.user_sparse_BW.copy(), inputs.video_sparse_UW.copy()
        for sparse, columns in ((users, inputs.user_columns), (videos, inputs.video_columns)):
            for name, rows in zip(columns.names, columns.table_rows, strict=True):
                if rows > SCATTERED_ABOVE:
                    ids = sparse[:, columns.slice(name)].astype(np.int64)
                    sparse[:, columns.slice(name)] = (ids * int(rng.integers(1, 10**6) * 2 + 1) + seed % rows) % rows
        return replace(made, inputs=replace(inputs, user_sparse_BW=users, video_sparse_UW=videos))


def _dataset(rows: int, work: Path) -> tuple[Path, Split]:
    """The smoke world, encoded for tables of these sizes."""
    canonical, folder = work.absolute() / "canonical", work.absolute() / f"dataset-{rows}"
    if not canonical.exists():
        raw = work.absolute() / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        generate(SCALES["smoke"], raw)
        ingestion.ingest(CanonicalAdapter(raw), canonical)
    dates = tuple(sorted(set(ingestion.load_events(canonical)["date"].to_pylist())))
    split = recipe("world-smoke").split.resolve(dates)
    if not (folder / "dates.json").exists():
        encoded(canonical, world_spec(**sizes_of(rows)), split.train).save(folder)
    return folder, split


def _task(folder: Path, split: Split, dim: int) -> RankerTask:
    config = replace(recipe("world-smoke").ranker, embedding_dim=dim, half_tables=True)
    return RankerTask(Dataset.load(folder), config, split.train, split.validation)


def _work(rank: int, folder: Path, split: Split, dim: int, scatter: bool, out: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(out / "meet"), 2), rank=rank, world_size=2)
    with _PeakMemory() as peak:
        task = _task(folder, split, dim)
        fit(Scattered(task) if scatter else task, CONFIG, out_dir=out, resume=False)
    answers.put((rank, peak.gib))
    dist.destroy_process_group()


class _PeakMemory:
    """The most memory of this process that no file backs, looked at ten times a second."""

    def __enter__(self) -> _PeakMemory:
        self.gib, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.gib = max(self.gib, _anonymous_gib())


def _anonymous_gib() -> float:
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines() if ":" in row)
    return int(rows["RssAnon"].split()[0]) / 2**20


def _score(folder: Path, split: Split, out: Path) -> dict[str, float]:
    """Freeze the exported ranker as publishing does, load it as serving does, and score a thousand candidates of the
    validation day."""
    dataset, frozen, start = Dataset.load(folder), out / "frozen", time.perf_counter()
    made = freeze(out, frozen, "int8")
    frozen_s, before, start = time.perf_counter() - start, _anonymous_gib(), time.perf_counter()
    ranker = Ranker.load(frozen)
    loaded_s = time.perf_counter() - start
    scores = ranker.score(dataset.inputs(dataset.rows_on(split.validation)[:1000], with_slot=False))
    if not np.isfinite(scores.probability_NT).all():
        raise RuntimeError("the exported ranker gives scores that are not finite")
    return {
        "freeze_s": frozen_s,
        "frozen_gb": made.bytes_after / 1e9,
        "load_s": loaded_s,
        "own_memory_gib": _anonymous_gib() - before,
        "candidates": len(scores.watch_ms_N),
    }


def _sizes(spec: Any) -> RankerSizes:
    """Of the world's spec, without data."""
    sparse = [{f.name: f.rows for f in side if hasattr(f, "rows")} for side in (spec.user, spec.video)]
    return RankerSizes(
        user_names=tuple(sparse[0]),
        user_table_rows=tuple(sparse[0].values()),
        video_names=tuple(sparse[1]),
        video_table_rows=tuple(sparse[1].values()),
        user_dense=5,
        video_dense=33,
        candidate_dense=14,
        surface_rows=spec.surface_rows,
        slot_rows=spec.max_slot + 2,
        tasks=("click",),
    )


if __name__ == "__main__":
    main()
