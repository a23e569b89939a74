"""How soon an upload is found and a removal is gone, under load, and what that costs the searches.

    python -m benchmarks.freshness [--corpus FOLDER] [--videos 1000000] [--minutes 5] [--json FILE]

One process: two threads search at half of the capacity that two threads reached just before, first quietly, then beside
a writer that uploads and removes 1,000 videos a minute each; a compaction falls into the middle. After each upload the
writer searches for the vector until it finds the video, after each removal it searches for the removed vector. Every
result of every search is held against a model of what may be returned. At the end the index is opened again and
compared with the model. Queries and videos are the corpus's (see `benchmarks.vectors`); without one, random mixtures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_s, describe_at_rest, line
from benchmarks.vectors import Corpus
from candidate_gen.delta import NO_VIDEO
from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.live import LiveConfig, LiveIndex
from serving.server import SWITCH_INTERVAL_S

K, PROBE_K = 1000, 10
SEARCHERS = 2
CAPACITY_S, QUIET_S = 10.0, 30.0
GIVE_UP_S = 5.0
"""An upload not found for so long counts as missing."""
INELIGIBLE = 0.05
"""Share of uploads, and of the base's videos, that must never be returned."""
FACTOR = 0x9E3779B97F4A7C15
INVERSE = pow(FACTOR, -1, 2**64)
"""Ids are slot * FACTOR modulo 2^64: spread over all 64 bits, and back to the slot by one multiplication."""


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.freshness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, help="folder of videos-*.npy and queries.npy")
    parser.add_argument("--videos", type=int, default=1_000_000, help="in the base index")
    parser.add_argument("--minutes", type=float, default=5.0, help="of uploads and removals")
    parser.add_argument("--per-minute", type=int, default=1000, help="uploads a minute, and as many removals")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=120)
    machine = describe_at_rest(("faiss-cpu", "numpy"), console)
    faiss.omp_set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    figures = measure(options.corpus, options.videos, options.minutes, options.per_minute, console)
    figures["machine"] = machine
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def ids_of(slots: np.ndarray) -> np.ndarray:
    """Slots -> signed 64-bit ids."""
    return (slots.astype(np.uint64) * np.uint64(FACTOR)).view(np.int64)


def slots_of(ids: np.ndarray) -> np.ndarray:
    """Ids -> slots."""
    return (ids.view(np.uint64) * np.uint64(INVERSE)).astype(np.int64)


@dataclass(slots=True)
class Model:
    """What may be returned: by slot, the instant from which on it may not."""

    gone_since_s: np.ndarray
    wrong: int = 0
    checked: int = 0

    def check(self, ids: np.ndarray, started_s: float) -> None:
        """Count the videos of a result that were removed, and acknowledged as such, before its search began."""
        real = ids[ids != NO_VIDEO]
        self.wrong += int((self.gone_since_s[slots_of(real)] < started_s).sum())
        self.checked += 1


@dataclass(slots=True)
class Load:
    """Latencies of one stretch of searching, in milliseconds."""

    search_ms: list[float]
    response_ms: list[float]
    """From the instant a search was due: it waits when the one before it took long."""
    wall_s: float
    cpu_s: float

    def figures(self) -> dict[str, float]:
        """Per query."""
        search, response = np.array(self.search_ms), np.array(self.response_ms)
        return {
            "searches": len(search),
            "per_s": len(search) / self.wall_s,
            "p50_ms": float(np.median(search)),
            "p99_ms": float(np.percentile(search, 99)),
            "response_p50_ms": float(np.median(response)),
            "response_p99_ms": float(np.percentile(response, 99)),
            "cpu_s": self.cpu_s,
            "wall_s": self.wall_s,
        }


