"""The frozen ranker: weights, tables and calibration from a folder, candidates in, probabilities out.

N candidates of B requests, T tasks. Nothing here learns or keeps state, so threads may share one `Ranker`. Its answers
are those of plain float32 on the CPU until `accelerate` has put a faster engine in their place and found it to agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open

from features.inputs import Inputs
from ranking.calibrate import Calibration
from ranking.config import RankerConfig, RankerSizes, config_from
from ranking.frozen import FrozenRanker, Request, Shape, fold
from ranking.requests import Places, random_requests, to_request, together
from ranking.tables import ExportedTables, Precision, TableLayout, Tables
from ranking.value import Scores
from ranking.watch import WatchQuantiles

FILES = ("ranker.safetensors", "ranker.json", "calibration.json")
SIDES = ("user", "video")
PROBED = ((300,), (1,), (1500,), (300, 1, 20))
"""Candidates of the requests on which another engine must agree: alone, as a server asks, and several together."""
State = Mapping[str, torch.Tensor]


class Engine(NamedTuple):
    """Something that computes what `FrozenRanker` does with one ranker's weights, and how far it may be off."""

    name: str
    run: Callable[[Inputs, Places], np.ndarray]
    """Requests and where their candidates stand -> (B, M, T + 1), the logit of the watch-time quantile last."""
    tolerance: float
    """Largest difference of a logit, as a share of 1 + its size."""


