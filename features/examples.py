"""Impressions as arrays: the columns of the canonical events, each id replaced by its entity's row.

E examples, S signals. The events come in parts (a day, a file), which are read and encoded side by side and never lie
in memory together; each writes its own range of the arrays, so that the result is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.arrays import Allocate
from features.entities import mapped
from features.follows import reported
from features.history import signal_bits, watch_fraction
from features.lookup import RowIndex
from features.schema import SIGNALS
from features.spec import FeatureSpec
from features.transforms import Encoder

EVENT_COLUMNS = ("user_id", "video_id", "author_id", "ts_ms", "surface", "slot", "watch_ms", "duration_ms", *SIGNALS)
"""What examples are made of; the other columns of the events are not read."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Impressions."""

    user_row: np.ndarray
    video_row: np.ndarray
    ts_ms: np.ndarray
    day: np.ndarray
    """(E,) int64, index into `Dataset.dates`; BEFORE for those that precede the log."""
    history_end: np.ndarray
    """(E,) int64, position in the history log one past the last event the impression may see."""
    surface: np.ndarray
    slot: np.ndarray
    signals: np.ndarray
    """(E, S) float32, NaN for not logged."""
    watch_ms: np.ndarray
    """(E,) float32, NaN for not logged."""
    duration_ms: np.ndarray
    followed: np.ndarray
    """(E,) bool, whether the user followed the author strictly before the impression."""

    def __len__(self) -> int:
        return len(self.user_row)

    def take(self, rows_B: np.ndarray) -> Examples:
        """These impressions, in this order."""
        return Examples(*(np.asarray(getattr(self, f.name)[rows_B]) for f in fields(self)))

    def __add__(self, other: Examples) -> Examples:
        return Examples(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))

    def save(self, folder: Path, name: str) -> None:
        """Write `NAME_FIELD.npy` for each field into an existing folder."""
        for f in fields(self):
            np.save(folder / f"{name}_{f.name}.npy", getattr(self, f.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str) -> Examples:
        """Memory-map what `save` wrote."""
        return cls(*(mapped(folder / f"{name}_{f.name}.npy") for f in fields(cls)))

    @classmethod
    def allocate(cls, allocate: Allocate, name: str, size: int) -> Examples:
        """Arrays to be filled."""
        kinds = {"signals": np.float32, "watch_ms": np.float32, "duration_ms": np.float32, "followed": np.bool_}
        shapes = {"signals": (size, len(SIGNALS))}
        return cls(
            *(
                allocate(f"{name}_{f.name}", shapes.get(f.name, (size,)), kinds.get(f.name, np.int64))
                for f in fields(cls)
            )
        )


@dataclass(frozen=True, slots=True)
class EventPart:
    """Some rows of the events that are read together."""

    rows: int
    date: str | None
    """The day of every row; None where the rows' `date` column says it."""
    read: Callable[[], pa.Table]
    """Its EVENT_COLUMNS, and `date` where the part has not one day."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass over the events says of the entities and of those who look at them."""

    users: np.ndarray
    """(users + 1,) bool by row, whether the user has an impression on a training date."""
    videos: np.ndarray
    bits: np.ndarray
    """(E,) uint8, the signals as a mask."""
    watch_fraction: np.ndarray
    """(E,) float32."""
    follows: list[pa.Table]
    """user_id, author_id and ts_ms of the follows that the events report, by part."""


def parts_of(events: pa.Table | Sequence[EventPart]) -> Sequence[EventPart]:
    """A table that is already in memory is one part."""
    return [EventPart(len(events), None, lambda: events)] if isinstance(events, pa.Table) else events


def dates_of(parts: Sequence[EventPart]) -> tuple[str, ...]:
    """Distinct dates, ascending."""
    found = {part.date for part in parts if part.date is not None and part.rows}
    for part in parts:
        if part.date is None:
            found.update(part.read()["date"].unique().to_pylist())
    return tuple(sorted(found))


def ids_on(parts: Sequence[EventPart], dates: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct user ids and video ids of the impressions of these dates."""
    found: dict[str, list[np.ndarray]] = {"user_id": [], "video_id": []}
    for part in parts:
        if part.date is not None and part.date not in dates:
            continue
        table = part.read()
        if part.date is None:
            table = table.filter(pc.call_function("is_in", [table["date"]], pc.SetLookupOptions(pa.array(dates))))
        for column, ids in found.items():
            ids.append(np.unique(integers(table, column)))
    users, videos = (np.unique(np.concatenate([np.zeros(0, np.int64), *ids])) for ids in found.values())
    return users, videos


def encode_events(
    parts: Sequence[EventPart],
    examples: Examples,
    spec: FeatureSpec,
    user_ids: np.ndarray,
    video_ids: np.ndarray,
    *,
    dates: tuple[str, ...],
    train_dates: tuple[str, ...],
    workers: int,
) -> Seen:
    """Fill `examples`, except for `history_end` and `followed`. Ids are those of the entities, ascending."""
    size = len(examples)
    seen = Seen(
        users=np.zeros(len(user_ids) + 1, bool),
        videos=np.zeros(len(video_ids) + 1, bool),
        bits=np.empty(size, np.uint8),
        watch_fraction=np.empty(size, np.float32),
        follows=[pa.table({})] * len(parts),
    )
    ids = {"user_id": RowIndex(user_ids), "video_id": RowIndex(video_ids)}
    encoder = Encoder(spec=spec, stats={}, known={})  # surfaces and slots need nothing that is fitted
    starts = np.concatenate([[0], np.cumsum([part.rows for part in parts])]).astype(np.int64)

    def fill(number: int) -> None:
        part, at = parts[number], slice(int(starts[number]), int(starts[number + 1]))
        table = part.read()
        if len(table) != part.rows:
            raise ValueError(f"events of {part.date}: {len(table)} rows, announced were {part.rows}; ingest them again")
        for row, name in ((examples.user_row, "user_id"), (examples.video_row, "video_id")):
            row[at] = ids[name].rows(integers(table, name))
        examples.ts_ms[at] = integers(table, "ts_ms")
        examples.day[at] = dates.index(part.date) if part.date is not None else _coded(table["date"], list(dates))
        examples.surface[at] = _surfaces(table["surface"], encoder)
        examples.slot[at] = encoder.slot_rows(integers(table, "slot", null=-1))
        examples.watch_ms[at], examples.duration_ms[at] = floats(table, "watch_ms"), floats(table, "duration_ms")
        signals = signals_of(table)
        examples.signals[at], seen.bits[at] = signals, signal_bits(signals)
        # From the log's own numbers, as serving has them: float32 holds no more than 4.6 hours of milliseconds exactly.
        seen.watch_fraction[at] = watch_fraction(table["watch_ms"].to_numpy(), table["duration_ms"].to_numpy())
        in_training = np.isin(examples.day[at], [dates.index(date) for date in train_dates if date in dates])
        for mask, row in ((seen.users, examples.user_row), (seen.videos, examples.video_row)):
            mask[row[at] if in_training.all() else row[at][in_training]] = True
        seen.follows[number] = reported(table)

    if workers == 1:
        for number in range(len(parts)):
            fill(number)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(parts))))
    return seen


def signals_of(table: pa.Table) -> np.ndarray:
    """Signal columns -> (rows, S) float32, NaN for null."""
    out_NS = np.empty((len(table), len(SIGNALS)), np.float32)
    for s, signal in enumerate(SIGNALS):
        out_NS[:, s] = floats(table, signal)
    return out_NS


def integers(table: pa.Table, column: str, null: int = 0) -> np.ndarray:
    """A column as int64."""
    values = table[column]
    return (values.fill_null(null) if values.null_count else values).to_numpy().astype(np.int64, copy=False)


def floats(table: pa.Table, column: str) -> np.ndarray:
    """A column as float32, NaN for null."""
    return table[column].to_numpy().astype(np.float32, copy=False)


def _surfaces(surfaces: pa.ChunkedArray, encoder: Encoder) -> np.ndarray:
    """Few names, many rows: each name is hashed once."""
    names = surfaces.unique().to_pylist()
    return np.asarray(encoder.surface_rows(names))[_coded(surfaces, names)] if names else np.zeros(0, np.int64)


def _coded(values: pa.ChunkedArray, names: list) -> np.ndarray:
    """Place of each value in a short list of distinct ones that holds them all."""
    options = pc.SetLookupOptions(value_set=pa.array(names, values.type))
    return pc.call_function("index_in", [values], options).to_numpy().astype(np.int64)
