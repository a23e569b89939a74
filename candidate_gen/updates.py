"""The update log: every acknowledged upsert and removal is on disk before its caller hears of it.

N videos of a record, D width. Segments `updates-NUMBER.log` in one folder, each a header and records that only grow:
length, sequence number and checksums before the payload, an end byte after it. A record that a crash cut short at the
very end is cut off and reported; anything else that does not check out is damage, and refused with its offset.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from candidate_gen import durable

MAGIC, FORMAT = b"RRUPDATE", 1
UPSERT, REMOVE = 1, 2
END = 0xA5
"""Last byte of a payload: a zero there means that the file grew but a crash kept the bytes from being written."""
_SEGMENT = struct.Struct("<8sIIQ")  # magic, format, D, sequence number of the first record
_RECORD = struct.Struct("<IQQ")  # payload bytes, sequence number, XXH64 of the payload seeded by it
_CRC = struct.Struct("<I")  # of the fields before it
_BODY = struct.Struct("<BI")  # kind, N
RECORD_VIDEOS = 16_384
"""Videos of one record at most: it is read whole."""


class DamagedLogError(ValueError):
    """A log that lost or changed something it had acknowledged; the message names file and offset."""


@dataclass(frozen=True, slots=True)
class Update:
    """Videos that came (again) or went."""

    ids_N: np.ndarray
    """int64."""
    vectors_ND: np.ndarray | None
    """float16; None for a removal."""
    eligible_N: np.ndarray | None
    """bool; None for a removal."""

    def encode(self) -> bytes:
        """Payload of a record."""
        kind = REMOVE if self.vectors_ND is None else UPSERT
        parts = [_BODY.pack(kind, len(self.ids_N)), self.ids_N.astype("<i8").tobytes()]
        if self.vectors_ND is not None and self.eligible_N is not None:
            parts += [self.eligible_N.astype(np.uint8).tobytes(), self.vectors_ND.astype("<f2").tobytes()]
        return b"".join([*parts, bytes([END])])

    def pieces(self, n: int) -> list[Update]:
        """The same in updates of at most n videos."""
        parts = [slice(start, start + n) for start in range(0, len(self.ids_N), n)]
        if self.vectors_ND is None or self.eligible_N is None:
            return [Update(self.ids_N[part], None, None) for part in parts]
        return [Update(self.ids_N[part], self.vectors_ND[part], self.eligible_N[part]) for part in parts]

    @classmethod
    def decode(cls, payload: bytes, dim: int) -> Update:
        """The update of a payload whose checksum was right; raises ValueError when it is no update of this width."""
        kind, n = _BODY.unpack_from(payload)
        size = _BODY.size + 8 * n + (n * (1 + 2 * dim) if kind == UPSERT else 0) + 1
        if kind not in (UPSERT, REMOVE) or len(payload) != size:
            raise ValueError(f"kind {kind} of {n} videos in {len(payload)} bytes, expected {size}")
        ids_N = np.frombuffer(payload, "<i8", n, _BODY.size).astype(np.int64)
        if kind == REMOVE:
            return cls(ids_N, None, None)
        eligible_N = np.frombuffer(payload, np.uint8, n, _BODY.size + 8 * n).astype(bool)
        vectors = np.frombuffer(payload, "<f2", n * dim, _BODY.size + 9 * n)
        return cls(ids_N, vectors.reshape(n, dim).astype(np.float16), eligible_N)


class UpdateLog:
    """Append under the caller's lock, `sync` from any thread: one flush acknowledges all that was appended before."""

    def __init__(self, folder: Path, first_segment: int, dim: int) -> None:
        """Open (or start) the log from `first_segment` on; older segments are leftovers and removed."""
        self._folder, self._dim = folder, dim
        folder.mkdir(parents=True, exist_ok=True)
        self.drop_before(first_segment)
        self._segments = sorted(_number(path) for path in folder.glob("updates-*.log"))
        if self._segments != list(range(first_segment, first_segment + len(self._segments))):
            raise DamagedLogError(f"{folder} has segments {self._segments}, expected all from {first_segment} on")
        if not self._segments:
            self._segments = [first_segment]
            _create(self._path(first_segment), dim, 1)
        self.cut_bytes = 0
        """Bytes of a record cut short by a crash, removed at opening."""
        self._appended = self._synced = 0
        self._failed: OSError | None = None
        self._sync_lock = threading.Lock()
        self._handle = -1

    def replay(self) -> Iterator[Update]:
        """Every update kept, oldest first. To be run to its end before the first append."""
        sequence = None
        for number in self._segments:
            path = self._path(number)
            raw = path.read_bytes()
            first = _check_segment(path, raw, self._dim)
            if sequence is not None and first != sequence:
                raise DamagedLogError(f"{path} begins with record {first}, expected {sequence}: records are missing")
            sequence, at = first, _SEGMENT.size + _CRC.size
            while (end := _record_end(path, raw, at, sequence, is_last=number == self._segments[-1])) is not None:
                payload = raw[at + _RECORD.size + _CRC.size : end]
                try:
                    yield Update.decode(payload, self._dim)
                except (ValueError, struct.error) as error:
                    raise DamagedLogError(f"{path} at byte {at}: {error}") from error
                sequence, at = sequence + 1, end
            self.cut_bytes += len(raw) - at
            if at < len(raw):
                os.truncate(path, at)
        self._appended = self._synced = (sequence or 1) - 1
        self._handle = os.open(self._path(self._segments[-1]), os.O_WRONLY | os.O_APPEND)
        os.fsync(self._handle)

    def append(self, update: Update) -> int:
        """Write one record; its sequence number, for `sync`. A failed write leaves the log as it was, and raises."""
        self._refuse_after_failure()
        payload, sequence = update.encode(), self._appended + 1
        head = _RECORD.pack(len(payload), sequence, xxhash.xxh64_intdigest(payload, seed=sequence))
        record = memoryview(head + _CRC.pack(zlib.crc32(head)) + payload)
        begin = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(record):
                written += os.write(self._handle, record[written:])
        except OSError:
            os.ftruncate(self._handle, begin)
            raise
        self._appended = sequence
        return sequence

    def sync(self, sequence: int) -> None:
        """Return once record `sequence` is on disk."""
        with self._sync_lock:
            if self._synced >= sequence:
                return
            self._flush()

    def rotate(self) -> int:
        """Start a new segment (its number); everything before it is on disk. Under the caller's lock, as `append`."""
        with self._sync_lock:
            self._flush()
            number = self._segments[-1] + 1
            _create(self._path(number), self._dim, self._appended + 1)
            handle = os.open(self._path(number), os.O_WRONLY | os.O_APPEND)
            os.close(self._handle)
            self._handle = handle
            self._segments.append(number)
        return number

    def drop_before(self, segment: int) -> None:
        """Remove the segments below `segment`: what they held lies elsewhere now."""
        for path in sorted(self._folder.glob("updates-*.log")):
            if _number(path) < segment:
                path.unlink()
        durable.sync_folder(self._folder)

    def close(self) -> None:
        """Flush and close."""
        with self._sync_lock:
            if self._handle >= 0:
                self._flush()
                os.close(self._handle)
                self._handle = -1

    def _flush(self) -> None:
        """After a failed flush nobody knows what is on disk: the log takes nothing more."""
        self._refuse_after_failure()
        target = self._appended
        try:
            os.fdatasync(self._handle)
        except OSError as error:
            self._failed = error
            raise
        self._synced = target

    def _refuse_after_failure(self) -> None:
        if self._failed is not None:
            raise OSError(
                f"{self._folder}: an earlier flush failed ({self._failed}); mend the disk and open the log again"
            ) from self._failed

    def _path(self, number: int) -> Path:
        return self._folder / f"updates-{number:08d}.log"


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("updates-"))


