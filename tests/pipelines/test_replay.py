"""Replay answers when the log can, refuses when it cannot, and names the row when the log is broken."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from features.schema import CANDIDATES, EVENTS, SIGNALS, VIDEOS
from pipelines.cli import main
from pipelines.replay import ReplayInputError, print_report, replay
from pipelines.replay.compare import NotComparableError, compare
from pipelines.replay.html import write_html
from pipelines.replay.junit import write_junit
from pipelines.replay.policies import History, resolve
from pipelines.replay.sampling import Sampler, conditional
from pipelines.replay.slates import LoggedRequests, Slates

VIDEOS_IN_ALL, CANDIDATES_A_REQUEST, SLOTS = 30, 8, 3
START_MS = 1_767_225_600_000
QUALITY = np.linspace(0.05, 0.9, VIDEOS_IN_ALL)
"""Chance of a long view of each video; the logger believes it only by half."""


def write_log(folder: Path, requests: int = 900, greedy: bool = False, seed: int = 0) -> Path:
    """Two days of pages by a Plackett-Luce logger (or a greedy one that claims certainty), with candidates of day 2."""
    rng = np.random.default_rng(seed)
    events, sets = [], []
    for i in range(requests):
        ts_ms = START_MS + i * 2 * 86_400_000 // requests
        pool = rng.choice(VIDEOS_IN_ALL, CANDIDATES_A_REQUEST, replace=False)
        logit = 2 * QUALITY[pool]
        left = np.ones(len(pool), dtype=bool)
        for slot in range(SLOTS):
            p = np.exp(np.where(left, logit, -np.inf))
            p = (np.arange(len(p)) == p.argmax()).astype(float) if greedy else p / p.sum()
            pick = rng.choice(len(pool), p=p)
            left[pick] = False
            events.append((f"r{i:04}", i % 70, int(pool[pick]), ts_ms + slot, slot, float(p[pick])))
        if ts_ms >= START_MS + 86_400_000:
            sets.append({"request_id": f"r{i:04}", "user_id": i % 70, "ts_ms": ts_ms, "video_ids": pool.tolist()})
    watched = rng.random(len(events)) < QUALITY[[e[2] for e in events]]
    rows = [
        dict(zip(("request_id", "user_id", "video_id", "ts_ms", "slot", "propensity"), event, strict=True))
        | dict.fromkeys(SIGNALS, 0)
        | {"long_view": int(seen), "watch_ms": 9000 if seen else 1000}
        for event, seen in zip(events, watched, strict=True)
    ]
    for day in (0, 1):
        part = [r for r in rows if (r["ts_ms"] - START_MS) // 86_400_000 == day]
        date = datetime.fromtimestamp(part[0]["ts_ms"] / 1000, UTC).date()
        (folder / f"events/date={date}").mkdir(parents=True)
        write(part, EVENTS, folder / f"events/date={date}/part-0.parquet")
    write(sets, CANDIDATES, folder / "candidates.parquet")
    write(
        [{"video_id": v, "upload_ts_ms": START_MS - v, "eligible": True} for v in range(30)],
        VIDEOS,
        folder / "videos.parquet",
    )
    return folder


def write(rows: list[dict], schema: pa.Schema, path: Path) -> None:
    full = [{name: row.get(name) for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=schema), path)


def last_day(folder: Path) -> Path:
    return sorted(folder.glob("events/date=*/*.parquet"))[-1]


class Oracle:
    """Knows the quality of every video."""

    name = "oracle"

    def values(self, requests: LoggedRequests):
        return np.split(QUALITY[requests.video_ids], requests.offsets[1:-1])


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("log"))


def estimate(report, policy: str, metric: str = "long_view"):
    result = next(p for p in report.policies if p.policy == policy)
    return result.metrics[metric][report.estimator]


def test_the_logged_policy_has_weight_1_and_its_own_mean_exactly(log):
    report = replay(log, ["logged"], resamples=20)
    rows = pl.read_parquet(last_day(log))
    assert report.rows == len(rows)
    assert report.policies[0].diagnostics.mean_weight == report.policies[0].diagnostics.max_weight == 1
    assert estimate(report, "logged").value.estimate == rows["long_view"].sum() / len(rows)
    assert estimate(report, "logged", "watch_s").value.estimate == pytest.approx(
        rows["watch_ms"].sum() / len(rows) / 1000
    )
    assert estimate(report, "logged").difference.low == estimate(report, "logged").difference.high == 0


def test_a_better_policy_is_found_better_and_its_true_value_lies_in_the_interval(log):
    sampler = Sampler(temperature=0.7, epsilon=0.1)
    report = replay(log, [Oracle(), "random"], sampler=sampler, slots=1)
    true = []
    for videos in pl.read_parquet(log / "candidates.parquet")["video_ids"]:
        q = QUALITY[videos.to_numpy()]
        p = np.exp((q - q.mean()) / q.std() / 0.7)
        true.append((0.9 * p / p.sum() + 0.1 / len(q)) @ q)
    found = estimate(report, "oracle")
    assert found.difference.low > 0
    assert found.value.low < np.mean(true) < found.value.high
    assert estimate(report, "random").difference.high < 0
    assert "oracle would have been better" in report.verdict
    assert report.exit_code == 0


def test_constant_scores_are_the_random_policy(log, tmp_path):
    candidates = (
        pl.read_parquet(log / "candidates.parquet").select("request_id", video_id="video_ids").explode("video_id")
    )
    candidates.with_columns(score=pl.lit(0.1)).write_parquet(tmp_path / "flat.parquet")
    report = replay(log, ["random", f"file:{tmp_path / 'flat.parquet'}"], resamples=20)
    assert report.policies[2].policy == "flat"
    assert report.policies[1].metrics == report.policies[2].metrics


def test_the_order_of_rows_in_the_files_changes_nothing(log, tmp_path):
    mixed = write_log(tmp_path / "mixed")
    for path in (*mixed.glob("events/date=*/*.parquet"), mixed / "candidates.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), path)
    policies = ["popularity", "newest", Oracle()]
    reports = [replay(folder, policies, resamples=20).to_dict() for folder in (log, mixed)]
    assert [report["provenance"].pop("data") for report in reports] == [str(log), str(mixed)]
    assert reports[0] == reports[1]


def test_popularity_knows_nothing_of_the_evaluated_window(log, tmp_path):
    other = write_log(tmp_path / "other")
    table = pl.read_parquet(last_day(other)).with_columns(long_view=pl.lit(1, dtype=pl.Int8))
    table.write_parquet(last_day(other))
    before, after = (replay(path, ["popularity"], resamples=5).policies[1].diagnostics for path in (log, other))
    assert before == after


def test_a_deterministic_logger_is_refused(tmp_path):
    folder = write_log(tmp_path, greedy=True)
    report = replay(folder, ["random"], resamples=20)
    assert report.exit_code == 3
    assert "mean weight" in " ".join(report.refused["random"])
    text = io.StringIO()
    print_report(report, Console(file=text, width=80))
    shown = [line.split() for line in text.getvalue().splitlines() if line.split()[:1] == ["random"]]
    assert shown[:2] == [["random", "long_view", "refused"], ["random", "watch_s", "refused"]]  # no number to quote
    assert "cannot say how random" in report.verdict


def test_effective_sample_size_falls_as_the_policy_leaves_the_logger(log):
    ess = [
        replay(log, [Oracle()], sampler=Sampler(temperature=t, epsilon=0.0), resamples=2).policies[1].diagnostics
        for t in (2.0, 0.5, 0.1)
    ]
    assert ess[0].effective_sample_size > ess[1].effective_sample_size > ess[2].effective_sample_size


def change(column: str, value):
    """Set one cell of the last day's file: row 4, slot 1 of the second request."""

    def corrupt(folder: Path) -> None:
        table = pl.read_parquet(last_day(folder))
        cells = table[column].to_list()
        cells[4] = value
        table.with_columns(pl.Series(column, cells, dtype=table[column].dtype)).write_parquet(last_day(folder))

    return corrupt


