"""The videos a feed knows: the bundle's, and those that were uploaded or removed since.

Rows 0 .. V-1 are the bundle's, rows V, V+1, ... belong to videos it does not know, in the order they came first. A
video keeps its row for as long as the bundle serves, so histories, lists of seen rows and pools mean the same before
and after an upload. What is known of a row lies in the bundle's arrays or, since an upload, in a slot: slots are only
appended, and a row points at its newest. One writer; readers take no lock, and publishing is the assignment of one
reference. N rows of a call, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from features.eligibility import Attributes, Viewer
from features.entities import ByRow, Entities, SparseColumns

BUNDLE, REMOVED = -1, 0
"""In place of a slot: a row that is the bundle's alone, and a row of the bundle whose video was removed."""
_FIRST_ROOM = 256


@dataclass(frozen=True, slots=True)
class Slots:
    """What uploads said, one slot an upload; room for S, grown by doubling. Slot 0 stands for REMOVED."""

    sparse: np.ndarray
    """(S, W) int32, as `Entities.sparse`."""
    dense: np.ndarray
    """(S, D) float32."""
    vectors: np.ndarray
    """(S, E) float16, of length 1."""
    author_id: np.ndarray
    upload_ts_ms: np.ndarray
    duration_ms: np.ndarray
    eligible: np.ndarray
    """(S,) bool; a removal takes it away where it lies."""

    def __len__(self) -> int:
        return len(self.eligible)

    def grown(self, room: int) -> Slots:
        """The same in larger arrays."""
        return Slots(*(_grown(getattr(self, f.name), room) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class _State:
    """What readers see; replaced whole, but for slot numbers, which change in place once the slots are published."""

    slots: Slots
    limits: Attributes
    """By slot: whom each upload may be shown to."""
    changed_rows: np.ndarray
    """Rows of the bundle that were uploaded or removed since, ascending."""
    changed_slots: np.ndarray
    new_ids: np.ndarray
    """By row - V; the first `n_new` count."""
    new_slots: np.ndarray
    n_new: int


class Catalogue:
    """Rows, slots and ids; `put` and `remove` are for one writer at a time."""

    def __init__(self, known: Entities, dim: int) -> None:
        """`known`: the bundle's videos; `dim`: width of the towers' vectors."""
        self.known = known
        self.n_known = len(known) + 1
        """V: row 0 included."""
        widths = ((known.sparse.shape[1], np.int32), (known.dense.shape[1], np.float32), (dim, np.float16))
        sparse, dense, vectors = (np.zeros((_FIRST_ROOM, width), kind) for width, kind in widths)
        author_id, upload_ts_ms, duration_ms = (np.zeros(_FIRST_ROOM, np.int64) for _ in range(3))
        eligible = np.zeros(_FIRST_ROOM, bool)
        slots = Slots(sparse, dense, vectors, author_id, upload_ts_ms, duration_ms, eligible)
        nothing, room = np.zeros(0, np.int64), np.zeros(_FIRST_ROOM, np.int64)
        self._state = _State(slots, Attributes.unlimited(1), nothing, nothing, room, room.copy(), 0)
        self._used = 1
        self._row_of_new: dict[int, int] = {}
        self.changes = 0
        """Calls of `put` and `remove`: two equal readings say that nothing happened between them."""

    @property
    def slots(self) -> Slots:
        """To be read after the slot numbers: newer slots hold all older ones."""
        return self._state.slots

    @property
    def limits(self) -> Attributes:
        """By slot; to be read after the slot numbers."""
        return self._state.limits

    @property
    def changed_rows(self) -> np.ndarray:
        """Rows of the bundle that were uploaded or removed since, ascending."""
        return self._state.changed_rows

    def __len__(self) -> int:
        """Videos that have a row."""
        return self.n_known - 1 + self._state.n_new

    def slots_of(self, rows_N: np.ndarray) -> np.ndarray | None:
        """Slot of each row, BUNDLE where it has none; None where none has one, which costs next to nothing."""
        state, slot_N = self._state, None
        if len(state.changed_rows) and len(rows_N):
            at_N = np.searchsorted(state.changed_rows, rows_N)
            at_N[at_N == len(state.changed_rows)] = 0
            changed_N = state.changed_rows[at_N] == rows_N
            if changed_N.any():
                slot_N = np.where(changed_N, state.changed_slots[at_N], BUNDLE)
        if state.n_new and len(rows_N) and rows_N.max() >= self.n_known:
            slot_N = np.full(len(rows_N), BUNDLE) if slot_N is None else slot_N
            new_N = rows_N >= self.n_known
            slot_N[new_N] = state.new_slots[rows_N[new_N] - self.n_known]
        return slot_N

    def rows_of(self, ids_N: np.ndarray) -> np.ndarray:
        """Rows (N,) int64, 0 for an id that is not known; a removed video keeps its row."""
        rows_N = self.known.rows_of(ids_N)
        if self._row_of_new:
            unknown = np.flatnonzero(rows_N == 0)
            rows_N[unknown] = [self._row_of_new.get(video_id, 0) for video_id in np.asarray(ids_N)[unknown].tolist()]
        return rows_N

    def ids_of(self, rows_N: np.ndarray) -> np.ndarray:
        """Ids (N,) int64 of known rows."""
        rows_N, state = np.asarray(rows_N), self._state
        if not state.n_new or not len(rows_N) or rows_N.max() < self.n_known:
            return self.known.ids_of(rows_N)
        new_N = rows_N >= self.n_known
        ids_N = np.empty(len(rows_N), np.int64)
        ids_N[~new_N] = self.known.ids_of(rows_N[~new_N])
        ids_N[new_N] = state.new_ids[rows_N[new_N] - self.n_known]
        return ids_N

    def uploaded_rows(self) -> np.ndarray:
        """Every row with a slot."""
        state = self._state
        return np.concatenate([state.changed_rows, self.n_known + np.arange(state.n_new)])

    def put(self, ids_N: np.ndarray, said: Slots, limits: pa.Table) -> np.ndarray:
        """Publish what uploads of distinct ids said, `limits` in the canonical columns; returns their rows (N,)."""
        n, state = len(ids_N), self._state
        first, self._used = self._used, self._used + n
        slots = state.slots if self._used <= len(state.slots) else state.slots.grown(2 * self._used)
        for f in fields(Slots):
            getattr(slots, f.name)[first : first + n] = getattr(said, f.name)
        rows_N, slot_N = self.rows_of(ids_N), np.arange(first, first + n)
        new = np.flatnonzero(rows_N == 0)
        rows_N[new] = self.n_known + state.n_new + np.arange(len(new))
        n_new = state.n_new + len(new)
        changed_N = rows_N < self.n_known
        state = _with_changed(state, rows_N[changed_N], slot_N[changed_N])
        new_ids, new_slots = state.new_ids, state.new_slots
        if n_new > len(new_ids):
            new_ids, new_slots = _grown(new_ids, 2 * n_new), _grown(new_slots, 2 * n_new)
        new_ids[rows_N[new] - self.n_known], new_slots[rows_N[new] - self.n_known] = ids_N[new], slot_N[new]
        so_far = state.limits.append(limits)
        self._state = _State(slots, so_far, state.changed_rows, state.changed_slots, new_ids, new_slots, n_new)
        self._point(rows_N, slot_N)  # only now, that the slots are there: rows that had older ones
        self._row_of_new.update(zip(ids_N[new].tolist(), rows_N[new].tolist(), strict=True))
        self.changes += 1
        return rows_N

    def remove(self, rows_N: np.ndarray) -> None:
        """No longer show these (known, distinct) rows; what was known of them stays, for histories."""
        changed = rows_N[rows_N < self.n_known]
        state = self._state = _with_changed(self._state, changed, np.full(len(changed), REMOVED))
        slot_N = self.slots_of(rows_N)
        if slot_N is not None:
            state.slots.eligible[slot_N] = False
        self.changes += 1

    def _point(self, rows_N: np.ndarray, slot_N: np.ndarray) -> None:
        state, new_N = self._state, rows_N >= self.n_known
        state.new_slots[rows_N[new_N] - self.n_known] = slot_N[new_N]
        state.changed_slots[np.searchsorted(state.changed_rows, rows_N[~new_N])] = slot_N[~new_N]


class Column:
    """One column of the catalogue by row: the bundle's array, and the slots' where a row has one."""

    def __init__(self, catalogue: Catalogue, known: ByRow, name: str) -> None:
        self._catalogue, self._known, self._name = catalogue, known, name
        self._first_slot = REMOVED if name == "eligible" else REMOVED + 1
        """A removed video of the bundle is not eligible; all else that was known of it stays."""

    def __getitem__(self, rows_N: np.ndarray) -> np.ndarray:
        slot_N = self._catalogue.slots_of(rows_N)
        if slot_N is None:
            return self._known[rows_N]
        uploaded_N = slot_N >= self._first_slot
        values_N = self._known[np.where(uploaded_N, 0, rows_N)]
        values_N[uploaded_N] = getattr(self._catalogue.slots, self._name)[slot_N[uploaded_N]]
        return values_N


class Counters:
    """Counters are the bundle's: an uploaded video that it does not know has those of row 0, as one without events."""

    def __init__(self, catalogue: Catalogue, known: ByRow) -> None:
        self._n_known, self._known = catalogue.n_known, known

    def __getitem__(self, rows_N: np.ndarray) -> np.ndarray:
        return self._known[np.where(rows_N < self._n_known, rows_N, 0)]


class LiveAttributes:
    """What the rules read of `Attributes`, over the catalogue."""

    def __init__(self, catalogue: Catalogue, known: Attributes) -> None:
        self._catalogue, self._known = catalogue, known

    def broken(self, viewer: Viewer, rows_N: np.ndarray, now_ms: int) -> dict[str, np.ndarray]:
        """A mask (N,) a limit, True where it forbids the row."""
        slot_N = self._catalogue.slots_of(rows_N)
        if slot_N is None:
            return self._known.broken(viewer, rows_N, now_ms)
        uploaded_N = slot_N > REMOVED
        masks = self._known.broken(viewer, np.where(uploaded_N, 0, rows_N), now_ms)
        for name, mask in self._catalogue.limits.broken(viewer, slot_N[uploaded_N], now_ms).items():
            masks[name][uploaded_N] = mask
        return masks


class LiveVideos:
    """What serving reads of `Entities`, over the catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.columns: SparseColumns = catalogue.known.columns
        self.sparse = Column(catalogue, catalogue.known.sparse, "sparse")
        self.dense = Column(catalogue, catalogue.known.dense, "dense")
        self.rows_of, self.ids_of = catalogue.rows_of, catalogue.ids_of

    def __len__(self) -> int:
        return len(self._catalogue)


def _with_changed(state: _State, rows_N: np.ndarray, slot_N: np.ndarray) -> _State:
    """With these rows of the bundle among the changed ones; those that were there keep their slots."""
    fresh = np.flatnonzero(~np.isin(rows_N, state.changed_rows))
    if not len(fresh):
        return state
    fresh = fresh[np.argsort(rows_N[fresh])]
    at = np.searchsorted(state.changed_rows, rows_N[fresh])
    return replace(
        state,
        changed_rows=np.insert(state.changed_rows, at, rows_N[fresh]),
        changed_slots=np.insert(state.changed_slots, at, slot_N[fresh]),
    )


def _grown(array: np.ndarray, room: int) -> np.ndarray:
    larger = np.zeros((room, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