def measure(corpus: Path | None, n: int, minutes: float, per_minute: int, console: Console) -> dict[str, Any]:
    """All figures of one run."""
    n_events = max(int(minutes * per_minute), 2)
    vector_ND, query_QD = _vectors(corpus, n, n_events)
    rng = np.random.default_rng(7)
    slot_V = np.concatenate([[0], 1 + np.argsort(ids_of(np.arange(1, n + 1)))])  # rows in the order of ids
    ids_V = ids_of(slot_V)
    allowed_V = rng.random(n + 1) >= INELIGIBLE
    model = Model(np.full(n + 1 + n_events, np.inf))
    model.gone_since_s[slot_V[~allowed_V]] = -np.inf
    with tempfile.TemporaryDirectory(prefix="freshness-") as scratch:
        began = time.perf_counter()
        rows = np.arange(1, n + 1)
        chunks = (
            (part, vector_ND[slot_V[part] - 1].astype(np.float32)) for part in np.array_split(rows, 1 + n // 65_536)
        )
        sample_QD = None if corpus is None else Corpus.open(corpus).train_queries(10_000)
        base = VideoIndex.build(chunks, n + 1, IndexConfig(), Path(scratch) / "base", query_QD=sample_QD)
        build_s = time.perf_counter() - began
        console.print(f"base of {n:,} videos built in {build_s:.0f} s")
        live = LiveIndex(Path(scratch) / "live", base, ids_V, LiveConfig(compact_at=max(n_events // 2, 2)))
        only = live.allow(allowed_V)
        capacity = _searches(live, only, query_QD, None, CAPACITY_S, model)
        rate = len(capacity.search_ms) / capacity.wall_s / 2
        console.print(f"capacity {2 * rate:.0f} searches/s on {SEARCHERS} threads; from here on {rate:.0f}/s")
        quiet = _searches(live, only, query_QD, rate, min(QUIET_S, 60 * minutes), model)
        writer = _Writer(live, only, vector_ND, slot_V[rng.permutation(rows)], allowed_V, n, n_events, model)
        thread = threading.Thread(target=writer.run, args=(60 * minutes,))
        thread.start()
        loaded = _searches(live, only, query_QD, rate, 60 * minutes, model)
        thread.join()
        live.close()
        sizes = live.sizes()
        reopened = LiveIndex(Path(scratch) / "live", base, ids_V)
        lost = _lost(reopened, writer, vector_ND)
        reopened.close()
    return {
        "corpus": str(corpus or "random mixtures"),
        "videos": n,
        "dim": vector_ND.shape[1],
        "k": K,
        "minutes": minutes,
        "build_s": build_s,
        "capacity_per_s": 2 * rate,
        "quiet": quiet.figures(),
        "loaded": loaded.figures(),
        "p99_ratio": loaded.figures()["p99_ms"] / quiet.figures()["p99_ms"],
        **writer.figures(),
        "results_checked": model.checked,
        "wrong_results": model.wrong,
        "lost_after_restart": lost,
        "at_the_end": {"delta": sizes.delta, "overlay": sizes.overlay, "dead_base": sizes.dead_base},
    }


class _Writer:
    """Uploads and removals in turn, evenly spaced, each followed by a search that looks for it."""

    def __init__(
        self, live: LiveIndex, only: Any, vector_ND: np.ndarray, victims: np.ndarray, allowed_V: np.ndarray, n: int,
        n_events: int, model: Model,
    ) -> None:  # fmt: skip
        self._live, self._only, self._vector_ND, self._model = live, only, vector_ND, model
        self._rng = np.random.default_rng(11)
        self._victims, self._n, self._n_events = list(victims[: 2 * n_events]), n, n_events
        self._row_allowed = allowed_V
        self.there: list[int] = []
        """Slots uploaded, eligible, and not removed."""
        self.removed: list[int] = []
        self.visible_ms: list[float] = []
        self.acknowledged_ms: list[float] = []
        self.gone_ms: list[float] = []
        self.missing = self.not_in_first_search = 0

    def run(self, seconds: float) -> None:
        """All events, from now on."""
        start = time.perf_counter()
        for number in range(self._n_events):
            for half, event in ((0.0, self._upload), (0.5, self._remove)):
                due = start + seconds * (number + half) / self._n_events
                time.sleep(max(due - time.perf_counter(), 0))
                event(number, due)

    def _upload(self, number: int, due: float) -> None:
        slot = self._n + 1 + number
        vector_1D = self._vector_ND[slot - 1 : slot].astype(np.float32)
        video_id, eligible = ids_of(np.array([slot])), self._rng.random() >= INELIGIBLE
        if not eligible:
            self._model.gone_since_s[slot] = -np.inf
        self._live.upsert(video_id, vector_1D, np.array([eligible]))
        self.acknowledged_ms.append(1000 * (time.perf_counter() - due))
        if not eligible:
            self._search(vector_1D)
            return
        self.there.append(slot)
        tries = 0
        while video_id[0] not in self._search(vector_1D):
            tries += 1
            if time.perf_counter() - due > GIVE_UP_S:
                self.missing += 1
                return
        self.not_in_first_search += tries > 0
        self.visible_ms.append(1000 * (time.perf_counter() - due))

    def _remove(self, number: int, due: float) -> None:
        """In turn a video of the base and one uploaded."""
        slot = (
            self.there.pop(int(self._rng.integers(len(self.there))))
            if number % 2 and self.there
            else self._victims.pop()
        )
        self._live.remove(ids_of(np.array([slot])))
        self._model.gone_since_s[slot] = min(time.perf_counter(), self._model.gone_since_s[slot])
        self._search(self._vector_ND[slot - 1 : slot].astype(np.float32))  # the model looks for it
        self.gone_ms.append(1000 * (time.perf_counter() - due))
        self.removed.append(slot)

    def _search(self, vector_1D: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        ids, _ = self._live.search(vector_1D, PROBE_K, allowed=self._only)
        self._model.check(ids[0], started)
        return ids[0]

    def figures(self) -> dict[str, Any]:
        """Of the events, from when each was due."""
        out: dict[str, Any] = {"uploads": len(self.acknowledged_ms), "removals": len(self.gone_ms)}
        for name in ("acknowledged_ms", "visible_ms", "gone_ms"):
            values = np.array(getattr(self, name))
            out[name] = {"p50": float(np.median(values)), "p99": float(np.percentile(values, 99)),
                         "max": float(values.max())}  # fmt: skip
        return {**out, "never_found": self.missing, "not_in_first_search": self.not_in_first_search}


def _searches(
    live: LiveIndex, only: Any, query_QD: np.ndarray, rate: float | None, seconds: float, model: Model
) -> Load:
    """Searches by SEARCHERS threads: as fast as they go, or at instants of a Poisson process of `rate` a second."""
    took: list[float] = []
    waited: list[float] = []
    start, cpu = time.perf_counter(), cpu_s(_pid())

    def work(number: int) -> None:
        rng, due = np.random.default_rng(number), start
        while True:
            due = due + rng.exponential(SEARCHERS / rate) if rate else time.perf_counter()
            if due - start > seconds:
                return
            time.sleep(max(due - time.perf_counter(), 0))
            query_1D = query_QD[rng.integers(len(query_QD))][None]
            began = time.perf_counter()
            ids, _ = live.search(query_1D, K, allowed=only)
            ended = time.perf_counter()
            model.check(ids[0], began)
            took.append(1000 * (ended - began))
            waited.append(1000 * (ended - due))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(SEARCHERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(took, waited, time.perf_counter() - start, cpu_s(_pid()) - cpu)


def _lost(live: LiveIndex, writer: _Writer, vector_ND: np.ndarray) -> int:
    """Acknowledged uploads that a restart does not find, and removals that it undid."""
    wrong = 0
    for slots, expected in ((writer.there, True), (writer.removed, False)):
        for start in range(0, len(slots), 64):
            some = np.array(slots[start : start + 64])
            found_QK, _ = live.search(vector_ND[some - 1].astype(np.float32), PROBE_K)
            wrong += int(((found_QK == ids_of(some)[:, None]).any(axis=1) != expected).sum())
    return wrong


def _vectors(corpus: Path | None, n: int, n_events: int) -> tuple[np.ndarray, np.ndarray]:
    """(float16 vectors of the base and the uploads, float32 queries): slot s is row s - 1."""
    if corpus is not None:
        opened = Corpus.open(corpus)
        vector_ND = np.empty((n + n_events, opened.dim), np.float16)
        for start, block_BD in opened.blocks(n + n_events):
            vector_ND[start : start + len(block_BD)] = block_BD
        return vector_ND, opened.queries(1000)
    rng = np.random.default_rng(5)
    centre_CD = _unit(rng.normal(size=(2000, 64)))
    vector_ND = np.concatenate(
        [_unit(centre_CD[rng.integers(0, 2000, size)] + 0.1 * rng.normal(size=(size, 64))).astype(np.float16)
         for size in np.diff([*range(0, n + n_events, 65_536), n + n_events])]
    )  # fmt: skip
    interests = centre_CD[rng.integers(0, 2000, (1000, 3))].sum(axis=1)
    return vector_ND, _unit(interests + 0.1 * rng.normal(size=interests.shape)).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _pid() -> int:
    import os

    return os.getpid()


def show(figures: dict[str, Any], console: Console) -> None:
    """Three small tables."""
    console.print(
        f"{figures['videos']:,} videos x {figures['dim']} ({figures['corpus']}), {figures['uploads']:,} uploads and "
        f"{figures['removals']:,} removals in {figures['minutes']:g} minutes"
    )
    table = Table("searches", "per s", "p50 ms", "p99 ms", "from due p50", "from due p99", "CPU s", "wall s")
    for name in ("quiet", "loaded"):
        run = figures[name]
        cells = (
            run["p50_ms"],
            run["p99_ms"],
            run["response_p50_ms"],
            run["response_p99_ms"],
            run["cpu_s"],
            run["wall_s"],
        )
        table.add_row(f"{name} ({run['searches']:,})", f"{run['per_s']:.0f}", *(f"{cell:.2f}" for cell in cells))
    console.print(table)
    events = Table("event", "p50 ms", "p99 ms", "max ms")
    names = {"acknowledged_ms": "upload acknowledged", "visible_ms": "upload found", "gone_ms": "removal searched for"}
    for name, label in names.items():
        events.add_row(label, *(f"{figures[name][part]:.2f}" for part in ("p50", "p99", "max")))
    console.print(events)
    console.print(
        f"p99 of searches {figures['p99_ratio']:.2f} times the quiet one; {figures['wrong_results']} wrong videos in "
        f"{figures['results_checked']:,} results; {figures['never_found']} uploads never found, "
        f"{figures['not_in_first_search']} not in the first search after their acknowledgement; "
        f"{figures['lost_after_restart']} lost by a restart; at the end {figures['at_the_end']}"
    )
    console.print(line(figures["machine"]))


if __name__ == "__main__":
    main()