def drop_column(folder: Path) -> None:
    pl.read_parquet(last_day(folder)).drop("propensity").write_parquet(last_day(folder))


def drop_row(folder: Path) -> None:
    pl.read_parquet(last_day(folder)).with_row_index("i").filter(pl.col("i") != 4).drop("i").write_parquet(
        last_day(folder)
    )


def drop_candidates(folder: Path) -> None:
    table = pl.read_parquet(folder / "candidates.parquet")
    table.filter(pl.col("request_id") != "r0451").write_parquet(folder / "candidates.parquet")


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (change("propensity", 0.0), r"row 4 \(request r0451, slot 1\): propensity 0.0 lies outside \(0, 1\]"),
        (change("propensity", 1.7), r"row 4 \(request r0451, slot 1\): propensity 1.7 lies outside"),
        (change("propensity", float("nan")), r"row 4 \(request r0451, slot 1\): propensity is missing"),
        (change("propensity", None), r"row 4 .*propensity is missing"),
        (change("slot", 0), r"row 3 .*another row has the same request and slot; 2 such rows"),
        (change("slot", None), r"row 4 .*slot is missing"),
        (change("video_id", 2**40), r"row 4 .*video 1099511627776 is not in its request's candidate set"),
        (change("long_view", None), r"row 4 .*long_view is null"),
        (change("user_id", 9999), r"row 4 .*its user is not the request's"),
        (drop_column, r"part-0.parquet: no column propensity"),
        (drop_row, r"row 4 \(request r0451, slot 2\): a slot above it is not in the log"),
        (
            drop_candidates,
            r"row 3 \(request r0451, slot 0\): its request has no row in candidates.parquet; 3 such rows",
        ),
    ],
)
def test_a_broken_log_is_refused_with_the_row_and_the_reason(tmp_path, corrupt, message):
    folder = write_log(tmp_path)
    corrupt(folder)
    with pytest.raises(ReplayInputError, match=message):
        replay(folder, ["random"], resamples=2)


