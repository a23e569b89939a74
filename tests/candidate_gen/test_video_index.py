"""The index: never a filtered row, k results wherever k exist, the same after copying, damaged files refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from candidate_gen.index import IndexConfig, VideoIndex

N, DIM = 4000, 16
CONFIGS = {
    "flat": IndexConfig(kind="flat"),
    "ivf": IndexConfig(kind="ivf", exact_below=40, lists=32, probes=2),
    "ivf, int8, 2 bits": IndexConfig(kind="ivf", exact_below=40, lists=32, probes=2, stored="int8", code_bits=2),
    "ivf, int4, 4 bits": IndexConfig(kind="ivf", exact_below=40, lists=32, probes=2, stored="int4", code_bits=4),
}


def catalogue() -> np.ndarray:
    """(N+1, D) float32 of length 1 in 40 clusters; row 0 zeros."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, DIM))[rng.integers(0, 40, N)] + 0.4 * rng.normal(size=(N, DIM))
    return np.vstack([np.zeros(DIM), x / np.linalg.norm(x, axis=1, keepdims=True)]).astype(np.float32)


VECTORS = catalogue()
QUERIES = np.ascontiguousarray(VECTORS[np.arange(50, 60)])


def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row but those divisible by 10, a thousand at a time, in no order."""
    rows = np.random.default_rng(0).permutation(np.arange(1, N + 1))
    rows = rows[rows % 10 != 0]
    for start in range(0, len(rows), 1000):
        yield rows[start : start + 1000], VECTORS[rows[start : start + 1000]]


ENGINES = [*CONFIGS, "ivf, scanned on a device", "flat, scanned on a device"]
"""Every engine keeps the same promises. The device is the CPU, through the very code that a GPU runs."""


def opened(name: str, folder: Path) -> VideoIndex:
    """Built, then opened as the engine wants it."""
    kind, _, scanned = name.partition(", scanned")
    built = VideoIndex.build(chunks(), N + 1, CONFIGS[kind], folder)
    return VideoIndex(folder, scan_on="cpu") if scanned else built


@pytest.fixture(scope="module", params=ENGINES)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return opened(request.param, tmp_path_factory.mktemp("index"))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.005, 0.0])
def test_no_filtered_row_comes_back_and_every_allowed_one_can(index: VideoIndex, share: float) -> None:
    rng = np.random.default_rng(9)
    allowed = rng.random(N + 1) < share
    allowed[0] = True  # a careless caller: row 0 is not indexed, so it must not come back all the same
    excluded = rng.permutation(np.repeat(np.append(np.flatnonzero(allowed)[::3], [0, 10, N + 7]), 2))
    permitted = {row for row in np.flatnonzero(allowed) if row % 10 and row not in set(excluded)}
    for k in (7, len(permitted), len(permitted) + 5):
        for filter_ in (allowed, np.packbits(allowed, bitorder="little"), index.allow(allowed)):
            rows, scores = index.search(QUERIES, k, allowed=filter_, excluded_rows=excluded)
            assert rows.shape == scores.shape == (len(QUERIES), k)
            for found, score in zip(rows, scores, strict=True):
                real = found[found >= 0]
                assert len(real) == len(set(real)) == min(k, len(permitted))
                assert set(real) <= permitted
                assert (found[len(real) :] == -1).all()
                assert np.isneginf(score[len(real) :]).all()
                assert (np.diff(score[: len(real)]) <= 0).all()
    assert index.underfilled == 0


def test_scores_are_inner_products_and_the_flat_index_is_exact(tmp_path: Path) -> None:
    index = VideoIndex.build(chunks(), N + 1, CONFIGS["flat"], tmp_path)
    rows, scores = index.search(QUERIES, 20)
    indexed = np.arange(N + 1) % 10 != 0
    exact = QUERIES @ VECTORS.astype(np.float16).astype(np.float32).T
    exact[:, ~indexed] = -np.inf
    assert np.allclose(scores, np.sort(exact, axis=1)[:, ::-1][:, :20], atol=1e-5)
    assert np.allclose(np.take_along_axis(exact, rows, 1), scores, atol=1e-5)
    on_device = VideoIndex(tmp_path, scan_on="cpu").search(QUERIES, 20)
    assert np.allclose(np.take_along_axis(exact, on_device[0], 1), on_device[1], atol=1e-5)
    assert np.allclose(on_device[1], scores, atol=1e-5)


def test_scores_of_the_lists_are_those_of_the_stored_vectors(index: VideoIndex) -> None:
    rows, scores = index.search(QUERIES, 30)
    for query, found, score in zip(QUERIES, rows, scores, strict=True):
        assert np.allclose(index.vectors[found] @ query, score, atol=1e-5)
        assert np.allclose(VECTORS[found] @ query, score, atol=0.03 if index.config.stored != "int4" else 0.15)


def test_more_probes_find_more_until_all_lists_find_everything(tmp_path: Path) -> None:
    index = VideoIndex.build(chunks(), N + 1, IndexConfig(kind="ivf", exact_below=0, lists=32), tmp_path)
    exact, _ = VideoIndex.build(chunks(), N + 1, CONFIGS["flat"], tmp_path / "flat").search(QUERIES, 100)

    def recall(probes: int) -> float:
        found, _ = index.search(QUERIES, 100, probes=probes, rerank=8)
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]))

    assert recall(1) < recall(32)
    assert recall(32) > 0.99


def test_auto_is_exact_for_a_small_catalogue_and_inverted_for_a_large_one(tmp_path: Path) -> None:
    small = VideoIndex.build(chunks(), N + 1, IndexConfig(), tmp_path / "small")
    large = VideoIndex.build(chunks(), N + 1, IndexConfig(exact_below=1000), tmp_path / "large")
    assert (small.kind, large.kind) == ("flat", "ivf")
    assert len(small) == len(large) == N * 9 // 10


def test_a_copied_index_answers_as_the_built_one(
    index: VideoIndex, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    index.copy_to(tmp_path / "copy")
    copied = VideoIndex.open(tmp_path / "copy")
    if "scanned" in request.node.name:
        copied = VideoIndex(copied.folder, scan_on="cpu")
    allowed = np.random.default_rng(1).random(N + 1) < 0.6
    for options in ({}, {"allowed": allowed}, {"excluded_rows": np.array([1, 2, 3])}):
        for before, after in zip(
            index.search(QUERIES, 30, **options), copied.search(QUERIES, 30, **options), strict=True
        ):
            assert np.array_equal(before, after)


def test_any_flipped_bit_and_any_truncation_is_refused_by_name(index: VideoIndex, tmp_path: Path) -> None:
    index.copy_to(tmp_path / "copy")
    rng = np.random.default_rng()
    for path in sorted((tmp_path / "copy").iterdir()):
        whole = path.read_bytes()
        places = {0, len(whole) - 1, *rng.integers(0, len(whole), 8).tolist()}
        damaged = [whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :] for at in places]
        for content in (*damaged, whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            if path.name == "index.json" and _says_the_same(content, whole):
                continue
            path.write_bytes(content)
            with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
                VideoIndex.open(tmp_path / "copy")
        path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=path.name.replace(".", r"\.")):
            VideoIndex.open(tmp_path / "copy")
        path.write_bytes(whole)
    VideoIndex.open(tmp_path / "copy")


def _says_the_same(content: bytes, whole: bytes) -> bool:
    """A space turned into another kind of white space is no damage."""
    try:
        return json.loads(content) == json.loads(whole)
    except ValueError:
        return False


def test_files_of_different_indexes_do_not_open_together(index: VideoIndex, tmp_path: Path) -> None:
    index.copy_to(tmp_path / "copy")
    path = tmp_path / "copy" / "index.json"
    good = path.read_text()
    for field, value in (("n_rows", N), ("videos", 5), ("format", 9), ("videos", "16")):
        path.write_text(json.dumps({**json.loads(good), field: value}))
        with pytest.raises(ValueError, match="build the index again"):
            VideoIndex(tmp_path / "copy")
    path.write_text(good)
    np.save(tmp_path / "copy" / "indexed.npy", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="differ in rows"):
        VideoIndex(tmp_path / "copy")


def test_bad_vectors_and_bad_queries_say_what_is_wrong(tmp_path: Path) -> None:
    rows = np.array([1, 2])

    def build(*parts: tuple[np.ndarray, np.ndarray]) -> VideoIndex:
        return VideoIndex.build(iter(parts), 5, IndexConfig(), tmp_path)

    with pytest.raises(ValueError, match="no vectors to index"):
        build()
    with pytest.raises(ValueError, match="come once"):
        build((rows, VECTORS[rows]), (rows, VECTORS[rows]))
    with pytest.raises(ValueError, match="come once"):
        build((np.array([0]), VECTORS[:1]))
    with pytest.raises(ValueError, match="NaN"):
        build((rows, np.full((2, DIM), np.nan, np.float32)))
    index = build((rows, VECTORS[rows]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        index.search(np.zeros((1, 3), np.float32), 2)
    with pytest.raises(ValueError, match="`allowed` has 4 rows, the index 5"):
        index.search(VECTORS[:1], 2, allowed=np.ones(4, bool))
