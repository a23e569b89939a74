"""The first twenty losses of both models on a small simulated world, by instructions that every x86 processor has.

    python -m tests.pipelines.golden.curve           # print them
    python -m tests.pipelines.golden.curve --write   # after a change that is meant to change what is learnt

Sums of floating-point numbers depend on how many lanes a processor adds at once, and so would these losses: the
settings below turn wide instructions off in numpy, torch, MKL, oneDNN and FBGEMM, and all threads but one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

KEPT = Path(__file__).with_name("curve.json")
PLAIN = {
    "ATEN_CPU_CAPABILITY": "default",
    "FBGEMM_NO_ASMJIT": "1",
    "FBGEMM_NO_AUTOVEC": "1",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Prescott",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
STEPS, BATCH = 20, {"towers": 5, "ranker": 48}
"""Units a step."""
LEARNT_BY = ("torch", "torchrec", "fbgemm-gpu-cpu", "numpy", "polars")


def losses() -> dict[str, list[float]]:
    """Twenty training losses a model, and the validation loss after them."""
    # Not before the settings: libraries read them as they load.
    import dataclasses

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from candidate_gen.train import TowersTask
    from features.dataset import Dataset
    from pipelines.recipes import recipe
    from pipelines.training.checkpoint import Checkpoints
    from pipelines.training.trainer import Run, TrainConfig
    from pipelines.training.workers import process_group
    from pipelines.world import SCALES, generate
    from ranking.train import RankerTask

    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    chosen = recipe("world-tiny")

    class Recorded(Run):
        def _remember(self, step, mean_loss: float) -> None:
            curve.append(mean_loss)
            super()._remember(step, mean_loss)

    with tempfile.TemporaryDirectory() as folder, process_group():
        root = Path(folder)
        generate(dataclasses.replace(SCALES["tiny"], n_users=100, n_videos=200), root / "raw")
        days = {p.parent.name.removeprefix("date="): pq.read_table(p) for p in sorted(root.glob("raw/events/*/*"))}
        split = chosen.split.resolve(tuple(days))
        users, videos = (pq.read_table(root / "raw" / f"{name}.parquet") for name in ("users", "videos"))
        dataset = Dataset.build(
            chosen.spec,
            users=users,
            videos=videos,
            events=pa.concat_tables(t.append_column("date", pa.array([d] * len(t))) for d, t in days.items()),
            undated=None,
            train_dates=split.train,
        )
        found = {}
        for kind, model in ((TowersTask, chosen.towers), (RankerTask, chosen.ranker)):
            task = kind(dataset, model, split.train, split.validation)
            units, curve = task.train_units(), []
            config = TrainConfig(epochs=1, batch_size=BATCH[task.name], warmup_steps=5)
            some = np.random.default_rng(0).permutation(units)[: STEPS * config.batch_size]
            task.train_units = lambda some=some: some  # type: ignore[method-assign]
            with Checkpoints(root / task.name / "checkpoints") as checkpoints:
                run = Recorded(task, config, root / task.name, checkpoints, lambda _: None)
                run.train_epoch()
                run.close_epoch()
            found[task.name] = [*curve, run.cursor.epochs[0].validation_loss]
    return found


def main() -> None:
    """Print or keep the losses; starts itself again where the settings are not made."""
    if any(os.environ.get(name) != setting for name, setting in PLAIN.items()):
        again = [sys.executable, "-m", "tests.pipelines.golden.curve", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | PLAIN)  # noqa: S606
    found = {"versions": {name: version(name) for name in LEARNT_BY}, "losses": losses()}
    text = json.dumps(found, indent=1)
    if "--write" in sys.argv:
        KEPT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
