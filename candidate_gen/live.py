"""The live index: a built index that takes uploads and removals at once, and survives a crash.

Q queries, K results, D width, V rows of a part, N videos of an update. A `VideoIndex` of the catalogue as of its build
(the base) stays as it is; beside it lie an overlay of what came since, rebuilt by `compact` (a second `VideoIndex`, or
while it is small a delta that grows no more), and a delta of the newest, scanned exactly. Removed and replaced rows
lose a bit. Search takes no lock: it reads one reference to a `View`, oldest part first, and starts again in the rare
case that compaction has swapped it meanwhile.
Every update is in the log (`updates.py`) and flushed before the call returns; a restart replays what no overlay holds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np

from candidate_gen.delta import NO_VIDEO, Delta, Found
from candidate_gen.generations import Generation, Generations, fingerprint
from candidate_gen.index import Excluded, IndexConfig, VideoIndex
from candidate_gen.index.filters import lists_of
from candidate_gen.part import Filter, Part
from candidate_gen.updates import RECORD_VIDEOS, Update, UpdateLog

UNIT_SLACK = 0.01
"""A vector's length may be off 1 by this much: float16 and a tower's last rounding."""
COMPACTION_NICE = 10
"""What a compaction in the background gives way by (Linux: a thread has a niceness of its own)."""
_NONE = np.zeros(0, np.int64)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveConfig:
    """When the delta becomes an overlay, and how that is built."""

    compact_at: int = 20_000
    """Entries of the delta that start a compaction in the background (0: only `compact` does). A query scans
    10,000 x 64 in .35 ms of CPU, 50,000 in 1.8, 100,000 in 3.5."""
    index: IndexConfig = field(default_factory=IndexConfig)
    flush: bool = True
    """Wait for the disk before an update is acknowledged; False where the owner keeps the updates himself, and gives
    every start an empty folder."""


@dataclass(frozen=True, slots=True)
class View:
    """What a search reads; replaced whole."""

    base: Part
    overlay: Part | Delta | None
    deltas: tuple[Delta, ...]
    """Oldest first; writers append to the last."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What a start found."""

    replayed: int
    """Updates read from the log."""
    cut_bytes: int
    """Of an update that a crash cut short before it was acknowledged; removed from the log."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Videos by where they lie."""

    delta: int
    overlay: int
    dead_base: int
    """Rows of the base that were removed or replaced."""