def test_values_of_a_wrong_length_or_no_number_name_their_request(log):
    class Short(Oracle):
        def values(self, requests):
            return [v[:-1] if i == 3 else v for i, v in enumerate(super().values(requests))]

    class NotANumber(Oracle):
        def values(self, requests):
            return [np.full(len(v), np.nan) if i == 3 else v for i, v in enumerate(super().values(requests))]

    with pytest.raises(ReplayInputError, match="'oracle', request r0453: 7 values for 8 candidates"):
        replay(log, [Short()], resamples=2)
    with pytest.raises(ReplayInputError, match=r"'oracle', request r0453, video .* is not a finite number; 8 such"):
        replay(log, [NotANumber()], resamples=2)


def test_the_report_is_strict_json_with_its_provenance(log, tmp_path):
    report = replay(log, ["random"], resamples=10, seed=5)
    report.write(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["schema_version"] == 2
    assert read["provenance"]["seed"] == 5
    assert len(read["provenance"]["data_fingerprint"]) == 64
    assert [p["policy"] for p in read["policies"]] == ["logged", "random"]
    assert set(read["policies"][1]["metrics"]["long_view"]) >= {"replay", "ips", "snips", "rips", "snrips", "rips@3"}


def test_conditional_probabilities_sum_to_one_and_follow_plackett_luce():
    requests = LoggedRequests(
        request_id=["a", "b"],
        user_id=np.array([1, 2]),
        ts_ms=np.array([0, 0]),
        surface=[None, None],
        offsets=np.array([0, 3, 5]),
        video_ids=np.array([10, 11, 12, 10, 13]),
    )
    values = np.array([1.0, 3.0, 2.0, 5.0, 5.0])
    sampler = Sampler(temperature=0.5, epsilon=0.2, standardise=False)
    strength = np.exp(values / 0.5)

    def rows(request, slot, candidate):
        return Slates(
            request=np.array(request),
            slot=np.array(slot),
            candidate=np.array(candidate),
            user=np.zeros(len(slot), dtype=int),
            logged=np.ones(len(slot)),
        )

    # request a shows its middle video, then its last; request b shows its second of two equals
    found = conditional(values, requests, rows([0, 0, 1], [0, 1, 0], [1, 2, 4]), sampler, {"value": values})
    first = 0.8 * strength[:3] / strength[:3].sum() + 0.2 / 3
    second = 0.8 * strength[[0, 2]] / (strength[0] + strength[2]) + 0.2 / 2
    assert found.probability == pytest.approx([first[1], second[1], 0.8 * 0.5 + 0.2 / 2], rel=1e-12)
    assert found.greedy.tolist() == [1, 1, 0.5]
    expected = [first @ values[:3], second @ values[[0, 2]], 5.0]
    assert found.expected["value"] == pytest.approx(expected, rel=1e-12)
    assert first.sum() == pytest.approx(1, rel=1e-12)


def test_standardised_values_mean_the_same_at_every_scale(log):
    class Scaled(Oracle):
        name = "scaled"

        def values(self, requests):
            return [1e6 * v + 3 for v in super().values(requests)]

    report = replay(log, [Oracle(), Scaled()], resamples=2)
    assert estimate(report, "oracle").value.estimate == pytest.approx(
        estimate(report, "scaled").value.estimate, rel=1e-9
    )


def test_policies_are_resolved_by_name_and_other_kinds_can_be_added():
    history = History(events=pl.LazyFrame(), videos=pl.DataFrame())
    made = resolve("bundle:v7", history, {"bundle": lambda version, _: Oracle() if version == "v7" else None})
    assert made.name == "oracle"
    with pytest.raises(
        ValueError, match="unknown policy 'bundle:v7': known are logged, file, newest, popularity, random"
    ):
        resolve("bundle:v7", history)
    with pytest.raises(ValueError, match="needs upload_ts_ms"):
        resolve("newest", history)


def test_a_score_file_must_cover_every_candidate(log, tmp_path):
    path = tmp_path / "scores.parquet"
    table = pl.read_parquet(log / "candidates.parquet").select("request_id", video_id="video_ids").explode("video_id")
    table.with_columns(score=pl.col("video_id") * 0.1).head(-1).write_parquet(path)
    with pytest.raises(ValueError, match=r"no finite score for request r0899, video \d+ \(1 of 3600 candidates\)"):
        replay(log, [f"file:{path}"], resamples=2)
    table.write_parquet(path)
    with pytest.raises(ValueError, match="no column score"):
        replay(log, [f"file:{path}"], resamples=2)


def judged(report, policy: str):
    return next(p for p in report.policies if p.policy == policy)


def test_every_run_checks_itself(log):
    report = replay(log, [Oracle()], resamples=100)
    assert {c.name: c.passed for c in report.self_checks} == {
        "target = logger": True,
        "constant scores leak no order": True,
        "shuffled scores equal random": True,
        "halves of the users agree": True,
    }


def test_a_failed_self_check_refuses_the_run(log, monkeypatch):
    from pipelines.replay import selfchecks

    # Values that stay with their candidates are not shuffled: the policy keeps its advantage over random.
    monkeypatch.setattr(selfchecks, "shuffled", lambda values_C, requests: values_C)
    report = replay(log, [Oracle()], resamples=100, slots=1, sampler=Sampler(temperature=0.5))
    assert [c.name for c in report.self_checks if not c.passed] == ["shuffled scores equal random"]
    assert report.exit_code == 3


def test_all_estimators_stand_side_by_side_and_agree_on_a_log_without_cascade(log):
    report = replay(log, [Oracle()], slots=1, sampler=Sampler(temperature=0.7, epsilon=0.1), clip=float("inf"))
    found = judged(report, "oracle").metrics["long_view"]
    assert set(found) >= {"replay", "ips", "snips", "rips", "snrips", "sips", "snsips", "dm", "dr", "dr@10", "snips@3"}
    head = found["snrips"].value
    for name in ("ips", "snips", "rips", "sips", "snsips", "dr", "dm"):
        assert head.low < found[name].value.estimate < head.high, name
    assert judged(report, "oracle").notes == []


def test_a_log_in_many_parts_is_judged_as_in_one(log, tmp_path, monkeypatch):
    candidates = pl.read_parquet(log / "candidates.parquet").select("request_id", scores="video_ids")
    flat = candidates.with_columns(pl.col("scores").list.eval(pl.element().cast(pl.Float64) * 0.1))
    flat.sample(fraction=1.0, shuffle=True, seed=1).write_parquet(tmp_path / "lists.parquet")
    policies = [Oracle(), f"file:{tmp_path / 'lists.parquet'}", "newest"]
    whole = replay(log, policies, resamples=30)
    monkeypatch.setattr("pipelines.replay.spill.ROWS_A_PART", 200)
    parted = replay(log, policies, resamples=30)
    assert parted.provenance["data_fingerprint"] == whole.provenance["data_fingerprint"]
    assert (parted.rows, parted.requests, parted.users) == (whole.rows, whole.requests, whole.users)
    for a, b in zip(whole.policies, parted.policies, strict=True):
        assert b.diagnostics.effective_sample_size == pytest.approx(a.diagnostics.effective_sample_size, rel=1e-9)
        for metric, estimates in a.metrics.items():
            for name, found in estimates.items():
                same = b.metrics[metric][name].difference
                assert (same.estimate, same.low, same.high) == pytest.approx(
                    (found.difference.estimate, found.difference.low, found.difference.high), abs=1e-9
                ), (metric, name)


def test_scores_as_lists_and_as_rows_are_the_same_policy(log, tmp_path):
    sets = pl.read_parquet(log / "candidates.parquet")
    lists = sets.select("request_id", scores=pl.col("video_ids").list.eval((pl.element() * 7 % 11).cast(pl.Float32)))
    lists.write_parquet(tmp_path / "lists.parquet")
    rows = sets.select("request_id", "video_ids").explode("video_ids").rename({"video_ids": "video_id"})
    rows.with_columns(score=(pl.col("video_id") * 7 % 11).cast(pl.Float32)).write_parquet(tmp_path / "rows.parquet")
    report = replay(log, [f"file:{tmp_path / name}.parquet" for name in ("lists", "rows")], resamples=5)
    assert judged(report, "lists").metrics == judged(report, "rows").metrics


def test_probabilities_of_what_was_shown_are_enough_for_the_weights(log, tmp_path):
    """A file that repeats the logged propensities is the logger itself."""
    rows = pl.read_parquet(last_day(log)).select("request_id", "slot", probability="propensity")
    rows.write_parquet(tmp_path / "again.parquet")
    report = replay(log, [f"file:{tmp_path / 'again.parquet'}"], resamples=20)
    again = judged(report, "again")
    assert (again.diagnostics.mean_weight, again.diagnostics.max_weight) == (1, 1)
    assert again.metrics["long_view"]["snrips"].difference.high == 0
    assert not {"dm", "dr"} & set(again.metrics["long_view"])  # they need what else could have been shown
    rows.with_columns(probability=pl.lit(1.2)).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"slot 0: probability 1.2 is missing or outside \[0, 1\]; 1350 such rows"):
        replay(log, [f"file:{tmp_path / 'bad.parquet'}"], resamples=2)


