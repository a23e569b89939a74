"""What a run shows at its end: feeds fetched over gRPC, tables of what was measured, and where the report lies."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from features.eligibility import Viewer
from pipelines.console import Stages, output
from pipelines.ingest import load_table
from pipelines.report import write_report
from pipelines.workspace import Workspace
from serving.client import FeedClient
from serving.security import ClientSecurity

START_TIMEOUT_S = 120.0
UNKNOWN_USER_ID = -1
FEED_LENGTH = 10
AFTER_LOG_MS = 60_000
"""Feeds are asked for a minute after the log ends: by today's clock every video of an old log would be ancient."""


@contextmanager
def served(ws: Workspace, store: Path | None = None) -> Iterator[str]:
    """`reelrank serve` on the run's registry in a process of its own; yields its address, stops it at the end.

    `store`: by default one that belongs to the run.
    """
    log_path = ws.root / "serve.log"
    command = [sys.executable, "-m", "pipelines.cli", "serve", "--registry", str(ws.registry)]
    # A few feeds are not worth a compiler's half minute.
    command += ["--store", str(store or ws.root / "live.sqlite"), "--port", "0", "--scorer", "plain"]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        try:
            yield _wait_for_address(process, log_path)
        finally:
            process.terminate()
            process.wait(timeout=START_TIMEOUT_S)


def _wait_for_address(process: subprocess.Popen, log_path: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        found = re.search(r"serving on (\S+)", log_path.read_text())
        if found:
            return found.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start; its output is in {log_path}:\n{log_path.read_text()[-2000:]}")


def fetch_feeds(ws: Workspace, record: dict, shown: Stages, users: int) -> None:
    """Serve the published bundle, fetch a feed for some users (the last one unknown), and add them to the record."""
    if users < 1:
        return
    ids = np.load(ws.dataset_dir / "users_ids.npy", mmap_mode="r")
    sizes = np.diff(np.load(ws.dataset_dir / "history_user_start.npy", mmap_mode="r"))[1:]
    active = np.argsort(-sizes, kind="stable")
    now_ms = int(np.load(ws.dataset_dir / "examples_ts_ms.npy", mmap_mode="r").max()) + AFTER_LOG_MS
    chosen = [int(ids[active[i * len(active) // 4]]) for i in range(users - 1)] + [UNKNOWN_USER_ID]
    with shown.stage("serve and fetch") as stage:
        with served(ws) as address, FeedClient(address) as client:
            surface = ws.recipe.feed.surfaces[0]
            feeds = [
                client.get_feed(user, k=FEED_LENGTH, surface=surface, now_ms=now_ms, timeout_s=10.0) for user in chosen
            ]
        stage.rows = sum(len(feed.items) for feed in feeds)
        stage.note = f"{len(feeds)} feeds over gRPC"
    tags = _tags(ws)
    record["feeds"] = [_feed_record(user, feed, tags) for user, feed in zip(chosen, feeds, strict=True)]


def print_feed(
    address: str, user_id: int, k: int, surface: str, now_ms: int, viewer: Viewer, security: ClientSecurity
) -> None:
    """Fetch one feed from a running server and print it; tags are not on the wire."""
    with FeedClient(address, security=security) as client:
        feed = client.get_feed(user_id, k=k, surface=surface, viewer=viewer, now_ms=now_ms, timeout_s=10.0)
    output().print(_feed_table(_feed_record(user_id, feed, {})))


def finish(ws: Workspace, record: dict) -> None:
    """Print feeds and figures, write the report."""
    console = output()
    for feed in record.get("feeds", []):
        console.print(_feed_table(feed))
    if "retrieval" in record:
        print_metrics(record, console)
    path = ws.root / "report.html"
    write_report(record, path)
    if "bundle" in record:
        console.print(f"bundle  {record['bundle']} in {ws.registry}", soft_wrap=True)
        console.print(f"content {record['content_sha256']}", soft_wrap=True)
    console.print(f"report  {path}", soft_wrap=True)


def print_metrics(record: dict, console: Console | None = None) -> None:
    """Tables of retrieval and ranking; takes `run.json` or `metrics.json`."""
    console = console or output()
    rows = record["retrieval"]["rows"] if isinstance(record["retrieval"], dict) else record["retrieval"]
    console.print(_table("Retrieval on days never trained on", rows))
    channels = record["channels"]["rows"] if isinstance(record["channels"], dict) else record["channels"]
    console.print(_table("What each candidate source brings to the pool", channels))
    console.print(_table("Ranking on days never trained on", record["ranking"], skip=("calibration_two_se",)))
    console.print(_table("long_view within a user's impressions (KuaiRand's protocol)", record["primary"]))


def _table(title: str, rows: list[dict], skip: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in skip]
    for name in names:
        table.add_column(name, justify="left" if name in ("name", "task", "slice", "source") else "right")
    for row in rows:
        table.add_row(*[_cell(row.get(name)) for name in names])
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _feed_table(feed: dict) -> Table:
    who = f"user {feed['user_id']}" + (" (unknown: a cold start)" if feed["cold"] else "")
    table = Table(title=f"Feed of {who}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("slot", "video", "author", "tags", "length", "why", "p(long view)", "value", "propensity"):
        table.add_column(name, justify="right" if name in ("slot", "length", "value", "propensity") else "left")
    for item in feed["items"]:
        long_view = item["scores"].get("long_view")
        table.add_row(
            str(item["slot"] + 1),
            str(item["video_id"]),
            str(item["author_id"]),
            ",".join(map(str, item["tags"])),
            f"{item['duration_s']:.0f} s",
            item["reason"],
            "-" if long_view is None else f"{long_view:.3f}",
            f"{item['value']:.3f}",
            f"{item['propensity']:.4f}",
        )
    return table


def _feed_record(user_id: int, feed, tags: dict[int, list[int]]) -> dict:
    return {
        "user_id": user_id,
        "cold": feed.cold,
        "bundle": feed.bundle_version,
        "items": [
            {
                "slot": item.slot,
                "video_id": item.video_id,
                "author_id": item.author_id,
                "source": item.sources[0],
                "reason": item.reason,
                "value": item.value,
                "propensity": item.propensity,
                "terms": dict(item.value_terms),
                "scores": dict(zip(feed.tasks, item.scores, strict=False)),
                "duration_s": item.duration_ms / 1000.0,
                "tags": tags.get(item.video_id, []),
            }
            for item in feed.items
        ],
    }


def _tags(ws: Workspace) -> dict[int, list[int]]:
    videos = load_table(ws.canonical, "videos")
    if videos is None:
        return {}
    pairs = zip(videos["video_id"].to_pylist(), videos["tags"].to_pylist(), strict=True)
    return {video_id: tags or [] for video_id, tags in pairs}
