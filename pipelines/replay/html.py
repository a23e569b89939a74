"""A replay as one self-contained HTML page: no network, no script, charts as inline SVG.

Geometry is computed here, in pixels of each chart's own box; the markup is in `replay.html.j2` beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.replay.report import ReplayReport

FOREST_PX, SIDE_PX, HISTOGRAM_PX = 560, 190, (420, 130)


def write_html(report: ReplayReport, path: str | Path) -> Path:
    """Render the report to one file at `path`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["signed"] = lambda interval: _interval(interval, "+")
    environment.filters["plain"] = lambda interval: _interval(interval, "")
    environment.filters["number"] = _number
    data = report.to_dict()
    html = environment.get_template("replay.html.j2").render(
        report=data,
        forests=[forest(data, metric) for metric in data["metrics"]],
        weights=[_histogram(p) for p in data["policies"] if p["policy"] != "logged"],
        sweep=_ess_sweep(data),
        estimators=_estimators(data),
        heat=_heat(data),
        reliability=[
            {"policy": p["policy"], **_reliability(metric, curve)}
            for p in data["policies"]
            if p["ranking"]
            for metric, curve in p["ranking"]["reliability"].items()
        ],
        side=SIDE_PX,
        histogram=HISTOGRAM_PX,
        forest_px=FOREST_PX,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return target


def forest(report: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Differences to the logged policy with their intervals, on one axis that always holds 0."""
    others = [p for p in report["policies"] if p["policy"] != "logged"]
    judged = [p["metrics"][metric][report["estimator"]]["difference"] for p in others if not p["refused"]]
    ends = [0.0, *(d[end] for d in judged for end in ("low", "high") if d[end] is not None)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def at(x: float) -> float:
        return round(20 + (FOREST_PX - 40) * (x - low) / span, 1)

    rows = []
    for p in others:
        found = p["metrics"][metric][report["estimator"]]
        d = found["difference"]
        row = {"policy": p["policy"], "refused": bool(p["refused"]), "difference": d, "value": found["value"]}
        if not p["refused"] and d["low"] is not None:
            side = "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "even"
            row |= {"low": at(d["low"]), "mid": at(d["estimate"]), "high": at(d["high"]), "side": side}
        rows.append(row)
    logged = report["policies"][0]["metrics"][metric]["logged"]["value"]
    return {"metric": metric, "rows": rows, "zero": at(0.0), "logged": logged}


def _histogram(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Share of the rows, and of the weight, in each doubling of the weight."""
    found = policy["diagnostics"]["histogram"]
    width, height = HISTOGRAM_PX
    rows = sum(found["rows"]) or 1
    share = [r / rows for r in found["rows"]]
    top = max([*share, *found["mass"], 1e-9])
    step = width / max(len(share), 1)
    bars = [
        {
            "x": round(i * step, 1),
            "rows": round(height * share[i] / top, 1),
            "mass": round(height * found["mass"][i] / top, 1),
            "label": f"{w:.3g} to {2 * w:.3g}: {share[i]:.1%} of rows, {found['mass'][i]:.1%} of the weight",
            "tick": f"{w:.3g}" if i % 2 == 0 else "",
        }
        for i, w in enumerate(found["weight"])
    ]
    return {"policy": policy["policy"], "bars": bars, "bar": round(step / 2 - 1, 1)}


def _ess_sweep(report: Mapping[str, Any]) -> dict[str, Any]:
    """Effective sample size at each clip, on a logarithmic axis."""
    width, height = HISTOGRAM_PX
    policies = [p for p in report["policies"] if p["policy"] != "logged"]
    clips = list(policies[0]["diagnostics"]["effective_by_clip"]) if policies else []
    clips = sorted(clips, key=lambda c: -float(c))
    sizes = [max(p["diagnostics"]["effective_by_clip"][c], 1.0) for p in policies for c in clips]
    low, high = math.log10(min(sizes, default=1.0)), math.log10(max(sizes, default=10.0))
    span = max(high - low, 1e-9)
    lines = []
    for p in policies:
        points = []
        for i, clip in enumerate(clips):
            ess = p["diagnostics"]["effective_by_clip"][clip]
            y = round(height * (1 - (math.log10(max(ess, 1.0)) - low) / span), 1)
            points.append(
                (round(width * i / max(len(clips) - 1, 1), 1), y, f"{p['policy']} at clip {clip}: {ess:,.0f}")
            )
        lines.append({"policy": p["policy"], "points": points, "path": " ".join(f"{x},{y}" for x, y, _ in points)})
    ticks = [(round(width * i / max(len(clips) - 1, 1), 1), clip) for i, clip in enumerate(clips)]
    return {"lines": lines, "ticks": ticks, "low": f"{10**low:,.0f}", "high": f"{10**high:,.0f}"}


def _estimators(report: Mapping[str, Any]) -> dict[str, Any]:
    """The first metric under every estimator and clip, for the policies the log can judge."""
    metric = report["metrics"][0]
    judged = [p for p in report["policies"] if not p["refused"] and p["policy"] != "logged"]
    names = list(dict.fromkeys(name for p in judged for name in p["metrics"][metric]))
    rows = [(name, [p["metrics"][metric].get(name, {}).get("value") for p in judged]) for name in names]
    return {"metric": metric, "policies": [p["policy"] for p in judged], "rows": rows}


def _heat(report: Mapping[str, Any]) -> dict[str, Any]:
    """Slices by policies; colour is the difference over the largest one, in four steps each way."""
    judged = [p for p in report["policies"] if p["slices"] and not p["refused"]]
    keys = list(dict.fromkeys((s["dimension"], s["bucket"], s["rows"]) for p in judged for s in p["slices"]))
    by_key = [{(s["dimension"], s["bucket"]): s for s in p["slices"]} for p in judged]
    sizes = [abs(s["found"]["difference"]["estimate"] or 0.0) for p in judged for s in p["slices"]]
    largest = max(sizes, default=0.0) or 1.0
    rows = []
    for dimension, bucket, n in keys:
        cells = []
        for found in by_key:
            s = found.get((dimension, bucket))
            d = s["found"]["difference"] if s else None
            known = d is not None and d["estimate"] is not None
            step = round(4 * d["estimate"] / largest) if d is not None and known else 0
            cells.append(
                {
                    "difference": d,
                    "step": step,
                    "different": bool(s and s["different"]),
                    "q": s["q_value"] if s else None,
                }
            )
        rows.append({"dimension": dimension, "bucket": bucket, "rows": n, "cells": cells})
    return {"policies": [p["policy"] for p in judged], "rows": rows}


def _reliability(metric: str, curve: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Points of a calibration curve in a square whose both axes run from 0 to the same number."""
    top = max([*curve["predicted"], *curve["observed"], 1e-6])
    points = [
        (round(SIDE_PX * p / top, 1), round(SIDE_PX * (1 - o / top), 1), f"promised {p:.4f}, was {o:.4f}, {n:,} rows")
        for p, o, n in zip(curve["predicted"], curve["observed"], curve["rows"], strict=True)
    ]
    return {"metric": metric, "top": f"{top:.3g}", "points": points, "path": " ".join(f"{x},{y}" for x, y, _ in points)}


def _number(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and abs(value) >= 1000
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )


def _interval(interval: Mapping[str, float | None], sign: str) -> str:
    low, middle, high = interval["low"], interval["estimate"], interval["high"]
    if middle is None:
        return ""
    if low is None or high is None:
        return f"{middle:{sign}.4f}"
    return f"{middle:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"
