"""A replay in the terminal: the head table, how far the weights can be trusted, guardrails, and the verdict."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pipelines.replay.judge import PolicyResult
from pipelines.replay.report import ReplayReport, shown

SLICES_SHOWN = 8
"""Slices named in the terminal, the surest first; the report has all."""


def print_report(report: ReplayReport, console: Console | None = None) -> None:
    """The head table, the weights, the refusals, what is broken, and the verdict."""
    console = console or Console()
    console.print(head_table(report))
    console.print(weight_table(report))
    if any(g.state != "not logged" for result in report.policies for g in result.guardrails):
        console.print(guardrail_table(report))
    for result in report.policies:
        for line in _slice_lines(result, report.metrics[0]):
            console.print(line, highlight=False)
    for result in report.policies:
        for note in result.notes:
            console.print(f"[bold]{result.policy}[/bold]: {note}", highlight=False)
    for check in report.self_checks:
        if not check.passed:
            console.print(f"[bold]refused[/bold]: self-check failed, {check.name}: {check.detail}", highlight=False)
    for policy, reasons in report.refused.items():
        console.print(f"[bold]refused[/bold] {policy}: {'; '.join(reasons)}", highlight=False)
    for reason, requests in sorted(report.not_judged.items()):
        console.print(f"{requests:,} requests of the window are not judged: {reason}", highlight=False)
    passed = sum(check.passed for check in report.self_checks)
    console.print(f"{passed} of {len(report.self_checks)} self-checks passed", highlight=False)
    console.print(report.verdict, highlight=False)


def head_table(report: ReplayReport) -> Table:
    """One row a policy and metric. A refused policy has no number to be quoted."""
    slots = report.provenance.get("slots")
    depth = f"first {slots} slot{'s' if slots > 1 else ''}" if slots else "all slots"
    asked = f"{report.requests:,} requests by {report.users:,} users, {depth}"
    table = Table(title=f"replay of {asked}; {report.estimator}", box=SIMPLE, pad_edge=False)
    for name in ("policy", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("estimate [95%]", "less logged [95%]"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.policies:
        for metric in report.metrics:
            found = result.metrics[metric][report.estimator]
            digits = 4 if abs(found.value.estimate) < 1 else 2
            numbers = (shown(found.value, digits), shown(found.difference, digits, sign="+"))
            table.add_row(result.policy, metric, *(("refused", "") if result.refused else numbers))
    return table


def weight_table(report: ReplayReport) -> Table:
    """One row a policy: overlap with the logger and what the importance weights look like."""
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in ("matched", "ESS", "ESS/n", "mean w", "max w", "clipped", "top 1%", "no support"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.policies:
        d = result.diagnostics
        table.add_row(
            result.policy,
            f"{d.match_rate:.1%}",
            f"{d.effective_sample_size:,.0f}",
            f"{d.effective_share:.1%}",
            f"{d.mean_weight:.3f}",
            f"{d.max_weight:,.1f}",
            f"{d.share_clipped:.2%}",
            f"{d.top_percent_share:.0%}",
            f"{d.unsupported_mass.estimate:.1%}",
        )
    return table


def guardrail_table(report: ReplayReport) -> Table:
    """One row a judged policy and guardrail."""
    table = Table(box=SIMPLE)
    for name in ("policy", "guardrail"):
        table.add_column(name, no_wrap=True)
    for name in ("logged", "less logged [95%]", "allowed", ""):
        table.add_column(name, justify="right", no_wrap=True)
    marks = {"up": "+", "down": "-", "either": "+-"}
    for result in report.policies:
        for g in result.guardrails if not result.refused else ():
            if g.state == "not logged":
                table.add_row(result.policy, g.metric, "", "", "", g.state)
                continue
            state = f"{g.state}, yardstick" if result.yardstick and g.state == "broken" else g.state
            allowed = f"{marks[g.harm]}{g.limit:.4f}"
            table.add_row(result.policy, g.metric, f"{g.logged:.4f}", shown(g.difference, 4, sign="+"), allowed, state)
    return table


def _slice_lines(result: PolicyResult, metric: str) -> list[str]:
    found = [s for s in result.slices if s.different]
    if result.refused or result.yardstick or not found:
        return []
    surest = sorted(found, key=lambda s: s.q_value)[:SLICES_SHOWN]
    names = ", ".join(f"{s.dimension} {s.bucket} {s.found.difference.estimate:+.4f}" for s in surest)
    return [f"{result.policy}: {metric} differs in {len(found)} of {len(result.slices)} slices: {names}"]