class LiveIndex:
    """Search by 64-bit video id over a base index and everything that came and went since."""

    def __init__(
        self, folder: Path, base: VideoIndex, base_ids_V: np.ndarray, config: LiveConfig | None = None
    ) -> None:
        """Open `folder` (created), which belongs to this base alone, and replay its log.

        `base_ids_V`: int64 id by row of the base, ascending from row 1; row 0 is unused. Raises ValueError for a folder
        of another base and for damage (naming the file, in a log the byte), BlockingIOError while it is open elsewhere.
        """
        self.config = config or LiveConfig()
        self._lock = threading.Lock()  # of writers; readers take none
        self._compacting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._filters: weakref.WeakSet[Filter] = weakref.WeakSet()
        folder.mkdir(parents=True, exist_ok=True)
        self._owner = _own(folder)
        try:
            self._open(folder, base, base_ids_V)
        except BaseException:
            os.close(self._owner)
            raise

    def _open(self, folder: Path, base: VideoIndex, base_ids_V: np.ndarray) -> None:
        self._generations = Generations(folder, fingerprint(base_ids_V, base.dim))
        generation = self._generations.open()
        base_part, overlay = Part(base, base_ids_V), None
        self._dead_base = [_NONE]
        if generation is not None:
            self._dead_base.append(base_part.retire(np.array(generation.dead_rows)))
            overlay = _overlay(generation)
        self._overlay_vectors_VD = None if generation is None else generation.vectors_VD
        self._view = View(base_part, overlay, (Delta(base.dim),))
        self._updates = UpdateLog(folder / "log", self._generations.first_segment, base.dim)
        replayed = 0
        for update in self._updates.replay():
            self._apply(update)
            replayed += 1
        self.opened = Opened(replayed, self._updates.cut_bytes)

    @property
    def dim(self) -> int:
        """D."""
        return self._view.base.index.dim

    def upsert(self, video_ids_N: np.ndarray, vectors_ND: np.ndarray, eligible_N: np.ndarray | None = None) -> None:
        """Videos that came, or came again: what was known of them is replaced. On disk and in every search on return.

        Vectors have length 1; they are kept as float16. One that is not `eligible` is in no search until it is upserted
        again; one that the base knows stays under the base's filters (`search`). Of an id given twice the last counts.
        Raises ValueError for what cannot be a video, OSError when the log cannot be written: then nothing may count.
        """
        ids_N = _checked_ids(video_ids_N)
        vectors_ND = self._checked_vectors(vectors_ND, len(ids_N))
        eligible_N = np.ones(len(ids_N), bool) if eligible_N is None else np.asarray(eligible_N, bool)
        if eligible_N.shape != ids_N.shape:
            raise ValueError(f"eligible has shape {eligible_N.shape}, expected {ids_N.shape}")
        self._write(Update(ids_N, vectors_ND, eligible_N))

    def remove(self, video_ids_N: np.ndarray) -> None:
        """Videos that went: on disk, and in no search that starts after the return. Unknown ids are no error."""
        self._write(Update(_checked_ids(video_ids_N), None, None))

    def allow(self, rows: np.ndarray) -> Filter:
        """A filter from a bool a row of the base (V,) or its packed bits (V / 8,) uint8, for any number of searches.

        It speaks for every video of the base, also for those upserted since; a new video carries its eligibility from
        `upsert`. Made once and kept, it costs a search nothing that grows with the catalogue.
        """
        with self._lock:
            only = self._filter(rows)
            self._filters.add(only)
        return only

    def search(
        self,
        query_QD: np.ndarray,
        k: int,
        *,
        allowed: Filter | np.ndarray | None = None,
        excluded_rows: Excluded | None = None,
        excluded_ids: Excluded | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best ids (Q, k) int64 and inner products (Q, k) float32, padded with NO_VIDEO and -inf; k wherever k exist.

        `allowed` is what `allow` takes or, better, made; `excluded_rows` are rows of the base, `excluded_ids` any
        videos: seen, or of blocked authors. Either is one array for all queries or a list of one array a query. Threads
        search, and others write, at the same time.
        """
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        ids = lists_of(excluded_ids, len(query_QD), "excluded_ids", _checked_ids)
        rows = lists_of(excluded_rows, len(query_QD))
        if len(ids) != len(rows):  # one list for all beside one a query
            ids, rows = (one * (len(query_QD) if len(one) == 1 else 1) for one in (ids, rows))
        while True:
            view = self._view
            only = self._filter(allowed) if isinstance(allowed, np.ndarray) else allowed
            found = _search(view, query_QD, k, only, rows, ids)
            if found is not None and self._view is view:
                return found

    def shares_work(self, allowed: Filter | None, k: int) -> bool:
        """Whether searches under a filter cost less asked together, see `VideoIndex.shares_work`: so they do where the
        base is scanned. The delta alone is not worth it (of 20,000 entries: .7 to 1.3 times as many a second)."""
        base = self._view.base
        return base.index.shares_work(base.alive if allowed is None else allowed.allowed, k)

    @property
    def slots(self) -> int | None:
        """Searches at once that there is room for; None: one a core."""
        return self._view.base.index.slots

    def compact(self) -> None:
        """Make overlay and delta one new overlay, and let the log begin after them; searches and writers go on.

        Writers wait for one flush when it begins and for some milliseconds when it ends. Killed at any instant, a
        restart finds the state before or after.
        """
        with self._compacting:
            with self._lock:
                segment = self._updates.rotate()
                view = self._view
                self._view = View(view.base, view.overlay, (*view.deltas, Delta(self.dim)))
                at = np.flatnonzero(_marks(view))
                dead_rows = np.concatenate(self._dead_base)
                self._dead_base = [dead_rows]
            ids, vectors, base_rows = _take(view, self._overlay_vectors_VD, at)
            order = np.argsort(ids)
            generation = self._generations.write(
                ids_V=np.concatenate([[0], ids[order]]),
                base_rows_V=np.concatenate([[0], base_rows[order]]),
                vectors_VD=np.concatenate([np.zeros((1, self.dim), np.float16), vectors[order]]),
                dead_rows=dead_rows,
                first_segment=segment,
                config=self.config.index,
            )
            overlay = _overlay(generation)
            with self._lock:
                if overlay is not None:  # what was removed or replaced while the overlay was built
                    overlay.remove(ids[~_marks(view)[at]])
                self._overlay_vectors_VD = generation.vectors_VD
                self._view = View(view.base, overlay, self._view.deltas[len(view.deltas) :])
            self._updates.drop_before(segment)

    def sizes(self) -> Sizes:
        """How much lies where."""
        view = self._view
        overlay = 0 if view.overlay is None else len(view.overlay)
        return Sizes(sum(len(delta) for delta in view.deltas), overlay, sum(map(len, self._dead_base)))

    def close(self) -> None:
        """Wait for a compaction, flush the log, let go of the folder."""
        if self._thread is not None:
            self._thread.join()
        self._updates.close()
        os.close(self._owner)

    def _write(self, update: Update) -> None:
        sequence = 0
        for piece in update.pieces(RECORD_VIDEOS):
            with self._lock:
                sequence = self._updates.append(piece)
                self._apply(piece)
        if self.config.flush:
            self._updates.sync(sequence)
        with self._lock:
            idle = self._thread is None or not self._thread.is_alive()
            if idle and 0 < self.config.compact_at <= self._view.deltas[-1].length:
                self._thread = threading.Thread(target=self._compact_behind, name="compact", daemon=True)
                self._thread.start()

    def _compact_behind(self) -> None:
        faiss.omp_set_num_threads(1)  # of this thread: searches go on beside it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPACTION_NICE)
        try:
            self.compact()
        except Exception:
            _log.exception("compaction failed: nothing is lost, the delta keeps growing; the next write tries again")

    def _apply(self, update: Update) -> None:
        """Newest first, so that a reader, who goes the other way, never misses a video that is only replaced."""
        view, ids_N, gone_N = self._view, update.ids_N, update.ids_N
        *older, newest = view.deltas
        base_rows_N = view.base.rows_of(ids_N)
        if update.vectors_ND is not None and update.eligible_N is not None:
            last = len(ids_N) - 1 - np.unique(ids_N[::-1], return_index=True)[1]
            shown = last[update.eligible_N[last]]
            newest.append(ids_N[shown], update.vectors_ND[shown].astype(np.float32), base_rows_N[shown])
            gone_N = ids_N[last[~update.eligible_N[last]]]
        newest.remove(gone_N)
        for delta in older:
            delta.remove(ids_N)
        if view.overlay is not None:
            view.overlay.remove(ids_N)
        dead = view.base.retire(base_rows_N)
        self._dead_base.append(dead)
        for only in self._filters:
            only.retire(dead)

    def _checked_vectors(self, vectors_ND: np.ndarray, n: int) -> np.ndarray:
        vectors_ND = np.asarray(vectors_ND)
        if vectors_ND.shape != (n, self.dim):
            raise ValueError(f"vectors have shape {vectors_ND.shape}; {n} videos of this index want ({n}, {self.dim})")
        length_N = np.linalg.norm(vectors_ND.astype(np.float32), axis=1)
        if not (abs(length_N - 1) <= UNIT_SLACK).all():
            raise ValueError(f"vectors have lengths {length_N.min()} .. {length_N.max()}: give vectors of length 1")
        return vectors_ND.astype(np.float16)

    def _filter(self, rows: np.ndarray) -> Filter:
        base = self._view.base
        bits = np.packbits(rows, bitorder="little") if rows.dtype == bool else rows
        if len(rows) != (base.index.n_rows if rows.dtype == bool else len(base.alive.bits)) or bits.dtype != np.uint8:
            raise ValueError(f"`allowed` has {len(rows)} {rows.dtype}, the base {base.index.n_rows} rows")
        return Filter(bits, base)


def _search(
    view: View,
    query_QD: np.ndarray,
    k: int,
    only: Filter | None,
    rows: tuple[np.ndarray, ...],
    ids: tuple[np.ndarray, ...],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Base, overlay, deltas: oldest first, see `_apply`; None when a video was met both old and new: search again.
    Excluded rows of the base and excluded ids: one array each for all queries, or one a query."""
    base = view.base
    base_rows = [_known(row, base.rows_of(one)) for row, one in zip(rows, ids, strict=True)]
    best = base.search(query_QD, k, only=only, excluded_rows=base_rows)
    ids = tuple(np.concatenate([one, base.ids_V[row[row > 0]]]) for row, one in zip(rows, ids, strict=True))
    floor_Q1 = best[1][:, -1:] if k > 0 else np.full((len(query_QD), 1), np.inf, np.float32)
    newer: list[Found] = []
    if isinstance(view.overlay, Part):
        excluded = [_known(view.overlay.rows_of(one)) for one in ids]
        found, scores = view.overlay.search(query_QD, k, only=only, excluded_rows=excluded)
        above = int((scores > floor_Q1).sum(axis=1).max(initial=0))
        newer.append((found[:, :above], scores[:, :above]))
    bits = None if only is None else only.asked_bits
    for delta in _scanned(view):
        if delta.length:
            newer.append(delta.search(query_QD, k, floor_Q1=floor_Q1, allowed_bits=bits, excluded_ids=ids))
    newer = [(found, scores) for found, scores in newer if found.shape[1]]
    if not newer:
        return best
    return None if _is_torn(best, newer, ids) else _merge(best, newer, k)


def _scanned(view: View) -> tuple[Delta, ...]:
    """Oldest first."""
    return (view.overlay, *view.deltas) if isinstance(view.overlay, Delta) else view.deltas


def _merge(best: Found, newer: list[Found], k: int) -> Found:
    """The k best of each query, best first."""
    ids_QM, score_QM = (np.concatenate(arrays, axis=1) for arrays in zip(best, *newer, strict=True))
    order = np.argsort(-score_QM, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids_QM, order, 1), np.take_along_axis(score_QM, order, 1)


def _known(*rows: np.ndarray) -> np.ndarray:
    """All rows together, without 0, which is nobody's."""
    together = np.concatenate(rows)
    return together[together > 0]


def _is_torn(best: Found, newer: list[Found], excluded_ids: tuple[np.ndarray, ...]) -> bool:
    """A writer was between publishing a video's new entry and retiring its old one while parts were read."""
    every_QM = np.sort(np.concatenate([best[0], *(ids for ids, _ in newer)], axis=1), axis=1)
    is_twice = ((every_QM[:, 1:] == every_QM[:, :-1]) & (every_QM[:, 1:] != NO_VIDEO)).any()
    for ids_QM, _ in newer:
        answers = ids_QM if len(excluded_ids) > 1 else (ids_QM,)
        pairs = zip(answers, excluded_ids, strict=True)
        is_twice = is_twice or any(np.isin(ids, excluded).any() for ids, excluded in pairs if len(excluded))
    return bool(is_twice)


def _marks(view: View) -> np.ndarray:
    """Alive or not, of the overlay's rows and then of each delta's entries."""
    overlay = [view.overlay.marks()] if isinstance(view.overlay, Part) else []
    return np.concatenate([*overlay, *(delta.marks() for delta in _scanned(view))])


def _take(view: View, overlay_vectors_VD: np.ndarray | None, at: np.ndarray) -> tuple[np.ndarray, ...]:
    """(ids, float16 vectors, base rows) at places of `_marks`."""
    taken, start = [], 0
    if isinstance(view.overlay, Part) and overlay_vectors_VD is not None and view.overlay.base_rows_V is not None:
        rows, start = at[at < len(view.overlay.ids_V)], len(view.overlay.ids_V)
        taken.append((view.overlay.ids_V[rows], overlay_vectors_VD[rows], view.overlay.base_rows_V[rows]))
    for delta in _scanned(view):
        entries = at[(at >= start) & (at < start + delta.length)] - start
        taken.append(delta.take(entries))
        start += delta.length
    ids, vectors, base_rows = (np.concatenate(column) for column in zip(*taken, strict=True))
    return ids, vectors.astype(np.float16), base_rows


def _overlay(generation: Generation) -> Part | Delta | None:
    ids_V, base_rows_V = np.asarray(generation.ids_V), np.asarray(generation.base_rows_V)
    if generation.index is not None:
        return Part(generation.index, ids_V, base_rows_V)
    if len(ids_V) == 1:
        return None
    few = Delta(generation.vectors_VD.shape[1])
    few.append(ids_V[1:], generation.vectors_VD[1:].astype(np.float32), base_rows_V[1:])
    return few


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    """int64; floats are refused, for they hold no id above 2^53."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise ValueError(f"video ids are {ids.dtype} of shape {ids.shape}: give one dimension of integers")
    if ids.dtype == np.uint64 and (ids > np.uint64(np.iinfo(np.int64).max)).any():
        raise ValueError("video ids hold values above 2^63 - 1: ids are signed 64-bit integers")
    ids = ids.astype(np.int64)
    if (ids == NO_VIDEO).any():
        raise ValueError(f"video id {NO_VIDEO} is the one that pads results: no video may have it")
    return ids


def _own(folder: Path) -> int:
    """One process a folder; the kernel lets go of it when the process dies."""
    handle = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BlockingIOError(error.errno, f"{folder} is open in another process: one live index a folder") from error
    return handle
