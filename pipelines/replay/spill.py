"""Divides Parquet files of any size and order into parts that fit in memory, whole requests in each.

One pass reads the files batch by batch and appends each row to the part its request's key falls in: in memory for one
part, in files of a temporary folder for more. Memory then depends on the size of a part, not on the log's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.replay.keys import text_keys

BATCH_ROWS = 1 << 17
ROWS_A_PART = 500_000
"""Shown rows judged at a time: with 40 candidates a request and a hundred estimator columns about half a GiB."""
MAX_PARTS = 512
"""As many files are open at once while a log is divided; beyond 256 million rows the parts grow instead."""


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `of`."""

    index: int = 0
    of: int = 1


def frame(table: pa.Table) -> pl.DataFrame:
    """The table as polars."""
    found = pl.from_arrow(table)
    if not isinstance(found, pl.DataFrame):
        raise TypeError(f"{type(found)}: a table was expected")
    return found


def parts_for(rows: int) -> int:
    """How many parts a log of so many shown rows is judged in."""
    return min(max(-(-rows // ROWS_A_PART), 1), MAX_PARTS)


class Divided:
    """Rows of files, readable part by part; `file` and `row` say where each came from."""

    def __init__(
        self,
        files: Sequence[Path],
        columns: Sequence[str],
        parts: int,
        folder: Path,
        keep: Callable[[pa.Table], pa.Table] | None = None,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        """Read `columns` of `files` now. `folder` takes the parts; `keep` may drop rows of a batch."""
        self._parts = parts
        self._paths = [folder / f"{i}.arrow" for i in range(parts)]
        self._schema: pa.Schema | None = None
        self._memory: list[pa.Table] = []
        self._writers: list[pa.ipc.RecordBatchStreamWriter | None] = [None] * parts
        if parts > 1:
            folder.mkdir(parents=True)
        try:
            for number, file in enumerate(files):
                self._read(number, file, list(columns), keep, batch_rows)
        finally:
            for writer in self._writers:
                if writer is not None:
                    writer.close()

    def part(self, index: int) -> pa.Table | None:
        """Its rows in the files' order; None when it has none."""
        if self._parts == 1:
            return pa.concat_tables(self._memory) if self._memory else None
        if not self._paths[index].exists():
            return None
        with pa.OSFile(str(self._paths[index])) as source:
            return pa.ipc.open_stream(source).read_all()

    def _read(
        self, number: int, file: Path, columns: list[str], keep: Callable[[pa.Table], pa.Table] | None, batch_rows: int
    ) -> None:
        before = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=batch_rows, columns=columns):
            table = self._like_the_first(pa.Table.from_batches([batch]))
            rows = np.arange(before, before + len(table))
            before += len(table)
            table = table.append_column("file", pa.array(np.full(len(table), number, dtype=np.int32)))
            table = table.append_column("row", pa.array(rows))
            table = keep(table) if keep is not None else table
            if len(table):
                self._append(table)

    def _like_the_first(self, table: pa.Table) -> pa.Table:
        """Files written by different tools differ in nullability and width of offsets, not in what they say."""
        if self._schema is None:
            self._schema = pa.schema([pa.field(field.name, _narrow(field.type)) for field in table.schema])
        return table.cast(self._schema)

    def _append(self, table: pa.Table) -> None:
        if self._parts == 1:
            self._memory.append(table)
            return
        part_N = (text_keys(table["request_id"].combine_chunks()) >> np.uint64(32)) % np.uint64(self._parts)
        table = table.take(pa.array(np.argsort(part_N, kind="stable")))
        sizes = np.bincount(part_N.astype(np.int64), minlength=self._parts)
        ends = np.cumsum(sizes)
        for i in np.flatnonzero(sizes):
            writer = self._writers[i]
            if writer is None:
                writer = self._writers[i] = pa.ipc.new_stream(str(self._paths[i]), table.schema)
            writer.write_table(table.slice(ends[i] - sizes[i], sizes[i]))


def _narrow(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(kind.value_type)
    return kind