def test_a_list_of_a_wrong_length_names_its_request(log, tmp_path):
    lists = pl.read_parquet(log / "candidates.parquet").select("request_id", scores="video_ids")
    short = pl.when(pl.col("request_id") == "r0460").then(pl.col("scores").list.head(5)).otherwise("scores")
    lists.with_columns(short).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(ValueError, match=r"request r0460 has 5 scores for 8 candidates \(1 such requests\)"):
        replay(log, [f"file:{tmp_path / 'short.parquet'}"], resamples=2)


def test_labels_among_what_policies_read_are_refused(tmp_path):
    folder = write_log(tmp_path / "log")
    scores = pl.read_parquet(folder / "candidates.parquet").select("request_id", scores="video_ids")
    scores.with_columns(long_view=pl.lit(1)).write_parquet(tmp_path / "leak.parquet")
    with pytest.raises(ReplayInputError, match=r"leak\.parquet: column long_view is an outcome"):
        replay(folder, [f"file:{tmp_path / 'leak.parquet'}"], resamples=2)
    table = pl.read_parquet(folder / "candidates.parquet").with_columns(watch_ms=pl.lit(3))
    table.write_parquet(folder / "candidates.parquet")
    with pytest.raises(ReplayInputError, match=r"candidates\.parquet: column watch_ms is an outcome"):
        replay(folder, ["random"], resamples=2)


