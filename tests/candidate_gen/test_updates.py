"""The update log keeps what it acknowledged: replayed in order, cut where a crash cut it, refused when damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.updates import DamagedLogError, Update, UpdateLog

DIM = 4
IDS = np.array([1, 2**31 + 5, 2**53 + 1, 2**63 - 1, -1, -(2**63) + 1], np.int64)


def upsert(ids: np.ndarray, seed: int = 0) -> Update:
    rng = np.random.default_rng(seed)
    return Update(ids, rng.normal(size=(len(ids), DIM)).astype(np.float16), rng.random(len(ids)) < 0.5)


def remove(ids: np.ndarray) -> Update:
    return Update(ids, None, None)


UPDATES = [upsert(IDS), remove(IDS[1:3]), upsert(IDS[:1], 1), remove(IDS[:0]), upsert(IDS[4:], 2)]


def opened(folder: Path, first_segment: int = 1) -> tuple[UpdateLog, list[Update]]:
    log = UpdateLog(folder, first_segment, DIM)
    return log, list(log.replay())


def write(folder: Path, updates: list[Update]) -> Path:
    log, _ = opened(folder)
    for update in updates:
        log.sync(log.append(update))
    log.close()
    return folder / "updates-00000001.log"


def same(left: list[Update], right: list[Update]) -> bool:
    def fields(update: Update) -> list:
        return [None if a is None else a.tolist() for a in (update.ids_N, update.vectors_ND, update.eligible_N)]

    return [fields(u) for u in left] == [fields(u) for u in right]


def test_updates_come_back_in_order_with_every_64_bit_id(tmp_path: Path):
    write(tmp_path, UPDATES[:2])
    log, found = opened(tmp_path)
    assert same(found, UPDATES[:2])
    for update in UPDATES[2:]:
        log.sync(log.append(update))
    log.close()
    log, found = opened(tmp_path)
    assert same(found, UPDATES)
    assert log.cut_bytes == 0


def test_a_record_cut_short_is_cut_off_and_reported_and_all_before_it_kept(tmp_path: Path):
    path = write(tmp_path, UPDATES[:4])
    whole = len(path.read_bytes())
    log, _ = opened(tmp_path)
    log.sync(log.append(UPDATES[4]))
    log.close()
    raw = path.read_bytes()
    for length in range(whole, len(raw)):
        path.write_bytes(raw[:length])
        log, found = opened(tmp_path)
        assert same(found, UPDATES[:4])
        assert log.cut_bytes == length - whole
        assert path.stat().st_size == whole
        log.sync(log.append(UPDATES[2]))
        log.close()
        assert same(opened(tmp_path)[1], [*UPDATES[:4], UPDATES[2]])
        path.write_bytes(raw[:whole])


def test_blocks_that_a_crash_left_unwritten_at_the_end_count_as_cut_short(tmp_path: Path):
    path = write(tmp_path, UPDATES)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    log, found = opened(tmp_path)
    assert same(found, UPDATES)
    assert log.cut_bytes == 100
    path.write_bytes(whole[:-20] + bytes(20))
    assert same(opened(tmp_path)[1], UPDATES[:4])


def test_any_flipped_bit_is_refused_with_its_place(tmp_path: Path):
    path = write(tmp_path, UPDATES)
    raw = path.read_bytes()
    starts = [0]
    for count in range(len(UPDATES)):
        starts.append(write(tmp_path / str(count), UPDATES[:count]).stat().st_size)
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        record = max(start for start in starts if start <= at)
        with pytest.raises(DamagedLogError, match=rf"updates-00000001\.log at byte {record}:"):
            opened(tmp_path)
    path.write_bytes(raw)
    assert same(opened(tmp_path)[1], UPDATES)


def test_rotated_segments_replay_as_one_and_older_ones_can_go(tmp_path: Path):
    log, _ = opened(tmp_path)
    log.append(UPDATES[0])
    assert log.rotate() == 2
    log.append(UPDATES[1])
    assert log.rotate() == 3
    log.sync(log.append(UPDATES[2]))
    log.close()
    assert same(opened(tmp_path)[1], UPDATES[:3])
    log, found = opened(tmp_path, first_segment=2)
    assert same(found, UPDATES[1:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["updates-00000002.log", "updates-00000003.log"]


def test_missing_segments_and_missing_records_are_noticed(tmp_path: Path):
    log, _ = opened(tmp_path)
    log.append(UPDATES[0])
    end = (tmp_path / "updates-00000001.log").stat().st_size
    log.append(UPDATES[1])
    log.rotate()
    log.append(UPDATES[2])
    log.rotate()
    log.close()
    first = tmp_path / "updates-00000001.log"
    raw = first.read_bytes()
    first.write_bytes(raw[:end])  # an earlier segment never ends torn: it was flushed before the next began
    with pytest.raises(DamagedLogError, match=r"begins with record 3, expected 2"):
        opened(tmp_path)
    first.write_bytes(raw)
    (tmp_path / "updates-00000002.log").unlink()
    with pytest.raises(DamagedLogError, match=r"segments \[1, 3\], expected all from 1 on"):
        opened(tmp_path)


def test_a_log_of_another_width_is_refused(tmp_path: Path):
    write(tmp_path, UPDATES)
    log = UpdateLog(tmp_path, 1, DIM + 4)
    with pytest.raises(DamagedLogError, match=r"width 4, expected .* width 8"):
        list(log.replay())


def test_a_write_that_fails_leaves_the_log_as_it_was(tmp_path: Path):
    import resource

    path = write(tmp_path, UPDATES[:2])
    log, _ = opened(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = Update(np.arange(5000), None, None)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, hard))
        with pytest.raises(OSError, match="File too large"):
            log.append(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.sync(log.append(UPDATES[2]))
    log.close()
    assert same(opened(tmp_path)[1], UPDATES[:3])


def test_threads_that_sync_together_all_find_their_records(tmp_path: Path):
    log, _ = opened(tmp_path)
    lock = threading.Lock()

    def work(start: int) -> None:
        for i in range(start, start + 50):
            with lock:
                sequence = log.append(remove(np.array([i])))
            log.sync(sequence)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    found = [int(update.ids_N[0]) for update in opened(tmp_path)[1]]
    assert sorted(found) == sorted(1000 * n + i for n in range(4) for i in range(50))
    assert [i for i in found if i < 1000] == list(range(50))
