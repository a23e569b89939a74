"""What a figure was taken on: the processor, its load, the versions; and what a process has used of it (Linux)."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console


def describe(packages: tuple[str, ...]) -> dict[str, Any]:
    """The processor, its cores and load at this moment, and the versions of Python and of the packages."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": ", ".join(versions),
    }


def describe_at_rest(packages: tuple[str, ...], console: Console) -> dict[str, Any]:
    """`describe`, with a warning when something else is running: wall times are then not this program's own."""
    machine = describe(packages)
    if machine["load_average"] > 1:
        console.print(
            f"[yellow]load average {machine['load_average']:.1f} before the start: other work runs here, so read the "
            "CPU columns, and take wall times again on an idle machine[/yellow]"
        )
    return machine


def line(machine: dict[str, Any]) -> str:
    """The machine in one line, for under a table."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average']:.1f} before the run, "
        f"{machine['versions']}"
    )


def cpu_s(pid: int) -> float:
    """User and system time of a process (/proc/PID/stat fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib() -> dict[str, float]:
    """Resident memory of this process: all; with a share of what others map too; and what no file backs."""
    fields = {}
    for row in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = row.split(":")
        fields[name] = int(amount.split()[0]) / 1024
    return {"rss": fields["Rss"], "pss": fields["Pss"], "anonymous": fields["Anonymous"]}