def test_a_request_asked_before_the_window_and_shown_inside_it_is_not_judged(tmp_path):
    """Videos reach the screen after the request: the window cuts requests, not rows."""
    folder = write_log(tmp_path)
    sets = pl.read_parquet(folder / "candidates.parquet")
    early = sets.with_columns(ts_ms=pl.col("ts_ms") - 100)  # every row is logged a tenth of a second later
    early.write_parquet(folder / "candidates.parquet")
    last = int(early["ts_ms"].max())
    days = (last - int(early.sort("ts_ms")[200, "ts_ms"]) - 50) / 86_400_000
    report = replay(folder, ["random"], days=days, resamples=2)
    assert report.requests == 450 - 201  # the window opens 50 ms after request 200 was asked, before it was shown


class Shy(Oracle):
    """Believes the opposite of the oracle: the viewers leave early."""

    name = "shy"

    def values(self, requests: LoggedRequests):
        return -QUALITY[requests.video_ids]


def test_a_broken_guardrail_fails_the_run_even_when_the_primary_metric_wins(log, tmp_path):
    sampler = Sampler(temperature=2.0)
    report = replay(log, [Shy()], metrics=["quick_skip", "long_view"], slots=1, sampler=sampler)
    assert report.policies[1].metrics["quick_skip"][report.estimator].difference.low > 0  # the asked metric "wins"
    assert report.broken == {"shy": ["quick_skip"]}
    assert not report.refused
    assert report.exit_code == 3
    assert "shy is refused, whatever quick_skip says: it breaks the guardrail quick_skip" in report.verdict
    write_junit(report, tmp_path / "r.xml")
    cases = {(c.get("classname"), c.get("name")): c for c in ET.parse(tmp_path / "r.xml").getroot().iter("testcase")}  # noqa: S314
    assert cases["replay.shy", "guardrail quick_skip"].find("failure") is not None
    assert cases["replay.shy", "guardrail unconnected"].find("skipped") is not None
    assert cases["replay.self-check", "target = logger"].find("failure") is None
    yardstick = replay(log, ["random"], slots=1, sampler=sampler)
    state = {g.metric: g.state for g in yardstick.policies[1].guardrails}
    assert (state["quick_skip"], yardstick.broken, yardstick.exit_code) == ("broken", {}, 0)


