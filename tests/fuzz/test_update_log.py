"""Whatever bytes an update log holds, it yields updates that were written, in order, or says where it is damaged."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from candidate_gen.updates import DamagedLogError, Update, UpdateLog

DIM, NAME = 3, "updates-00000001.log"


def key(update: Update) -> tuple:
    return update.ids_N.tolist(), update.vectors_ND is None or update.vectors_ND.tolist()


def written(folder: Path, sizes: list[int]) -> list[Update]:
    rng = np.random.default_rng(sizes)
    log = UpdateLog(folder, 1, DIM)
    assert list(log.replay()) == []
    updates = []
    for n in sizes:
        ids = rng.integers(-(2**63), 2**63 - 1, n)
        full = Update(ids, rng.normal(size=(n, DIM)).astype(np.float16), rng.random(n) < 0.5)
        updates.append(full if rng.random() < 0.6 else Update(ids, None, None))
        log.append(updates[-1])
    log.close()
    return updates


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    tail=st.binary(max_size=60),
)
def test_what_is_read_is_a_beginning_of_what_was_written(
    sizes: list[int], edits: list[tuple[float, int]], cut: float | None, tail: bytes
):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        updates = written(folder, sizes)
        raw = bytearray((folder / NAME).read_bytes())
        for where, mask in edits:
            raw[min(int(where * len(raw)), len(raw) - 1)] ^= mask
        if cut is not None:
            del raw[int(cut * len(raw)) :]
        (folder / NAME).write_bytes(bytes(raw) + tail)
        found, refused = [], f"{NAME} at byte"
        try:
            log = UpdateLog(folder, 1, DIM)
            for update in log.replay():
                found.append(update)
            log.close()
        except DamagedLogError as error:
            refused = str(error)
        assert f"{NAME} at byte" in refused
        assert [key(u) for u in found] == [key(u) for u in updates[: len(found)]]
        if not edits and cut is None:
            assert len(found) == len(updates)