def _create(path: Path, dim: int, first_sequence: int) -> None:
    head = _SEGMENT.pack(MAGIC, FORMAT, dim, first_sequence)
    durable.replace(path, head + _CRC.pack(zlib.crc32(head)))


def _check_segment(path: Path, raw: bytes, dim: int) -> int:
    """Sequence number of the first record."""
    whole = len(raw) >= _SEGMENT.size + _CRC.size
    if not whole or _CRC.unpack_from(raw, _SEGMENT.size)[0] != zlib.crc32(raw[: _SEGMENT.size]):
        raise DamagedLogError(f"{path} at byte 0: not the header of an update log; restore it from a copy")
    magic, version, width, first = _SEGMENT.unpack_from(raw)
    if (magic, version) != (MAGIC, FORMAT) or width != dim:
        raise DamagedLogError(
            f"{path}: {magic!r} format {version} width {width}, expected {MAGIC!r} format {FORMAT} width {dim}; "
            "start a folder of its own for each model"
        )
    return first


def _record_end(path: Path, raw: bytes, at: int, sequence: int, is_last: bool) -> int | None:
    """Where the record at byte `at` ends; None at the end of the records, be it clean or torn."""
    if at == len(raw):
        return None
    cure = "restore the file from a copy, or cut it there and send the updates since then again"
    torn = is_last and (len(raw) - at < _RECORD.size + _CRC.size or not any(raw[at:]))
    if torn:
        return None
    head = raw[at : at + _RECORD.size]
    crc = raw[at + _RECORD.size : at + _RECORD.size + _CRC.size]
    if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(head):
        raise DamagedLogError(f"{path} at byte {at}: the head of record {sequence} is damaged; {cure}")
    size, found, checksum = _RECORD.unpack(head)
    begin = at + _RECORD.size + _CRC.size
    if is_last and (begin + size > len(raw) or (begin + size == len(raw) and raw[-1] == 0)):
        return None
    payload = raw[begin : begin + size]
    if len(payload) < size or found != sequence or xxhash.xxh64_intdigest(payload, seed=found) != checksum:
        raise DamagedLogError(f"{path} at byte {at}: record {sequence} is damaged; {cure}")
    return begin + size