class Ranker:
    """Scores candidates one by one: what stands beside a candidate never changes its score."""

    def __init__(
        self,
        config: RankerConfig,
        sizes: RankerSizes,
        dense: State,
        tables: Mapping[str, Tables | ExportedTables],
        watch: WatchQuantiles,
        calibration: Calibration,
    ) -> None:
        self.config, self.sizes, self.tasks = config, sizes, sizes.tasks
        self.dense, self.tables = dense, tables
        self._watch, self._calibration = watch, calibration
        net, weights = FrozenRanker(Shape.of(config, sizes)), fold(dense, config, sizes, "fp32")
        self.plain = self.engine_of("plain fp32", lambda request: net(weights, tuple(request)), 0.0)
        self._engine = self.plain

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `ranker.safetensors`, `ranker.json` and `calibration.json`, as training exports them or `freeze` wrote
        them. Frozen tables stay in the file, mapped."""
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; export the ranker again")
        saved = json.loads((folder / "ranker.json").read_text())
        config, sizes = config_from(saved["config"]), RankerSizes.from_json(saved["sizes"])
        calibration = Calibration.load(folder / "calibration.json")
        if calibration.tasks != sizes.tasks:
            raise ValueError(
                f"{folder / 'calibration.json'} is for tasks {calibration.tasks}, the ranker has {sizes.tasks}; "
                "calibrate this ranker again"
            )
        dense, tables = read_state(folder, config, sizes, saved.get("tables", "fp32"))
        return cls(config, sizes, dense, tables, WatchQuantiles.from_json(saved["watch_quantiles"]), calibration)

    def probe(self, candidates: Sequence[int], seed: int = 1) -> Inputs:
        """Random requests with so many candidates each."""
        return random_requests(self.sizes, candidates, seed)

    @property
    def engine(self) -> str:
        """What computes the scores now."""
        return self._engine.name

    def accelerate(self, engine: Engine) -> None:
        """Let another engine compute, once it has answered random requests as plain float32 does.

        Raises ArithmeticError, and goes on as before, when a logit differs by more than the engine's tolerance."""
        for candidates in PROBED:
            asked = self.probe(candidates)
            expected, found = (self._raw(asked, by) for by in (self.plain, engine))
            off = np.abs(found - expected) / (1 + np.abs(expected))
            if not (off <= engine.tolerance).all():  # a NaN is not within it
                raise ArithmeticError(
                    f"the {engine.name} scorer differs from the plain one by up to {off.max():.2g} of 1 + a logit for "
                    f"requests of {candidates} candidates, more than {engine.tolerance:g}: the plain one goes on"
                )
        self._engine = engine

    def score(self, inputs: Inputs) -> Scores:
        """Calibrated probabilities (N, T) and expected watch time (N,), slot and surface tower off."""
        logits_NT, watch_N = self.logits(inputs)
        quantile_N = 1 / (1 + np.exp(-watch_N.astype(np.float64)))
        return Scores(
            tasks=self.tasks,
            probability_NT=self._calibration.apply(logits_NT),
            watch_ms_N=self._watch.watch_ms(quantile_N, self._watch.durations(inputs)),
        )

    def score_together(self, requests: Sequence[Inputs]) -> list[Scores]:
        """Of several requests computed as one batch, in order."""
        scores = self.score(together(requests))
        ends = np.cumsum([len(inputs.candidate_N) for inputs in requests])[:-1]
        parts = zip(np.split(scores.probability_NT, ends), np.split(scores.watch_ms_N, ends), strict=True)
        return [Scores(self.tasks, probability_NT, watch_ms_N) for probability_NT, watch_ms_N in parts]

    def logits(self, inputs: Inputs, by: Engine | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Before calibration: logits (N, T), and the logit of the watch-time quantile (N,); `by`: not the usual engine.

        Raises ValueError naming an input that is not finite or beyond its table."""
        _check_finite(inputs)
        if len(inputs.candidate_N) == 0:
            return np.zeros((0, len(self.tasks)), np.float32), np.zeros(0, np.float32)
        raw_NT = self._raw(inputs, by or self._engine)
        if not np.isfinite(raw_NT).all():
            raise RuntimeError("the ranker gave a score that is not finite from finite inputs: its weights are damaged")
        return raw_NT[:, :-1], raw_NT[:, -1]

    def engine_of(self, name: str, compute: Callable[[Request], torch.Tensor], tolerance: float) -> Engine:
        """An engine whose tables are looked up here, on the CPU."""

        def run(inputs: Inputs, places: Places) -> np.ndarray:
            return compute(self.request(inputs, places)).numpy()

        return Engine(name, run, tolerance)

    def request(self, inputs: Inputs, places: Places) -> Request:
        """Looked up and laid out."""
        return to_request(inputs, places, self.tables["user"], self.tables["video"])

    def _raw(self, inputs: Inputs, engine: Engine) -> np.ndarray:
        places = Places.of(inputs)
        with torch.inference_mode():
            return places.gather(engine.run(inputs, places))


def read_state(
    folder: Path, config: RankerConfig, sizes: RankerSizes, precision: Precision
) -> tuple[State, dict[str, Tables | ExportedTables]]:
    """(dense parameters, tables by side) of a folder; raises ValueError for a file of other tables than it says."""
    dense, tables = {}, {}
    device = torch.device("cpu")
    with safe_open(folder / "ranker.safetensors", framework="pt") as file:
        for side in SIDES:
            names, rows = getattr(sizes, f"{side}_names"), getattr(sizes, f"{side}_table_rows")
            if f"tables.{side}" in file.keys():  # noqa: SIM118 (not a dict)
                layout = TableLayout(names, rows, config.embedding_dim, precision)
                tables[side] = Tables(layout, file.get_tensor(f"tables.{side}"), device)
            else:
                tables[side] = ExportedTables(exported_tables(file, side, names))
        for name in file.keys():  # noqa: SIM118
            if not name.startswith("tables.") and "_ebc." not in name:
                dense[name] = file.get_tensor(name)
    return dense, tables


def exported_tables(file: Any, side: str, names: tuple[str, ...]) -> list[tuple[str, torch.Tensor]]:
    """One side's float tables, mapped from an open file as training wrote it."""
    return [(name, file.get_tensor(f"{side}_ebc.embedding_bags.{name}.weight")) for name in names]


def _check_finite(inputs: Inputs) -> None:
    for field in fields(Inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise ValueError(f"ranker input {field.name} is {value[at]} at {at}; every feature must be finite")
