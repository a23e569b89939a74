"""The DLRM that scorers are compared on: the tables and bottom of `benchmarks.dlrm`, a top of 512-256-1.

N candidates, T tables, D width. TorchRec's own module, its quantised form, and ours: coded tables, and the dense part
compiled as that of the production scorer is. All have the same weights, and every feature differs by candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import PlaceholderObserver
from torch.nn.functional import relu
from torchrec.inference.modules import QuantConfig
from torchrec.models.dlrm import DLRM, SparseArch
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantisedCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.dlrm import BOTTOM, DIM, NAMES, NUMBERS, TABLES, tables
from ranking.compiled import compile_module
from ranking.native import NativeCode
from ranking.products import DenseType, Weights, keep, product
from ranking.tables import Tables

TOP = (512, 256, 1)
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Dense features (N, 13) and rows (N, 26) to logits (N, 1)."""


def flops_per_candidate() -> int:
    """Multiplications and additions of the dense part, the dots counted once a pair."""
    pairs = (TABLES + 1) * TABLES // 2
    widths = [(NUMBERS, *BOTTOM), (BOTTOM[-1] + pairs, *TOP)]
    return 2 * (sum(a * b for layers in widths for a, b in pairwise(layers)) + pairs * DIM)


def torchrec_model(rows: int, seed: int = 0) -> DLRM:
    """TorchRec's module in float32."""
    torch.manual_seed(seed)
    return DLRM(tables(rows), NUMBERS, list(BOTTOM), list(TOP)).eval()


def eager(model: DLRM) -> Score:
    """TorchRec as it is."""
    return lambda dense, rows: model(dense, _bags(rows))


def quantised(model: DLRM) -> Score:
    """TorchRec's int8 tables, the same dense layers under bf16 autocast."""
    collection = model.sparse_arch.embedding_bag_collection
    observers = [PlaceholderObserver.with_args(dtype=kind) for kind in (torch.float, torch.qint8)]
    collection.qconfig = QuantConfig(*observers)  # pyright: ignore[reportArgumentType]
    sparse = SparseArch(QuantisedCollection.from_float(collection))  # pyright: ignore[reportArgumentType]

    def score(dense: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            bottom = model.dense_arch(dense)
            return model.over_arch(model.inter_arch(dense_features=bottom, sparse_features=sparse(_bags(rows))))

    return score


class DotInteraction(nn.Module):
    """The dense part between looked-up embeddings and logit, in the products of our frozen scorers."""

    def forward(self, w: Weights, dense_NC: torch.Tensor, tables_NE: torch.Tensor) -> torch.Tensor:
        """(N, 1) logits."""
        x = dense_NC
        for layer in range(len(BOTTOM)):
            x = relu(product(w, f"bottom.{layer}", x))
        narrow = w["bottom.0"].dtype
        vectors_NTD = torch.cat([x.unsqueeze(1), tables_NE.unflatten(1, (TABLES, DIM))], dim=1).to(narrow)
        dots_NTT = torch.bmm(vectors_NTD, vectors_NTD.transpose(1, 2)).float()
        x = torch.cat([x] + [dots_NTT[:, t, :t] for t in range(1, TABLES + 1)], dim=1)
        for layer in range(len(TOP)):
            x = product(w, f"top.{layer}", x)
            x = relu(x) if layer < len(TOP) - 1 else x
        return x


def ours(model: DLRM, dense: DenseType, folder: Path) -> Score:
    """Int8 tables, and compiled code in that precision."""
    coded, weights = coded_tables(model), dense_weights(model, dense)
    example = (torch.randn(8, NUMBERS), torch.randn(8, TABLES * DIM))
    n = torch.export.Dim("N", min=1, max=1 << 16)
    path = folder / f"dlrm-{dense}.so"
    compile_module(DotInteraction(), (weights, *example), ({name: {} for name in weights}, {0: n}, {0: n}), path)
    code, leaves = NativeCode(path, 1), list(weights.values())

    def score(dense_NC: torch.Tensor, rows_NT: torch.Tensor) -> torch.Tensor:
        return code([*leaves, dense_NC, coded.pooled(rows_NT, (1,) * TABLES)])

    return score


def coded_tables(model: DLRM) -> Tables:
    """The model's tables as int8 rows."""
    bags = model.sparse_arch.embedding_bag_collection.embedding_bags
    return Tables.encode([(name, bags[name].weight.detach()) for name in NAMES], "int8")


def dense_weights(model: DLRM, dense: DenseType) -> Weights:
    """Layers by name, in the order that compiled code takes them."""
    w = Weights()
    # The last layer of the top is a plain Linear, all others stand inside TorchRec's Perceptron.
    for part, arch in (("bottom", model.dense_arch), ("top", model.over_arch)):
        layers = [module for module in arch.modules() if isinstance(module, nn.Linear)]
        for number, layer in enumerate(layers):
            keep(w, f"{part}.{number}", layer.weight.detach(), layer.bias.detach(), dense)
    return w


def _bags(rows_NT: torch.Tensor) -> KeyedJaggedTensor:
    values = rows_NT.t().reshape(-1)
    return KeyedJaggedTensor(keys=list(NAMES), values=values, lengths=torch.ones(len(values), dtype=torch.int32))
