"""Training of one seed: shuffled batches of alike lengths, the best epoch by NDCG@10 on the validation items.

After each epoch everything is on disk, and randomness follows from (seed, epoch, step), so that a killed run goes on
from its last epoch as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipelines.sequential.data import Sequences, Windows, collate
from pipelines.sequential.metrics import KS, Exclude, Scorer, rank_targets, summarise
from pipelines.sequential.model import NextItemConfig, NextItemModel, to_device
from pipelines.training.batches import derived_seed

POOL_BATCHES = 16
"""Batches are cut from so many batches' worth of shuffled windows sorted by length: little padding, much chance."""
TELL_S = 1.0


class SequentialTrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequentialTrainConfig:
    """How to train."""

    epochs: int = 100
    patience: int = 10
    """Epochs without a better NDCG@10 on the validation items before stopping."""
    batch_size: int = 128
    """Windows a step."""
    lr: float = 1e-3
    """AdamW, betas .9 and .98, as HSTU's public configurations have it."""
    weight_decay: float = 0.0
    warmup_steps: int = 100
    all_windows: bool = False
    """Train on the older items of sequences longer than `model.length` too; published figures do not."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: the encoder under autocast (losses and rankings stay float32); auto: where the processor multiplies it
    natively (on a CPU avx512_bf16 or AMX)."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("SequentialTrainConfig: epochs and batch_size must be at least 1")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"SequentialTrainConfig.precision {self.precision!r}: choose auto, fp32 or bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What one epoch did."""

    epoch: int
    train_loss: float
    """Mean over targets, in nats."""
    ndcg: float
    """NDCG@10 on the validation items; NaN in a refit, which has none."""
    hr: float
    wall_s: float
    cpu_s: float
    """Of this process, validation included."""
    targets_per_s: float


