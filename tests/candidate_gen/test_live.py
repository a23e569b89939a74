"""The live index answers as a dict and an exact search would, whatever came, went, was compacted or restarted."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from candidate_gen.delta import NO_VIDEO
from candidate_gen.index import IndexConfig, VideoIndex
from candidate_gen.live import LiveConfig, LiveIndex

sys.path.insert(0, str(Path(__file__).parent))
from live_truth import BASE, CONFIG, DIM, EDGES, FRESH, IDS_V, INDEX, INDEXED, VECTORS_VD, Truth, opened, unit

QUERIES = unit(np.random.default_rng(3).normal(size=(3, DIM)))


def vectors(n: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, DIM)))


def array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int64)


class LiveMachine(RuleBasedStateMachine):
    """Random interleavings of everything a live index can be told."""

    config = CONFIG
    some_ids = st.lists(st.sampled_from(EDGES + FRESH + IDS_V[1:40].tolist()), max_size=6)

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.live, self.truth = opened(Path(self.folder.name), self.config), Truth()
        self.packed: np.ndarray | None = None

    @rule(ids=some_ids, seed=st.integers(0, 99), kept=st.integers(0, 63))
    def upsert(self, ids: list[int], seed: int, kept: int) -> None:
        fresh, eligible = vectors(len(ids), seed), np.array([kept >> i & 1 == 1 for i in range(len(ids))], bool)
        self.live.upsert(array(ids), fresh, eligible)
        self.truth.upsert(array(ids), fresh, eligible)

    @rule(ids=some_ids)
    def remove(self, ids: list[int]) -> None:
        self.live.remove(array(ids))
        self.truth.remove(array(ids))

    @rule()
    def compact(self) -> None:
        self.live.compact()

    @rule()
    def restart(self) -> None:
        self.live.close()
        self.live, self.packed = opened(Path(self.folder.name), self.config), None

    @rule(ids=some_ids, rows=st.lists(st.integers(1, BASE), max_size=5), seed=st.integers(0, 9), packed=st.booleans())
    def search_filtered(self, ids: list[int], rows: list[int], seed: int, packed: bool) -> None:
        allowed = np.random.default_rng(seed).random(BASE + 1) < 0.5
        filters = {"excluded_ids": array(ids), "excluded_rows": array(rows), "allowed": allowed}
        self.truth.check(self.live, QUERIES, 20, **filters)
        if packed:  # kept from here on, through whatever comes
            self.packed, self.kept = np.packbits(allowed, bitorder="little"), self.live.allow(allowed)
        if self.packed is not None:
            once, kept = (self.live.search(QUERIES, 20, **{**filters, "allowed": a}) for a in (self.packed, self.kept))
            assert np.array_equal(once[0], kept[0])

    @rule(ids=st.lists(some_ids, min_size=3, max_size=3), rows=st.lists(st.integers(1, BASE), max_size=5))
    def search_with_exclusions_of_each(self, ids: list[list[int]], rows: list[int]) -> None:
        each = [array(of_query) for of_query in ids]
        self.truth.check(self.live, QUERIES, 20, excluded_ids=each, excluded_rows=array(rows))
        self.truth.check(self.live, QUERIES, 20, excluded_rows=[array(rows), array(rows[:1]), array([])])

    @invariant()
    def answers_as_the_truth(self) -> None:
        self.truth.check(self.live, QUERIES, BASE + len(FRESH) + 5)

    def teardown(self) -> None:
        self.live.close()
        self.folder.cleanup()


class IndexedMachine(LiveMachine):
    """The same where every overlay is an index."""

    config = INDEXED


TestLiveMachine, TestIndexedMachine = LiveMachine.TestCase, IndexedMachine.TestCase
TestLiveMachine.settings = TestIndexedMachine.settings = settings(
    max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("video_id", [*EDGES, *FRESH])
def test_a_new_video_is_in_the_next_search_and_a_removed_one_is_not(video_id: int, tmp_path: Path):
    live, vector = opened(tmp_path), vectors(1, seed=5)
    live.upsert(array([video_id]), vector)
    for _ in range(2):
        ids, scores = live.search(vector, 3)
        assert ids[0, 0] == video_id
        assert scores[0, 0] == pytest.approx(float(vector[0] @ vector[0]), abs=1e-5)
        assert (live.search(vector, BASE + 1)[0] == video_id).sum() == 1
        live.compact()
    live.remove(array([video_id]))
    assert video_id not in live.search(vector, BASE + 1)[0]
    live.close()
    assert video_id not in opened(tmp_path).search(vector, BASE + 1)[0]


def test_a_video_of_the_base_stays_under_the_base_filters_when_it_comes_again(tmp_path: Path):
    live, vector = opened(tmp_path), vectors(2, seed=6)
    known, new = int(IDS_V[7]), 12345
    live.upsert(array([known, new]), vector)
    allowed = np.ones(BASE + 1, bool)
    allowed[7] = False
    for _ in range(2):
        ids, _ = live.search(vector, 2, allowed=allowed)
        assert ids[1, 0] == new
        assert known not in live.search(vector, BASE + 1, allowed=allowed)[0]
        assert known not in live.search(vector, BASE + 1, excluded_rows=array([7]))[0]
        assert new not in live.search(vector, BASE + 1, excluded_ids=array([new]))[0]
        live.compact()


def test_an_ineligible_upload_hides_what_was_there_until_it_is_upserted_again(tmp_path: Path):
    live, vector = opened(tmp_path), vectors(1, seed=7)
    known = int(IDS_V[9])
    live.upsert(array([known]), vector, np.array([False]))
    assert known not in live.search(VECTORS_VD[9:10], BASE)[0]
    live.upsert(array([known]), vector)
    assert live.search(vector, 1)[0][0, 0] == known


@pytest.mark.parametrize("config", [CONFIG, INDEXED])
def test_an_overlay_holds_only_what_is_alive_and_the_log_begins_after_it(config: LiveConfig, tmp_path: Path):
    live, many = opened(tmp_path, config), vectors(10_000, seed=8)
    ids = np.arange(10_000) * 7 + 2**40
    live.upsert(ids, many)  # over block borders of the delta
    live.remove(ids[::2])
    live.remove(IDS_V[1:11])
    live.compact()
    assert (live.sizes().delta, live.sizes().overlay, live.sizes().dead_base) == (0, 5_000, 10)
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) < 100
    found, _ = live.search(many[1:200:2], 1)
    assert found[:, 0].tolist() == ids[1:200:2].tolist()
    live.close()
    again = opened(tmp_path, config)
    assert again.opened.replayed == 0
    assert again.sizes() == live.sizes()
    assert not np.isin(again.search(many[:50], BASE)[0], np.concatenate([ids[::2], IDS_V[1:11]])).any()


def test_an_overlay_of_the_least_and_the_greatest_id_is_in_order(tmp_path: Path):
    live, ends = opened(tmp_path), array([2**63 - 1, -(2**63) + 1])  # their difference is no 64-bit number
    fresh = vectors(2, seed=16)
    live.upsert(ends, fresh)
    live.compact()
    assert live.search(fresh, 1)[0][:, 0].tolist() == ends.tolist()


def test_everything_can_be_removed(tmp_path: Path):
    live = opened(tmp_path)
    live.remove(IDS_V[1:])
    for _ in range(2):
        found, scores = live.search(QUERIES, 4)
        assert (found == NO_VIDEO).all()
        assert np.isneginf(scores).all()
        live.compact()


def test_an_approximate_base_merges_by_the_same_scores(tmp_path: Path):
    rng = np.random.default_rng(9)
    base = unit(rng.normal(size=(3001, DIM)))
    config = IndexConfig(kind="ivf", exact_below=40, lists=16, probes=16, rerank=8)
    index = VideoIndex.build([(np.arange(1, 3001), base[1:])], 3001, config, tmp_path / "base")
    live = LiveIndex(tmp_path / "live", index, np.arange(3001), replace(CONFIG, index=config))
    fresh = unit(rng.normal(size=(2000, DIM)))
    live.upsert(np.arange(2000) + 5000, fresh)
    everything = np.concatenate([base[1:], fresh])
    for _ in range(2):
        found, scores = live.search(QUERIES, 50)
        exact = np.argsort(-(QUERIES @ everything.T), axis=1)[:, :50]
        expected = np.where(exact < 3000, exact + 1, exact - 3000 + 5000)
        shares = [np.isin(e, f).mean() for e, f in zip(expected, found, strict=True)]
        assert np.mean(shares) > 0.95
        assert scores[:, 0] == pytest.approx(np.max(QUERIES @ everything.T, axis=1), abs=1e-3)
        live.compact()


@pytest.mark.parametrize("config", [CONFIG, INDEXED])
def test_searches_and_writers_go_on_while_it_compacts_and_none_sees_a_hole(config: LiveConfig, tmp_path: Path):
    """Videos that are only replaced are in every search, removed ones in none that starts afterwards, none is twice."""
    live, stay = opened(tmp_path, config), np.arange(40) + 2**53
    target = vectors(1, seed=11)
    near = unit(target + 0.05 * np.random.default_rng(12).normal(size=(8, len(stay), DIM)))
    live.upsert(stay, near[0])
    failures: list[str] = []
    stop, gone = threading.Event(), [0]

    def replace_again() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            live.upsert(stay, near[turn % 8])
        turns.append(turn)

    def come_and_go() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            live.upsert(array([-number]), near[0][:1])
            live.remove(array([-number]))
            gone[0] = number  # every id from -number up to -1 is gone for good

    def search() -> None:
        n = 0
        while not stop.is_set():
            before = gone[0]
            found = live.search(target, 60)[0][0]
            real = found[found != NO_VIDEO]
            if not np.isin(stay, real).all():
                failures.append(f"missing {np.setdiff1d(stay, real)}")
            if len(np.unique(real)) != len(real):
                failures.append("twice")
            if ((real < 0) & (real >= -before) & ~np.isin(real, IDS_V)).any():
                failures.append("removed, and still there")
            n += 1
        turns.append(n)

    turns: list[int] = []
    threads = [threading.Thread(target=work) for work in (replace_again, come_and_go, search, search)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        live.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert min(turns) > 0
    live.close()
    again = opened(tmp_path)
    assert np.isin(stay, again.search(target, 60)[0][0]).all()


def test_a_full_delta_is_compacted_in_the_background(tmp_path: Path):
    live, many = opened(tmp_path, replace(CONFIG, compact_at=100)), vectors(250, seed=13)
    ids = np.arange(250) + 10**6
    for start in range(0, 250, 50):
        live.upsert(ids[start : start + 50], many[start : start + 50])
    live.close()
    assert live.sizes().overlay >= 100
    again = opened(tmp_path)
    assert again.search(many, 1)[0][:, 0].tolist() == ids.tolist()


def test_damage_and_mix_ups_are_refused_by_name(tmp_path: Path):
    live = opened(tmp_path / "a")
    with pytest.raises(BlockingIOError, match="open in another process"):
        opened(tmp_path / "a")
    live.upsert(array([5, 6]), vectors(2, seed=14))
    live.compact()
    live.close()
    with pytest.raises(ValueError, match="give each published index a folder of its own"):
        LiveIndex(tmp_path / "a", INDEX, np.concatenate([IDS_V[:-1], [2**63 - 1 - 4]]), CONFIG)
    for path in sorted((tmp_path / "a").rglob("*")):
        if not path.is_file() or path.name == "LOCK" or path.suffix == ".log":
            continue
        raw = path.read_bytes()
        for damaged in (raw[:-1], raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="restore the folder from a copy"):
                opened(tmp_path / "a")
        path.write_bytes(raw)
    opened(tmp_path / "a").close()


def test_what_cannot_be_a_video_is_refused_and_changes_nothing(tmp_path: Path):
    live, one = opened(tmp_path), vectors(1, seed=15)
    with pytest.raises(ValueError, match="video ids are float64"):
        live.upsert(np.array([2.0**53]), one)
    with pytest.raises(ValueError, match=r"above 2\^63 - 1"):
        live.remove(np.array([2**63], np.uint64))
    with pytest.raises(ValueError, match="pads results"):
        live.upsert(array([NO_VIDEO]), one)
    with pytest.raises(ValueError, match="lengths"):
        live.upsert(array([1]), one * 2)
    with pytest.raises(ValueError, match="lengths"):
        live.upsert(array([1]), one * np.nan)
    with pytest.raises(ValueError, match="want"):
        live.upsert(array([1, 2]), one)
    with pytest.raises(ValueError, match="eligible has shape"):
        live.upsert(array([1]), one, np.ones(2, bool))
    with pytest.raises(ValueError, match="`allowed` has 3 bool"):
        live.search(one, 1, allowed=np.ones(3, bool))
    Truth().check(live, QUERIES, BASE)
    live.close()
    assert opened(tmp_path).opened.replayed == 0
    with pytest.raises(ValueError, match="ascending"):
        LiveIndex(tmp_path / "b", INDEX, IDS_V[::-1].copy(), CONFIG)