def test_two_reports_are_compared_resample_by_resample_and_only_on_one_log(log, tmp_path):
    sampler = Sampler(temperature=2.0)
    for name, policies in (("a", [Oracle()]), ("b", [Shy()]), ("both", [Oracle(), Shy()])):
        replay(log, policies, slots=1, sampler=sampler, resamples=60).write(tmp_path / f"{name}.json")
    text = io.StringIO()
    Console(file=text, width=200).print(compare(tmp_path / "a.json", tmp_path / "b.json"))
    both = json.loads((tmp_path / "both.json").read_text())
    oracle, shy = (np.array(p["resampled"]["long_view"]) for p in both["policies"][1:])
    low, high = np.quantile((shy - oracle)[1:], [0.025, 0.975])
    assert f"{(shy - oracle)[0]:+.4f} [{low:+.4f}, {high:+.4f}]" in text.getvalue()
    replay(log, [Shy()], slots=2, sampler=sampler, resamples=60).write(tmp_path / "deeper.json")
    with pytest.raises(NotComparableError, match="data_fingerprint is"):
        compare(tmp_path / "a.json", tmp_path / "deeper.json")
    replay(log, [Shy()], slots=1, sampler=sampler, resamples=60, seed=1).write(tmp_path / "seed.json")
    with pytest.raises(NotComparableError, match="seed is 0 in"):
        compare(tmp_path / "a.json", tmp_path / "seed.json")
    (tmp_path / "old.json").write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="schema_version 1, expected 2"):
        compare(tmp_path / "a.json", tmp_path / "old.json")


def test_the_page_is_one_file_without_network_that_quotes_no_refused_number(log, tmp_path):
    report = replay(log, [Oracle(), "random"], sampler=Sampler(temperature=0.02, epsilon=0.0), resamples=40)
    assert set(report.refused) == {"oracle"}
    page = write_html(report, tmp_path / "deep" / "r.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=|@import|url\(|<script""", page) == []
    found = report.policies[1].metrics["long_view"][report.estimator].difference
    assert f"{found.estimate:+.4f}" not in page[: page.index('id="weights"')]
    assert page.count("<svg") >= 4  # two forests of two policies, histograms, sweep
    assert "effective sample size" in page
    assert "decile 1" in page
    assert report.provenance["data_fingerprint"] in page


def test_exit_codes_and_messages_of_the_command_line(log, tmp_path, monkeypatch, capsys):
    def reelrank(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["reelrank", "replay", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    events = ("--events", str(log), "--resamples", "20")
    assert reelrank(*events, "--policy", "random", "--slots", "1", "--out", str(tmp_path / "a.json")) == 0
    assert "4 of 4 self-checks" not in capsys.readouterr().out  # random has no values of its own to shuffle
    assert reelrank(*events, "--policy", "random", "--metric", "joy") == 2
    assert "metric 'joy': known are click" in capsys.readouterr().err
    assert reelrank("--policy", "random") == 2
    assert "--events is missing" in capsys.readouterr().err
    greedy = write_log(tmp_path / "greedy", greedy=True)
    assert reelrank("--events", str(greedy), "--policy", "random", "--out", str(tmp_path / "b.json")) == 3
    assert "no support in the log" in " ".join(capsys.readouterr().out.split())
    assert reelrank("compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 3
    assert "refused to compare" in capsys.readouterr().err
    assert reelrank("compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")) == 0
