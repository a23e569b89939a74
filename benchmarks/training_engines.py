"""One way of training the reference DLRM, in a process of its own: prints samples/s as JSON.

    python -m benchmarks.training_engines "ours bf16" --rows 100000 --steps 20 --threads 2

Our loop reads its samples from a task, collating in the background; the others are handed tensors made beforehand.
The three libraries train their own nearest model: dot products of 26 embeddings of 64 (DeepFM, PNN) and an MLP of
512-512-256; they keep dense gradients for their tables, which is what their speed comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.dlrm import DIM, NAMES, NUMBERS, TOP, DensePart, DlrmTask, draw, tables
from pipelines.training.trainer import TrainConfig, fit

BATCH, LR_DENSE, LR_SPARSE = 2048, 1e-3, 0.01
WARM_UP_STEPS = 4
HIDDEN = tuple(TOP[:-1])


def ours(rows: int, n_tables: int, steps: int, precision: str, own_interaction: bool) -> float:
    """`pipelines.training.trainer.fit`: its second epoch's pace; checkpoints lie between epochs, outside the pace."""
    task = DlrmTask(rows=rows, samples=BATCH * steps, n_tables=n_tables, own_interaction=own_interaction)
    config = TrainConfig(
        epochs=2, batch_size=BATCH, lr_dense=LR_DENSE, lr_sparse=LR_SPARSE, precision=precision, patience=2
    )
    with tempfile.TemporaryDirectory() as folder:
        return fit(task, config, out_dir=Path(folder)).epochs[1].samples_per_s


