"""What the registry's commands print: versions, one version, and two side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from features.artifacts import Bundle, Registry
from features.remote import RemoteRegistry
from pipelines.console import output

Anywhere = Registry | RemoteRegistry
COMPARED = ("feed.json", "encoder/spec.json", "towers/towers.json", "ranker/ranker.json", "index/index.json")
"""Files whose fields are compared: feed, feature schema, and how models and index were configured."""
_RESULTS = ("base_rates", "watch_quantiles", "sha256", "files", "rows", "bytes", "build_s")
"""Fields that any other training changes."""


def print_versions(where: Anywhere) -> None:
    """One line a version, oldest first."""
    live, last = where.live(), {entry["version"]: entry for entry in where.history()}
    table = Table(box=None)
    for name in ("version", "created", "MiB", "recipe", "gate", "live"):
        table.add_column(name)
    for version in where.list():
        bundle = where.describe(version)
        size = sum(entry["size"] for entry in bundle.files.values()) / 2**20
        was = last.get(version)
        status = "LIVE" if version == live else f"{was['action']} {was['at'][:19]}" if was else "never"
        created = bundle.created[:19]
        table.add_row(version, created, f"{size:,.1f}", str(bundle.meta.get("recipe", "-")), _gate(bundle.meta), status)
    output().print(table)


def print_version(where: Anywhere, version: str) -> None:
    """Its manifest's words, the gate's verdicts, its figures."""
    console, bundle = output(), where.describe(version)
    console.print(f"{version}, made {bundle.created}, {len(bundle.files)} files, gate: {_gate(bundle.meta)}")
    for name in ("recipe", "data", "judged_against"):
        console.print(f"{name}: {bundle.meta.get(name, '-')}")
    verdicts = bundle.meta.get("gate", [])
    if verdicts:
        table = Table(box=None)
        for name in ("rule", "found", "wanted", "live", "passed"):
            table.add_column(name)
        for row in verdicts:
            figures = (_short(row[name]) for name in ("candidate", "bound", "live"))
            table.add_row(row["rule"], *figures, "yes" if row["passed"] else "NO")
        console.print(table)
    for name, value in _figures(where, version).items():
        console.print(f"{name}: {_short(value)}")


def print_difference(where: Anywhere, a: str, b: str) -> None:
    """Only what differs."""
    console = output()
    first, second = where.describe(a), where.describe(b)
    parts = [
        ("figures", _figures(where, a), _figures(where, b)),
        ("manifest", _said(first), _said(second)),
        *((name, _fields(where, a, name), _fields(where, b, name)) for name in COMPARED),
        ("sizes, bytes", _sizes(first), _sizes(second)),
    ]
    for title, ours, theirs in parts:
        odd = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if not odd:
            console.print(f"{title}: the same")
            continue
        table = Table(title=title, title_justify="left", box=None)
        for name in ("", a, b):
            table.add_column(name)
        for name in odd:
            table.add_row(name, _short(ours.get(name)), _short(theirs.get(name)))
        console.print(table)
    shared = first.files.keys() & second.files.keys()
    changed = sum(first.files[name]["sha256"] != second.files[name]["sha256"] for name in shared)
    console.print(f"{changed} of the {len(shared)} files that both have differ in bytes")


def _said(bundle: Bundle) -> dict[str, Any]:
    return {name: bundle.meta.get(name) for name in ("recipe", "data", "forced", "judged_against")}


def _sizes(bundle: Bundle) -> dict[str, Any]:
    return {name: entry["size"] for name, entry in bundle.files.items()}


def _figures(where: Anywhere, version: str) -> dict[str, float | str | None]:
    """Of `metrics.json`, by a name a person knows."""
    metrics = json.loads(where.read_text(version, "metrics.json"))
    found: dict[str, float | str | None] = {"test days": ", ".join(metrics.get("split", {}).get("test", [])) or None}
    for row in metrics.get("retrieval", {}).get("rows", []):
        if row["name"].startswith("two towers"):
            found |= {k: v for k, v in row.items() if k != "name"}
    for row in metrics.get("ranking", []):
        for name in ("auc", "gauc", "normalised_entropy", "calibration"):
            if name in row:
                found[f"{row['task']} {name}"] = row[name]
    return found


def _fields(where: Anywhere, version: str, name: str) -> dict[str, Any]:
    """Dotted paths to values of a JSON file; empty when the version has no such file."""
    if name not in where.describe(version).files:
        return {}
    return dict(_flat(json.loads(where.read_text(version, name)), ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            if name not in _RESULTS:
                yield from _flat(entry, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            label = entry.get("name", number) if isinstance(entry, dict) else number
            yield from _flat(entry, f"{path}[{label}]")
    else:
        yield path, value


def _gate(meta: dict) -> str:
    if meta.get("forced") and meta.get("forced_rules"):
        return f"FORCED past {len(meta['forced_rules'])} rules"
    return f"{len(meta['gate'])} rules held" if meta.get("gate") else "-"


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
