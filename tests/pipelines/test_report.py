"""The report is one file that asks nothing of the network, escapes what it is given, and leaves out what is missing."""

from __future__ import annotations

import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest

from pipelines.metrics import reliability
from pipelines.replay import ReplayReport
from pipelines.replay.bootstrap import Estimate, Interval
from pipelines.replay.judge import PolicyResult
from pipelines.replay.trust import Diagnostics
from pipelines.report import number, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes and text; raises when an element is closed that was not opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def judged(policy: str, low: float, high: float, refused: tuple[str, ...] = ()) -> PolicyResult:
    middle = (low + high) / 2
    found = Estimate(
        value=Interval(estimate=0.4 + middle, low=0.4 + low, high=0.4 + high),
        difference=Interval(estimate=middle, low=low, high=high),
        probability_better=0.5,
    )
    weights = Diagnostics(
        rows=1000,
        effective_sample_size=812.4,
        effective_share=0.8124,
        mean_weight=1.01,
        max_weight=9.5,
        share_clipped=0.0,
        top_percent_share=0.04,
        match_rate=0.2,
        unsupported_mass=Interval(estimate=0.0, low=0.0, high=0.01),
    )
    estimates = {"long_view": {"logged": found, "snrips": found}}
    return PolicyResult(policy=policy, refused=list(refused), diagnostics=weights, metrics=estimates)


def full_run() -> dict:
    rng = np.random.default_rng(0)
    chance = rng.random(500)
    curve = asdict(reliability(rng.random(500) < chance, chance, bins=10))
    why = "effective sample size 12 is below 200"
    replayed = ReplayReport(
        estimator="snrips",
        metrics=("long_view",),
        policies=[judged("logged", 0, 0), judged("ours", 0.01, 0.03), judged("far", -0.2, 0.9, (why,))],
        verdict="ours would have been better than the logged policy.",
        requests=400,
        users=77,
        rows=1000,
        first_ts_ms=0,
        last_ts_ms=1,
        provenance={"data_fingerprint": "ab" * 32, "slots": 2},
        refused={"far": [why]},
    )
    item = {
        "slot": 0,
        "video_id": -(2**62) - 1,
        "author_id": 5,
        "source": "fresh",
        "value": 1.25,
        "propensity": 0.031,
        "terms": {"like": 0.01, "long_view": 0.9, "hate": -0.2, "share": 0.001},
        "duration_s": 31.4,
        "tags": [3, 9],
    }
    return {
        "title": "a run & its <numbers>",
        "created": "2026-01-02",
        "bundle": "20260102-x",
        "machine": {"cpu": "2 cores"},
        "versions": {"torch": "2.13.0"},
        "stages": [{"name": "ingest", "seconds": 75.0, "rows": 171671, "note": "<script>alert(1)</script>"}],
        "retrieval": [
            {"name": "two towers", "recall@100": 0.3121},
            {"name": "popularity", "recall@100": 0.1, "extra": 2},
        ],
        "pools": [{"slice": "all", "queries": 1234, "pool recall": 0.7319}],
        "channels": [{"slice": "all", "source": "covisit", "alone": 0.5, "marginal": 0.0417}],
        "ranking": [{"task": "like", "auc": float("nan"), "calibration": 1.0}],
        "primary": [{"name": "ranker", "gauc": 0.65, "ndcg5": 0.5, "primary": 0.575}],
        "reliability": {"long_view": {name: values.tolist() for name, values in curve.items()}},
        "gate": [{"rule": "not worse", "candidate": 0.6, "live": None, "passed": False}],
        "replay": replayed.to_dict(),
        "feeds": [{"user_id": 2**61, "cold": True, "items": [item]}],
    }


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return write_report(full_run(), tmp_path_factory.mktemp("report") / "deep/report.html").read_text()


def test_the_page_asks_nothing_of_the_network_and_runs_no_script(html):
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "data"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_everything_it_is_given_is_escaped(html):
    assert "<script>" not in html
    text = Page(html).text
    assert "<script>alert(1)</script>" in text
    assert "a run & its <numbers>" in text


def test_every_section_shows_its_numbers(html):
    text = Page(html).text
    for shown in (
        "171,671",
        "1 min 15 s",
        "0.3121",
        "0.7319",
        "0.0417",
        "0.5750",
        "1 of 1 rules failed",
        "-4611686018427387905",
        "31 s",
    ):
        assert shown in text
    assert "long_view +0.900, hate -0.200, like +0.010" in text  # largest first, three of four
    assert "first 2 slots" in text
    assert text.count("+0.0200 [+0.0100, +0.0300]") == 1


def test_a_refused_policy_shows_the_reason_and_no_estimate(html):
    text = Page(html).text
    assert "effective sample size 12 is below 200" in text
    assert "+0.3500" not in text
    assert "0.7500" not in text


def test_the_forest_plot_puts_intervals_where_they_belong(html):
    marks = [a for tag, a in Page(html).tags if tag == "line" and a.get("y1") == "15"]
    zero = next(float(a["x1"]) for tag, a in Page(html).tags if tag == "line" and a.get("y2") == "30")
    assert len(marks) == 1  # one judged policy, one metric
    low, high = float(marks[0]["x1"]), float(marks[0]["x2"])
    assert zero < low < high
    assert (high - zero) / (low - zero) == pytest.approx(0.03 / 0.01, rel=0.01)


def test_missing_sections_are_left_out(tmp_path):
    page = Page(write_report({"title": "empty"}, tmp_path / "empty.html").read_text())
    assert [tag for tag, _ in page.tags if tag in ("section", "table", "svg")] == []
    run = full_run()
    for key in run:
        rest = {name: value for name, value in run.items() if name != key}
        Page(write_report(rest, tmp_path / "rest.html").read_text())


def test_numbers_read_well():
    assert [number(v) for v in (171671, 0.31213, 1234.5, 250.04, None, True)] == [
        "171,671",
        "0.3121",
        "1,234",
        "250.0",
        "–",  # noqa: RUF001
        "yes",
    ]