def torchrec(rows: int, n_tables: int, steps: int, autocast: bool) -> float:
    """TorchRec as its documentation shows it: planner, DistributedModelParallel, fused row-wise Adagrad, Adam."""
    from torch._C._distributed_c10d import HashStore
    from torchrec import KeyedJaggedTensor
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.optimizers import in_backward_optimizer_filter
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    ebc = tables(rows, n_tables=n_tables)
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": LR_SPARSE, "eps": 1e-8})
    dlrm = DLRM(ebc, NUMBERS, [512, 256, DIM], TOP)
    model = DistributedModelParallel(DLRMTrain(dlrm), device=torch.device("cpu"))
    dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters())]
    optimizer = torch.optim.Adam(dense, lr=LR_DENSE)

    class Sample:  # what DLRMTrain reads
        def __init__(self, ids: np.ndarray, numbers: np.ndarray, label: np.ndarray) -> None:
            self.dense_features, self.labels = torch.from_numpy(numbers), torch.from_numpy(label)
            self.sparse_features = KeyedJaggedTensor(
                keys=list(NAMES[:n_tables]),
                values=torch.from_numpy(ids.T.astype(np.int64).ravel()),
                lengths=torch.ones(ids.size, dtype=torch.int32),
            )

    def step(sample: Sample) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model(sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return _pace(step, [Sample(*draw(BATCH, rows, seed, n_tables)) for seed in range(steps + WARM_UP_STEPS)])


def plain(rows: int, n_tables: int, steps: int, autocast: bool) -> float:
    """`nn.EmbeddingBag` with sparse gradients and torch's own Adagrad (an accumulator an element)."""
    bags = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum", sparse=True) for _ in range(n_tables))
    dense, offsets = DensePart(n_tables), torch.arange(BATCH)
    optimizers = [
        torch.optim.Adagrad(bags.parameters(), lr=LR_SPARSE),
        torch.optim.Adam(dense.parameters(), lr=LR_DENSE),
    ]

    def step(sample: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        ids_FB, numbers, label = sample
        embedded = torch.stack([bag(ids, offsets) for bag, ids in zip(bags, ids_FB, strict=True)], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = dense(numbers, embedded)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    samples = []
    for seed in range(steps + WARM_UP_STEPS):
        ids, numbers, label = draw(BATCH, rows, seed, n_tables)
        samples.append(
            (torch.from_numpy(ids.T.astype(np.int64).copy()), torch.from_numpy(numbers), torch.from_numpy(label))
        )
    return _pace(step, samples)


def deepctr_torch(rows: int, n_tables: int, steps: int) -> float:
    """deepctr-torch's PNN with inner products, by its own `train_on_batch` cycle inside `fit`."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import PNN

    features = [SparseFeat(name, rows, DIM) for name in NAMES[:n_tables]]
    model = PNN([*features, DenseFeat("numbers", NUMBERS)], dnn_hidden_units=HIDDEN, use_inner=True)
    model.compile("adam", "binary_crossentropy")

    def pace(n_steps: int) -> float:
        ids, numbers, label = draw(BATCH * n_steps, rows, 1, n_tables)
        given = dict(zip(NAMES, ids.T, strict=False)) | {"numbers": numbers}
        start = time.perf_counter()
        model.fit(given, label, batch_size=BATCH, epochs=1, verbose=0)
        return BATCH * n_steps / (time.perf_counter() - start)

    pace(1)
    return pace(steps)


def torch_rechub(rows: int, n_tables: int, steps: int) -> float:
    """torch-rechub's DeepFM by its own trainer's epoch."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer

    sparse = [SparseFeature(name, vocab_size=rows, embed_dim=DIM) for name in NAMES[:n_tables]]
    numeric = [DenseFeature(f"n{number}") for number in range(NUMBERS)]
    model = DeepFM(deep_features=[*numeric, *sparse], fm_features=sparse, mlp_params={"dims": list(HIDDEN)})

    def batches(n_steps: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        made = []
        for seed in range(n_steps):
            ids, numbers, label = draw(BATCH, rows, seed, n_tables)
            columns = {name: torch.from_numpy(ids[:, i].astype(np.int64)) for i, name in enumerate(NAMES[:n_tables])}
            columns |= {f"n{i}": torch.from_numpy(numbers[:, i].copy()) for i in range(NUMBERS)}
            made.append((columns, torch.from_numpy(label)))
        return made

    with tempfile.TemporaryDirectory() as folder:
        trainer = CTRTrainer(model, n_epoch=1, device="cpu", model_path=folder)
        trainer.train_one_epoch(batches(1))
        given, start = batches(steps), time.perf_counter()
        trainer.train_one_epoch(given)
        return BATCH * steps / (time.perf_counter() - start)


def recbole(rows: int, n_tables: int, steps: int) -> float:
    """RecBole's PNN with inner products, by its own trainer's epoch, on files of its own format."""
    import pandas as pd

    for name, now in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        setattr(np, name, now)  # RecBole 1.2.1 asks for names that numpy 2 took away
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.context_aware_recommender.pnn import PNN
    from recbole.trainer import Trainer

    # a vocabulary is what the file holds: three draws a row of a table show 95% of its rows
    n = max(BATCH * (steps + 1), 3 * rows)
    ids, _, label = draw(n, rows, 0, n_tables)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # RecBole leaves logs where it stands
        (Path(folder) / "synthetic").mkdir()
        columns = {"user_id:token": ids[:, 0], "item_id:token": ids[:, 1]}
        columns |= {f"{name}:token": ids[:, i] for i, name in enumerate(NAMES[:n_tables]) if i > 1}
        frame = pd.DataFrame({**columns, "label:float": label})
        frame.to_csv(Path(folder) / "synthetic" / "synthetic.inter", sep="\t", index=False)
        names = ["user_id", "item_id", *NAMES[2:n_tables], "label"]
        config = Config(
            model="PNN",
            dataset="synthetic",
            config_dict={
                "data_path": folder,
                "load_col": {"inter": names},
                "LABEL_FIELD": "label",
                "threshold": None,
                "embedding_size": DIM,
                "mlp_hidden_size": list(HIDDEN),
                "use_inner": True,
                "use_outer": False,
                "train_batch_size": BATCH,
                "eval_args": {"split": {"RS": [0.98, 0.01, 0.01]}, "order": "RO", "mode": "labeled"},
                "metrics": ["AUC"],
                "valid_metric": "AUC",
                "train_neg_sample_args": None,
                "use_gpu": False,
                "checkpoint_dir": folder,
                "show_progress": False,
            },
        )
        train, *_ = data_preparation(config, create_dataset(config))
        model = PNN(config, train.dataset)
        trainer = Trainer(config, model)

        def first(n_steps: int) -> list[Any]:
            return [batch for batch, _ in zip(train, range(n_steps), strict=False)]

        trainer._train_epoch(first(1), 0)
        given, start = first(steps), time.perf_counter()
        trainer._train_epoch(given, 0)
        return BATCH * len(given) / (time.perf_counter() - start)


def _pace(step: Callable[[Any], None], samples: Iterable[Any]) -> float:
    samples = list(samples)
    for sample in samples[:WARM_UP_STEPS]:
        step(sample)
    start = time.perf_counter()
    for sample in samples[WARM_UP_STEPS:]:
        step(sample)
    return BATCH * (len(samples) - WARM_UP_STEPS) / (time.perf_counter() - start)


ENGINES: dict[str, Callable[[int, int, int], float]] = {
    "ours bf16": lambda r, t, s: ours(r, t, s, "bf16", True),
    "ours fp32": lambda r, t, s: ours(r, t, s, "fp32", True),
    "ours bf16, TorchRec's interaction": lambda r, t, s: ours(r, t, s, "bf16", False),
    "TorchRec bf16": lambda r, t, s: torchrec(r, t, s, True),
    "TorchRec fp32": lambda r, t, s: torchrec(r, t, s, False),
    "EmbeddingBag bf16": lambda r, t, s: plain(r, t, s, True),
    "EmbeddingBag fp32": lambda r, t, s: plain(r, t, s, False),
    "deepctr-torch": deepctr_torch,
    "torch-rechub": torch_rechub,
    "RecBole": recbole,
}
OURS = [name for name in ENGINES if name.startswith("ours")]
LIBRARIES = {"deepctr-torch": "deepctr-torch", "torch-rechub": "torch-rechub", "RecBole": "recbole"}
"""Those that --peers-python runs, and their distributions."""


def main() -> None:
    """Run one engine."""
    parser = argparse.ArgumentParser(prog="benchmarks.training_engines", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tables", type=int, default=len(NAMES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pace = ENGINES[options.engine](options.rows, options.tables, options.steps)
    print(json.dumps({"samples_per_s": pace}))


if __name__ == "__main__":
    main()
