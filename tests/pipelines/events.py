"""TensorBoard's files read as its viewer reads them: length, its checksum, event, its checksum."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto import event_pb2


def events_in(folder: Path) -> Iterator[event_pb2.Event]:
    """Every event of every file, older files first."""
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def curve(folder: Path, tag: str) -> dict[int, float]:
    """A curve by step, as the viewer shows it: a restart at a step drops what was said of that and later steps."""
    found: dict[int, float] = {}
    for event in events_in(folder):
        if event.HasField("session_log"):
            found = {step: value for step, value in found.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == tag:
                found[event.step] = value.simple_value
    return found
