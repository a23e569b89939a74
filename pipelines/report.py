"""One self-contained HTML page of a run: no network, no script, charts as inline SVG. Prints well, light and dark.

Geometry is computed here, in pixels of each chart's own box; the markup is in `report.html.j2` beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

SMALL_MULTIPLE_PX = 190
"""Side of a reliability chart."""
FOREST_PX = 620
"""Width of a forest plot's axis."""
TERMS_SHOWN = 3
"""Terms of a value named beside each feed item, largest first."""


def write_report(run: Mapping[str, Any], path: str | Path) -> Path:
    """Render `run` to one HTML file at `path`. Every key is optional; a missing section is left out.

    - title, created, bundle: strings; machine, versions: {name: value}
    - stages: [{name, seconds, rows, note}]
    - retrieval: [{name, recall@100, ...}]; pools: [{slice, queries, pool recall}]; channels: [{slice, source, quota,
      filled, alone, marginal, unique}]; ranking: [{task, auc, gauc, ne, calibration, ...}]; primary: [{name, gauc,
      ndcg5, primary}]: tables, one column a key in the order of first appearance
    - slices: [{slice, value, task, calibration, ece, ...}]; watch: {mae_s, xauc, ..., buckets: [{duration_s, ...}]};
      slots: [{slot, impressions, TASK: logit}]; collisions: [{table, collision_rate}]
    - reliability: {task: {predicted: [], observed: [], rows: []}}, as `asdict(metrics.reliability(...))` with lists
    - gate: [{rule, candidate, live, passed}]
    - replay: `ReplayReport.to_dict()`
    - feeds: [{user_id, cold, items: [...]}]; an item is {slot, video_id, author_id, source, value, propensity,
      terms: {name: value}, duration_s, tags: []}
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = number
    html = environment.get_template("report.html.j2").render(
        title=run.get("title", "reelrank run"),
        created=run.get("created", ""),
        facts=_facts(run),
        machine=run.get("machine") or {},
        versions=run.get("versions") or {},
        stages=_stages(run.get("stages") or []),
        tables=_tables(run),
        gate=run.get("gate") or [],
        reliability=[_reliability(task, curve) for task, curve in (run.get("reliability") or {}).items()],
        side=SMALL_MULTIPLE_PX,
        replay=_replay(run["replay"]) if run.get("replay") else None,
        feeds=[_feed(feed) for feed in run.get("feeds") or []],
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return target


def number(value: object) -> str:
    """How a cell reads: thousands in groups, four significant decimals, a dash for what is not there."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few things to know before reading on."""
    facts = []
    if run.get("bundle"):
        facts.append(("bundle", str(run["bundle"])))
    if run.get("stages"):
        facts.append(("wall time", _duration(sum(stage.get("seconds") or 0 for stage in run["stages"]))))
    if run.get("gate"):
        failed = sum(not rule["passed"] for rule in run["gate"])
        facts.append(("gate", "passed" if not failed else f"{failed} of {len(run['gate'])} rules failed"))
    if run.get("replay"):
        refused = len(run["replay"].get("refused") or {})
        judged = len(run["replay"]["policies"]) - 1
        facts.append(("replay", f"{judged - refused} of {judged} policies judged"))
    return facts


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage.get("seconds") or 0 for stage in stages), default=0) or 1
    return [
        {
            "name": stage["name"],
            "rows": stage.get("rows"),
            "note": stage.get("note") or "",
            "time": _duration(stage["seconds"]) if stage.get("seconds") is not None else "–",  # noqa: RUF001
            "share": round(100 * (stage.get("seconds") or 0) / longest, 1),
        }
        for stage in stages
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _tables(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    titles = {
        "retrieval": ("Retrieval", "Share of what each user went on to watch that is among the first k candidates."),
        "pools": ("Candidate pool", "Share of the videos a user went on to watch, and could see by then, in the pool."),
        "channels": (
            "Candidate sources",
            "Quota and filled share of the pool; recall of a source's own best within its quota (alone), what the pool "
            "loses without it (marginal), and what nobody else found (unique).",
        ),
        "ranking": ("Ranking by task", "On days never trained on. Normalised entropy below 1 beats the base rate."),
        "primary": (
            "Ranking against baselines",
            "Within each user's shown videos; primary is the mean of GAUC and nDCG@5.",
        ),
        "slices": (
            "Calibration by slice",
            "Mean prediction over mean label, two standard errors of the labels, and the expected calibration error "
            "beside what chance alone gives at these sizes.",
        ),
        "watch": (
            "Watch time by duration",
            "Mean absolute error in seconds, share of pairs in the right order, means of both.",
        ),
        "slots": (
            "Slots",
            "Logits that the side tower gives each slot, less those of the first; serving leaves them out.",
        ),
        "collisions": ("Hash collisions", "Share of the known ids that share their embedding row with another one."),
    }
    found = []
    for key, (title, caption) in titles.items():
        rows = (run.get(key) or {}).get("buckets") if key == "watch" else run.get(key)
        rows = rows or []
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            cells = [[row.get(column) for column in columns] for row in rows]
            found.append({"title": title, "caption": caption, "columns": columns, "rows": cells})
    return found


def _reliability(task: str, curve: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Points of a calibration curve in a square whose both axes run from 0 to the same round number."""
    top = _round_up(max([*curve["predicted"], *curve["observed"], 1e-6]))
    side = SMALL_MULTIPLE_PX
    points = [
        (round(side * p / top, 1), round(side * (1 - o / top), 1), p, o, rows)
        for p, o, rows in zip(curve["predicted"], curve["observed"], curve["rows"], strict=True)
    ]
    line = " ".join(f"{x},{y}" for x, y, *_ in points)
    return {"task": task, "top": f"{top:g}", "points": points, "line": line}


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def _replay(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "verdict": report["verdict"],
        "estimator": report["estimator"],
        "requests": report["requests"],
        "users": report["users"],
        "slots": report.get("provenance", {}).get("slots"),
        "refused": report.get("refused") or {},
        "forests": [_forest(report, metric) for metric in report["metrics"]],
        "diagnostics": [{"policy": p["policy"], **p["diagnostics"]} for p in report["policies"]],
        "sweep": _sweep(report),
        "fingerprint": str(report.get("provenance", {}).get("data_fingerprint", ""))[:16],
    }


def _forest(report: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Differences to the logged policy with their intervals, on one axis that always holds 0."""
    others = [p for p in report["policies"] if p["policy"] != "logged"]
    found = {p["policy"]: p["metrics"][metric][report["estimator"]] for p in report["policies"]}
    judged = [found[p["policy"]]["difference"] for p in others if not p["refused"]]
    reach = [0.0, *(d[end] for d in judged for end in ("low", "high", "estimate") if d[end] is not None)]
    low, high = min(reach), max(reach)
    pad = (high - low) * 0.06 or 1.0

    def at(value: float) -> float:
        return round(FOREST_PX * (value - low + pad) / (high - low + 2 * pad), 1)

    rows = []
    for policy in others:
        d, value = found[policy["policy"]]["difference"], found[policy["policy"]]["value"]
        row: dict[str, Any] = {"policy": policy["policy"]}
        if policy["refused"] or d["low"] is None:
            row |= {"refused": True, "text": "refused", "value": "–"}  # noqa: RUF001
        else:
            side = "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "even"
            row |= {
                "refused": False,
                "low": at(d["low"]),
                "high": at(d["high"]),
                "mid": at(d["estimate"]),
                "side": side,
            }
            row |= {
                "text": f"{d['estimate']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]",
                "value": number(value["estimate"]),
            }
        rows.append(row)
    logged = number(found["logged"]["value"]["estimate"]) if "logged" in found else ""
    return {"metric": metric, "rows": rows, "zero": at(0.0), "width": FOREST_PX, "logged": logged}


def _sweep(report: Mapping[str, Any]) -> dict[str, Any]:
    """The first metric under every estimator, for the policies the log can judge."""
    metric = report["metrics"][0]
    judged = [p for p in report["policies"] if not p["refused"]]
    names = [name for name in judged[0]["metrics"][metric] if name != "logged"] if judged else []
    rows = [
        [
            name,
            *(
                p["metrics"][metric][name]["value"]["estimate"] if name in p["metrics"][metric] else None
                for p in judged
            ),
        ]
        for name in names
    ]
    return {"metric": metric, "columns": ["estimator", *(p["policy"] for p in judged)], "rows": rows}


def _feed(feed: Mapping[str, Any]) -> dict[str, Any]:
    items = feed.get("items") or []
    top = max((abs(item.get("value") or 0) for item in items), default=0) or 1
    return {
        "user_id": str(feed["user_id"]),
        "cold": bool(feed.get("cold")),
        "items": [_item(item, top) for item in items],
    }


def _item(item: Mapping[str, Any], top: float) -> dict[str, Any]:
    terms = sorted((item.get("terms") or {}).items(), key=lambda term: -abs(term[1]))[:TERMS_SHOWN]
    seconds = item.get("duration_s")
    return {
        "slot": item.get("slot"),
        "video_id": str(item.get("video_id")),
        "author_id": str(item.get("author_id") if item.get("author_id") is not None else ""),
        "source": item.get("source") or "",
        "value": item.get("value"),
        "share": round(100 * abs(item.get("value") or 0) / top, 1),
        "propensity": item.get("propensity"),
        "duration": f"{seconds:.0f} s" if seconds is not None else "",
        "tags": number(item.get("tags") or []),
        "terms": [f"{name} {value:+.3f}" for name, value in terms],
    }
