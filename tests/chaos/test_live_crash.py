"""kill -9 at any instant: every acknowledged upsert and removal is there after the restart, and no video is twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.delta import NO_VIDEO

sys.path.insert(0, str(Path(__file__).parents[1] / "candidate_gen"))
from live_truth import BASE, DIM, IDS_V, opened, unit

TESTS = Path(__file__).parents[1]
CHILD = """
import sys, threading
sys.path.insert(0, sys.argv[3])
import numpy as np
from pathlib import Path
from live_truth import DIM, opened, unit
live, round_ = opened(Path(sys.argv[1])), int(sys.argv[2])
lock = threading.Lock()

def say(*words):
    with lock:
        print(*words, flush=True)

def write(writer):
    rng = np.random.default_rng([round_, writer])
    step = 0
    while True:
        step += 1
        ids = np.unique(rng.integers(0, 40, rng.integers(1, 6))) * 3 + writer + 2**54
        words = [writer, step, *ids]
        if rng.random() < .6:
            say("begin", "upsert", *words)
            live.upsert(ids, unit(np.random.default_rng([round_, writer, step]).normal(size=(len(ids), DIM))))
            say("done", "upsert", *words)
        else:
            say("begin", "remove", *words)
            live.remove(ids)
            say("done", "remove", *words)

for writer in range(3):
    threading.Thread(target=write, args=(writer,), daemon=True).start()
while True:
    live.compact()
"""


def vectors_of(round_: int, writer: int, step: int, n: int) -> np.ndarray:
    return unit(np.random.default_rng([round_, writer, step]).normal(size=(n, DIM)))


def killed_after(folder: Path, round_: int, seconds: float) -> list[str]:
    """What a child said until it was killed."""
    command = [sys.executable, "-c", CHILD, str(folder), str(round_), str(TESTS / "candidate_gen")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS.parent) as child:
        assert child.stdout is not None
        said = [child.stdout.readline()]  # it is up: the time runs from here
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        said += child.stdout.readlines()
    return [line for line in said if line.endswith("\n")]


def states(said: list[str], round_: int, before: dict[int, np.ndarray]) -> tuple[dict, dict]:
    """(what must be there, what an unacknowledged update may have made of it) by id; None is removed."""
    sure: dict[int, np.ndarray | None] = dict(before)
    maybe: dict[int, np.ndarray | None] = {}
    for line in said:
        phase, kind, *numbers = line.split()
        writer, step, *ids = map(int, numbers)
        vectors = vectors_of(round_, writer, step, len(ids)) if kind == "upsert" else [None] * len(ids)
        for video_id, vector in zip(ids, vectors, strict=True):
            if phase == "begin":
                maybe[video_id] = vector
            else:
                sure[video_id] = vector
                maybe.pop(video_id)
    return sure, maybe


def shown(score: float | None, probe: np.ndarray, vector: np.ndarray | None) -> bool:
    """Whether a video's score (None: it was not found) is that of a vector (None: the video is not there)."""
    if score is None or vector is None:
        return score is None and vector is None
    return abs(score - float(probe @ vector)) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_acknowledged_updates_survive_kill_nine_and_none_is_twice(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    there: dict[int, np.ndarray] = {}
    acknowledged = 0
    for round_ in range(4):
        said = killed_after(tmp_path, round_, rng.uniform(0.05, 0.8))
        acknowledged += sum(line.startswith("done") for line in said)
        sure, maybe = states(said, round_, there)
        live = opened(tmp_path)
        probe = unit(np.random.default_rng(round_).normal(size=DIM))
        (ids,), (scores,) = live.search(probe[None], BASE + 200)
        real = ids[ids != NO_VIDEO].tolist()
        assert len(real) < len(ids), "the search is to show everything"
        assert len(set(real)) == len(real), "a video came twice"
        assert set(real) <= set(IDS_V[1:].tolist()) | sure.keys() | maybe.keys()
        assert set(IDS_V[1:].tolist()) <= set(real)
        score_of = dict(zip(ids.tolist(), scores.tolist(), strict=True))
        for video_id in sure.keys() | maybe.keys():
            options = [sure.get(video_id), *([maybe[video_id]] if video_id in maybe else [])]
            assert any(shown(score_of.get(video_id), probe, vector) for vector in options), (round_, video_id)
        live.remove(np.array(list(maybe), np.int64))  # so that the next round knows where it stands
        live.close()
        there = {video_id: v for video_id, v in sure.items() if v is not None and video_id not in maybe}
    assert acknowledged > 20
