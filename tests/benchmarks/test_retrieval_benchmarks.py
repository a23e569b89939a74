"""The retrieval benchmarks end to end on a small corpus, and the arithmetic of their filters."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import combining, our_index, retrieval_filters, retrieval_peers, retrieval_scale
from benchmarks.building import built
from benchmarks.peers import engines, is_installed
from benchmarks.process import FreshProcess
from benchmarks.vectors import Corpus

QUIET = Console(quiet=True)


def figures_of(module, corpus: Path, work: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    out = work / "figures.json"
    common = ["--corpus", str(corpus), "--videos", "4000", "--queries", "40", "--work", str(work), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *common, *options])
    module.main()
    return json.loads(out.read_text())


def test_a_filter_passes_the_share_that_comes_highest_in_its_order():
    order_N = np.array([0.3, 0.9, 0.1, 0.7, 0.5, 0.2, 0.8, 0.4, 0.6, 0.0])
    assert np.flatnonzero(retrieval_filters.passing(order_N, 0.3)).tolist() == [1, 3, 6]
    assert np.flatnonzero(retrieval_filters.passing(order_N, 0.001)).tolist() == [1]


def test_seen_videos_come_from_the_best_and_the_rest_keeps_its_order():
    top_QM = np.array([np.random.default_rng(q).permutation(100)[:50] for q in range(6)])
    seen_QS, rest_QK = retrieval_filters.seen_and_rest(top_QM, 20, np.random.default_rng())
    assert seen_QS.shape == (6, 50 // 5)
    for top_M, seen_S, rest_K in zip(top_QM, seen_QS, rest_QK, strict=True):
        assert rest_K.tolist() == [number for number in top_M.tolist() if number not in set(seen_S.tolist())][:20]


def test_short_and_forbidden_results_are_counted():
    case = retrieval_filters.Case(
        name="x", share=0.5, exact_QK=np.array([[0, 1, 2], [3, -1, -1]]), mask_N=np.array([True] * 4 + [False] * 2)
    )
    full = np.array([[0, 1, 3], [3, -1, -1]])
    assert retrieval_filters.judge(case, full, 3) == {"underfilled": 0, "forbidden": 0}
    short_and_wrong = np.array([[0, 1, -1], [5, 4, -1]])
    assert retrieval_filters.judge(case, short_and_wrong, 3) == {"underfilled": 1, "forbidden": 2}
    seen = retrieval_filters.Case(name="x", share=1.0, exact_QK=case.exact_QK, seen_QS=np.array([[7, 0], [8, 9]]))
    assert retrieval_filters.judge(seen, full, 3) == {"underfilled": 0, "forbidden": 1}


def test_a_fresh_process_has_its_own_thread_setting_and_leaves_ours():
    before = dict(os.environ)
    with FreshProcess(threads=3) as process:
        assert process.run(os.getenv, "OMP_NUM_THREADS") == "3"
        assert process.run(os.getpid) != os.getpid()
        with pytest.raises(ZeroDivisionError):
            process.run(divmod, 1, 0)
    assert dict(os.environ) == before


def test_an_index_is_built_once_and_its_figures_kept(corpus_folder: Path, tmp_path: Path):
    corpus = Corpus.open(corpus_folder)
    first = built("ours", our_index.build, corpus, 2_000, tmp_path, QUIET)
    assert first["disk_mib"] > 0
    assert sum(first["stages_s"].values()) <= first["wall_s"]
    marker = Path(first["folder"]) / "untouched"
    marker.touch()
    assert built("ours", our_index.build, corpus, 2_000, tmp_path, QUIET) == first
    assert marker.exists()


@pytest.mark.parametrize("engine", engines(4_000, 16), ids=lambda engine: engine.name)
def test_every_peer_finds_the_exact_answers_at_its_widest_setting(engine, corpus_folder: Path, tmp_path: Path):
    if not is_installed(engine):
        pytest.skip(f"{engine.package} is not installed (requirements/bench.txt)")
    corpus = Corpus.open(corpus_folder)
    vector_ND, query_QD = corpus.matrix(len(corpus)), corpus.queries(40)
    with FreshProcess(threads=1) as process:
        process.run(engine.build, vector_ND, tmp_path, 1)
        found_QK = process.run(answers, engine, tmp_path, query_QD)
    exact_QK = np.argsort(-(query_QD @ vector_ND.T), axis=1)[:, :20]
    shares = [np.isin(exact, found).mean() for exact, found in zip(exact_QK, found_QK, strict=True)]
    assert np.mean(shares) > 0.95


def answers(engine, folder: Path, query_QD: np.ndarray) -> np.ndarray:
    search = engine.open(folder)
    return np.stack([np.ravel(search(query_D[None], 20, **engine.settings(20)[-1])) for query_D in query_QD])


def test_peers_are_compared_on_the_same_queries_and_reach_the_targets(corpus_folder, tmp_path, monkeypatch):
    names = ("reelrank", "FAISS IVF256,Flat")
    figures = figures_of(retrieval_peers, corpus_folder, tmp_path, monkeypatch, "--rounds", "2", "--only", *names)
    assert tuple(figures["engines"]) == names
    for engine in figures["engines"].values():
        assert engine["at"]["0.90"]["cpu_ms"] > 0
        assert max(point["recall"] for point in engine["sweep"]) > 0.95
        assert engine["memory_mib"]["searched"] >= engine["memory_mib"]["imported"]


def test_scale_reports_recall_memory_and_throughput_of_a_size(corpus_folder, tmp_path, monkeypatch):
    figures = figures_of(retrieval_scale, corpus_folder, tmp_path, monkeypatch, "--probes", "8", "64", "--refine", "1")
    (size,) = figures["sizes"]
    assert [point["setting"]["probes"] for point in size["sweep"]] == [8, 64]
    assert size["sweep"][-1]["recall"] > 0.9
    assert size["memory_mib"]["rss"] >= size["memory_mib"]["pss"] > 0
    assert all(each["rss"] > each["pss"] > each["anonymous"] > 0 for each in size["memory_of_two_mib"]), "shared"
    assert all(batch["per_s"] > 0 for batch in size["batched"]["batches"])


def test_filters_report_no_forbidden_result_and_no_short_list(corpus_folder, tmp_path, monkeypatch):
    figures = figures_of(retrieval_filters, corpus_folder, tmp_path, monkeypatch, "--rounds", "1", "--k", "30")
    assert len(figures["filters"]) == 1 + 3 * len(retrieval_filters.SHARES) + 1
    assert sum(row["forbidden"] + row["underfilled"] for row in figures["filters"]) == 0
    assert min(row["recall"] for row in figures["filters"]) > 0.9


def test_combining_measures_every_case_both_ways(corpus_folder: Path, tmp_path: Path, monkeypatch):
    figures = figures_of(combining, corpus_folder, tmp_path, monkeypatch, "--seconds", "0.05", "--rounds", "1")
    assert len(figures["searches"]) == 4 * len(combining.CLIENTS)
    for row in figures["searches"]:
        assert row["alone"]["per_s"] > 0
        assert row["alone"]["together"] == 1.0
        assert 1.0 <= row["combined"]["together"] <= row["clients"]