class Trainer:
    """State of one seed: model, optimizer, position."""

    def __init__(
        self,
        sequences: Sequences,
        model: NextItemConfig,
        train: SequentialTrainConfig,
        *,
        exclude: Exclude,
        folder: Path,
        device: torch.device,
        refit_epochs: int | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`refit_epochs`: train on the validation items as well, for exactly so many epochs."""
        self.sequences, self.config = sequences, train
        self.exclude: Exclude = exclude
        self.folder, self.device, self.tell = folder, device, tell
        self.refit = refit_epochs is not None
        self.epochs_wanted = train.epochs if refit_epochs is None else refit_epochs
        self.windows = sequences.windows("refit" if self.refit else "train", model.length, all_of=train.all_windows)
        self.validation = sequences.windows("validation", model.length)
        torch.manual_seed(derived_seed(train.seed))
        self.model = NextItemModel(model, sequences.n_items, self._target_share()).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=train.lr, betas=(0.9, 0.98), weight_decay=train.weight_decay
        )
        self.bf16 = train.precision == "bf16" or (train.precision == "auto" and _multiplies_bf16(device))
        self.epochs: list[Epoch] = []
        self.steps_done = 0

    def fit(self) -> None:
        """Train to the end, from wherever the folder's last checkpoint stands; the model is then the best epoch's."""
        self._resume()
        while not self._finished():
            self._train_epoch()
        best = "last" if self.refit else "best"
        self.model.load_state_dict(_part(load_file(self.folder / self._pointers()[best]), "model/"))

    @property
    def best(self) -> Epoch:
        """The epoch that ranked the validation items best."""
        return max(self.epochs, key=lambda e: e.ndcg)

    def scorer(self) -> Scorer:
        """Scores of the whole catalogue by the model as it stands."""
        candidates_VE = self.model.candidates()

        def score(part: Windows) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                query_BE = self.model.last_queries(to_device(collate(self.sequences, part), self.device))
            return query_BE @ candidates_VE.T

        return score

    def evaluate(self, role: Literal["validation", "test"], *, coverage: bool = True) -> dict[str, float]:
        """All metrics of the model as it stands; a third of the time on a CPU is coverage's."""
        self.model.eval()
        windows = self.sequences.windows(role, self.model.config.length)
        with torch.no_grad():
            ranking = rank_targets(
                self.scorer(), self.sequences, windows, self.exclude, tops=max(KS) if coverage else 0
            )
        return summarise(ranking, self.sequences.n_items)

    def _train_epoch(self) -> None:
        epoch, started, cpu_started = len(self.epochs), time.perf_counter(), time.process_time()
        batches = list(self._batches(epoch))
        targets = int(self.windows.size_W.sum())
        per_batch = targets / len(batches)
        loss_sum = done = 0
        told = started
        self.model.train()
        for step, chosen in enumerate(batches):
            torch.manual_seed(derived_seed(self.config.seed, epoch, step))
            loss = self._step(self.windows.take(chosen), per_batch)
            loss_sum, done = loss_sum + loss, done + int(self.windows.size_W[chosen].sum())
            if (now := time.perf_counter()) - told > TELL_S:
                told = now
                self._tell(epoch, step + 1, len(batches), loss_sum / done, done / (now - started))
        seconds = time.perf_counter() - started
        metrics = {} if self.refit else self.evaluate("validation", coverage=False)
        self.epochs.append(
            Epoch(
                epoch=epoch,
                train_loss=loss_sum / targets,
                ndcg=metrics.get("ndcg@10", math.nan),
                hr=metrics.get("hr@10", math.nan),
                wall_s=time.perf_counter() - started,
                cpu_s=time.process_time() - cpu_started,
                targets_per_s=targets / seconds,
            )
        )
        self._save(best=not self.refit and self.best is self.epochs[-1])

    def _step(self, windows: Windows, targets_per_batch: float) -> float:
        """One update; every target weighs the same, however many its batch has. Gives the batch's summed loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, (self.steps_done + 1) / max(1, self.config.warmup_steps))
        batch = to_device(collate(self.sequences, windows), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(batch)
        if not torch.isfinite(loss):
            raise SequentialTrainingError(
                f"seed {self.config.seed}, epoch {len(self.epochs)}: the loss is {float(loss)}; "
                "lower train.lr or raise model.temperature"
            )
        self.optimizer.zero_grad(set_to_none=True)
        (loss / targets_per_batch).backward()
        self.optimizer.step()
        self.steps_done += 1
        return float(loss.detach())

    def _batches(self, epoch: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(derived_seed(self.config.seed, epoch))
        order, size = rng.permutation(len(self.windows)), self.config.batch_size
        batches = []
        for begin in range(0, len(order), POOL_BATCHES * size):
            pool = order[begin : begin + POOL_BATCHES * size]
            pool = pool[np.argsort(self.windows.size_W[pool], kind="stable")]
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        for at in rng.permutation(len(batches)):
            yield batches[at]

    def _target_share(self) -> np.ndarray:
        """(V,) share of each item among the training targets."""
        targets_N = np.zeros(len(self.sequences.item_N) + 1, dtype=np.int64)
        np.add.at(targets_N, self.windows.begin_W + 1, 1)
        np.add.at(targets_N, np.minimum(self.windows.end_W + 1, len(targets_N) - 1), -1)
        counts_V = np.bincount(
            self.sequences.item_N, weights=np.cumsum(targets_N)[:-1], minlength=self.sequences.n_items
        )
        return counts_V / counts_V.sum()

    def _finished(self) -> bool:
        if len(self.epochs) >= self.epochs_wanted:
            return True
        return bool(self.epochs) and not self.refit and len(self.epochs) - 1 - self.best.epoch >= self.config.patience

    def _tell(self, epoch: int, step: int, steps: int, loss: float, rate: float) -> None:
        pace_s = int(self.windows.size_W.sum()) / rate
        if self.epochs:  # these had their validation as well; a machine that is busy now says so by the rate
            pace_s = max(pace_s, sum(e.wall_s for e in self.epochs) / len(self.epochs))
        left_min = (self.epochs_wanted - epoch - step / steps) * pace_s / 60
        best = ""
        if self.epochs and not self.refit:
            best = f", best NDCG@10 {self.best.ndcg:.4f} (epoch {self.best.epoch + 1})"
        self.tell(
            f"seed {self.config.seed}{' refit' if self.refit else ''}, epoch {epoch + 1}/{self.epochs_wanted}, step "
            f"{step}/{steps}, loss {loss:.4f}, {rate:,.0f} targets/s, at most {left_min:,.1f} min left{best}"
        )

    def _save(self, *, best: bool) -> None:
        """Tensors first, then the file that names them, then what nothing names any more goes."""
        epoch = len(self.epochs) - 1
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"adam/{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        last = f"epoch-{epoch:04d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / last)
        kept = {"last": last, "best": last if best or self.refit else self._pointers()["best"]}
        progress = {"pointers": kept, "steps_done": self.steps_done, "epochs": [asdict(e) for e in self.epochs]}
        beside = self.folder / "progress.json.partial"
        beside.write_text(json.dumps(progress, indent=1))
        os.replace(beside, self.folder / "progress.json")
        for file in self.folder.glob("epoch-*.safetensors"):
            if file.name not in kept.values():
                file.unlink()

    def _pointers(self) -> dict[str, str]:
        return json.loads((self.folder / "progress.json").read_text())["pointers"]

    def _resume(self) -> None:
        if not (self.folder / "progress.json").exists():
            return
        progress = json.loads((self.folder / "progress.json").read_text())
        tensors = load_file(self.folder / progress["pointers"]["last"])
        self.model.load_state_dict(_part(tensors, "model/"))
        for name, parameter in self.model.named_parameters():
            state = _part(tensors, f"adam/{name}/")
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(self.device) for key, value in state.items()
            }
        self.steps_done = progress["steps_done"]
        self.epochs = [Epoch(**e) for e in progress["epochs"]]


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
