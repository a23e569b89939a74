"""Uploads and removals over gRPC: how soon they are acknowledged and retrievable, and what they cost the pages.

    python -m benchmarks.uploads --registry PATH [--minutes 3] [--per-minute 1000] [--json FILE]

First in this process, page by page in turn: GetFeed on the bundle as it was loaded, on one that takes uploads and has
met none, and on one with uploads. Then against a server of its own: acknowledgements of single uploads and of hundreds;
pages at half of what two clients reached, quietly and beside 1,000 uploads and 1,000 removals a minute. Every page is
held against what was acknowledged as removed before it was asked for. Every upload has an author whom one auditor
follows: as that author's newest it leads the auditor's followed channel, so a Retrieve without it is wrong. At the end
the server is killed, and every auditor must find exactly what their author has left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.funnel import server
from benchmarks.machine import describe_at_rest, line, resident_mib
from candidate_gen.live import LiveConfig
from features.artifacts import Registry
from features.transforms import Encoder
from serving.bundle import FeedBundle
from serving.client import FeedClient
from serving.encode import content_width
from serving.feed import Feed
from serving.live import LiveBundle
from serving.messages import Event, FeedRequest, Level, Video
from serving.store import NoStore

K, AUDIT_K, MANY = 10, 2_000, 10_000
CLIENTS, CAPACITY_S = 2, 10.0
AUTHOR_0, AUDITOR_0, VIDEO_0 = -(2**61), -(2**60), -(2**62)
"""Ids that no bundle has: negative ones."""
AUTHOR_UPLOADS = 100
"""Uploads an author has: fewer than the followed channel may bring to a pool of AUDIT_K."""
PROBE_EVERY = 5
"""Every so many uploads, an auditor asks for it at once."""


def main() -> None:
    """Measure and print; `--json` also keeps the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.uploads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of pages beside uploads and removals")
    parser.add_argument("--per-minute", type=int, default=1000, help="uploads a minute, and as many removals")
    parser.add_argument("--pages", type=int, default=300, help="of each kind, in this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=110)
    machine = describe_at_rest(("torch", "faiss-cpu", "grpcio", "numpy"), console)
    figures = {
        **in_process(options.registry, options.pages),
        **over_grpc(options.registry, options.minutes, options.per_minute, console),
        "machine": machine,
    }
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def in_process(registry: Path, n_pages: int) -> dict[str, Any]:
    """Milliseconds of GetFeed by how many uploads there are, the kinds taking turns user by user."""
    torch.set_num_threads(1)
    known = FeedBundle.load(Registry(registry).open())
    rng, now_ms = np.random.default_rng(1), known.newest_event_ms + 60_000
    users = rng.choice(known.users.ids, n_pages + 20).tolist()
    with tempfile.TemporaryDirectory(prefix="uploads-") as scratch:
        bundles, live, before_mib = {"as loaded": known}, [], 0.0
        for uploads in (0, 1_000, MANY):
            before_mib = resident_mib()["anonymous"]
            one = LiveBundle(known, Path(scratch) / str(uploads), LiveConfig(flush=False))
            for start in range(0, uploads, 1_000):
                one.put(one.encode(Uploads(known.encoder, rng).videos(1_000, now_ms - 1, first=start)))
            bundles[f"{uploads:,} uploads"] = one.bundle
            live.append(one)
        upload_bytes = (resident_mib()["anonymous"] - before_mib) * 2**20 / MANY
        feeds = {name: Feed(bundle, NoStore()) for name, bundle in bundles.items()}
        took: dict[str, list[float]] = {name: [] for name in feeds}
        for user in users:
            for name, feed in feeds.items():
                began = time.perf_counter()
                feed.get_feed(FeedRequest(user_id=user, k=K, request_id="uploads", now_ms=now_ms))
                took[name].append(1000 * (time.perf_counter() - began))
        for one in live:
            one.close()
    median = {name: float(np.median(ms[20:])) for name, ms in took.items()}
    paired = {name: float(np.median(np.array(ms[20:]) / np.array(took["as loaded"][20:]))) for name, ms in took.items()}
    pages = [{"bundle": name, "median_ms": median[name], "ratio": paired[name]} for name in feeds]
    return {"bundle": known.version, "videos": len(known.videos), "pages": pages, "bytes_an_upload": upload_bytes}


class Uploads:
    """Random videos of a width that the bundle reads, each author's newest last."""

    def __init__(self, encoder: Encoder, rng: np.random.Generator) -> None:
        self._width, self._rng = content_width(encoder), rng

    def videos(self, n: int, upload_ts_ms: int, first: int = 0) -> list[Video]:
        """Numbers first .. first+n-1; AUTHOR_UPLOADS in a row are by one author."""
        rng = self._rng
        return [
            Video(
                video_id=VIDEO_0 + number + 1,
                author_id=AUTHOR_0 + number // AUTHOR_UPLOADS,
                upload_ts_ms=upload_ts_ms,
                duration_ms=int(rng.integers(5_000, 60_000)),
                tags=tuple(rng.integers(0, 50, 3).tolist()),
                content=None if self._width is None else rng.normal(size=self._width).astype(np.float32),
            )
            for number in range(first, first + n)
        ]


@dataclass(slots=True)
class Model:
    """What was acknowledged, and how often an answer contradicted it."""

    gone_since_s: dict[int, float] = field(default_factory=dict)
    """Removed videos, by the instant of the acknowledgement."""
    there: dict[int, set[int]] = field(default_factory=dict)
    """Uploads that were not removed, by author's number."""
    pages: int = 0
    removed_shown: int = 0
    not_found: int = 0
    short: int = 0
    not_full: int = 0

    def check(self, ids: list[int], started_s: float) -> None:
        """Count removed videos in an answer."""
        self.removed_shown += sum(self.gone_since_s.get(video_id, np.inf) < started_s for video_id in ids)


def over_grpc(registry: Path, minutes: float, per_minute: int, console: Console) -> dict[str, Any]:
    """All figures of a server of its own, killed at the end and started again."""
    bundle = Registry(registry).open()
    users = np.load(bundle.path("users/users_ids.npy"), mmap_mode="r", allow_pickle=False)
    videos = np.load(bundle.path("videos/videos_ids.npy"), mmap_mode="r", allow_pickle=False)
    eligible = np.load(bundle.path("videos/videos_eligible.npy"), mmap_mode="r", allow_pickle=False)[1:]
    rng, model = np.random.default_rng(2), Model()
    victims = rng.permutation(videos[eligible])[: max(len(videos) // 4, 1)].tolist()
    uploads = Uploads(Encoder.load(bundle.folder / "encoder"), rng)
    with tempfile.TemporaryDirectory(prefix="uploads-") as scratch:
        store = Path(scratch) / "store.sqlite"
        with server(registry, store) as (process, address), FeedClient(address, timeout_s=30) as client:
            writer = Writer(client, uploads, victims, model)
            acknowledged = {"upload": writer.singles(200), "100 uploads": writer.batches(20)}
            capacity = _pages(address, users, model, None, CAPACITY_S)
            rate = capacity["per_s"] / 2
            console.print(f"capacity {2 * rate:.0f} pages/s with {CLIENTS} clients; from here on {rate:.0f}/s")
            quiet = _pages(address, users, model, rate, 60 * minutes)
            beside = threading.Thread(target=writer.stream, args=(60 * minutes, per_minute))
            beside.start()
            loaded = _pages(address, users, model, rate, 60 * minutes)
            beside.join()
            process.kill()
            process.wait()
        began = time.perf_counter()
        with server(registry, store) as (_, address), FeedClient(address, timeout_s=30) as client:
            restart_s = time.perf_counter() - began
            lost, undone = _audit(client, model)
    acknowledged |= {"upload, beside pages": writer.upload_ms, "removal, beside pages": writer.remove_ms}
    return {
        "minutes": minutes,
        "per_minute": per_minute,
        "quiet": quiet,
        "loaded": loaded,
        "p99_ratio": loaded["p99_ms"] / quiet["p99_ms"],
        "acknowledged_ms": {name: _spread(ms) for name, ms in acknowledged.items()},
        "retrievable_ms": _spread(writer.retrievable_ms),
        "answers_checked": model.pages,
        "removed_shown": model.removed_shown,
        "uploads_not_found": model.not_found,
        "short": model.short,
        "not_full": model.not_full,
        "restart_s": restart_s,
        "lost_by_kill": lost,
        "removals_undone_by_kill": undone,
    }


class Writer:
    """Uploads and removals, each acknowledged before the next, and the searches that look for them."""

    def __init__(self, client: FeedClient, uploads: Uploads, victims: list[int], model: Model) -> None:
        self._client, self._uploads, self._victims, self._model = client, uploads, victims, model
        self._rng, self._next = np.random.default_rng(3), 0
        self.upload_ms: list[float] = []
        self.remove_ms: list[float] = []
        self.retrievable_ms: list[float] = []

    def singles(self, n: int) -> list[float]:
        """Milliseconds of n calls of one upload."""
        return [self._upload(1) for _ in range(n)]

    def batches(self, n: int) -> list[float]:
        """Milliseconds of n calls of 100."""
        return [self._upload(100) for _ in range(n)]

    def stream(self, seconds: float, per_minute: int) -> None:
        """Uploads and removals in turn, evenly spaced; each is timed from when it was due."""
        start, n = time.perf_counter(), round(seconds * per_minute / 60)
        for number in range(n):
            for half in (0.0, 0.5):
                due = start + seconds * (number + half) / n
                time.sleep(max(due - time.perf_counter(), 0))
                if half:
                    self._remove(number)
                    self.remove_ms.append(1000 * (time.perf_counter() - due))
                    continue
                self._upload(1)
                self.upload_ms.append(1000 * (time.perf_counter() - due))
                if number % PROBE_EVERY == 0:
                    self._probe(due)

    def _upload(self, n: int) -> float:
        """Milliseconds of one call; the first upload of an author gives that author a follower."""
        videos = self._uploads.videos(n, time.time_ns() // 1_000_000, first=self._next)
        began = time.perf_counter()
        self._client.upsert_videos(videos)
        took_ms = 1000 * (time.perf_counter() - began)
        for number in range(self._next, self._next + n):
            author, video_id = number // AUTHOR_UPLOADS, VIDEO_0 + number + 1
            if number % AUTHOR_UPLOADS == 0:
                self._follow(author, video_id)
            else:
                self._model.there.setdefault(author, set()).add(video_id)
        self._next += n
        return took_ms

    def _follow(self, author: int, video_id: int) -> None:
        said = {"user_id": AUDITOR_0 + author, "video_id": video_id, "ts_ms": 0, "signals": {"follow": True}}
        self._client.log_events([Event(request_id=f"audit-{author}", slot=0, **said)])

    def _remove(self, number: int) -> None:
        """In turn a video of the bundle and an upload."""
        authors = [author for author, left in self._model.there.items() if left]
        if number % 2 and authors:
            left = self._model.there[authors[int(self._rng.integers(len(authors)))]]
            video_id = left.pop()
        elif self._victims:
            video_id = self._victims.pop()
        else:
            return
        self._client.remove_videos([video_id])
        self._model.gone_since_s[video_id] = time.perf_counter()

    def _probe(self, due: float) -> None:
        """Look for the newest upload as its author's auditor, until it is there."""
        number = self._next - 1
        if number % AUTHOR_UPLOADS == 0:
            return  # the auditor has seen it
        for attempt in itertools.count():
            started = time.perf_counter()
            ids = self._client.retrieve(AUDITOR_0 + number // AUTHOR_UPLOADS, k=100).video_id_K.tolist()
            self._model.check(ids, started)
            if VIDEO_0 + number + 1 in ids:
                break
            self._model.not_found += attempt == 0
            if time.perf_counter() - due > 5:
                return
        self.retrievable_ms.append(1000 * (time.perf_counter() - due))


def _audit(client: FeedClient, model: Model) -> tuple[int, int]:
    """(acknowledged uploads that are not there, removed videos that are), author by author."""
    lost = undone = 0
    for author, left in model.there.items():
        found = set(client.retrieve(AUDITOR_0 + author, k=AUDIT_K).video_id_K.tolist())
        lost += len(left - found)
        undone += len(found & model.gone_since_s.keys())
    return lost, undone


def _pages(address: str, users: np.ndarray, model: Model, rate: float | None, seconds: float) -> dict[str, Any]:
    """GetFeed by CLIENTS clients: as fast as they go, or at instants of a Poisson process of `rate` a second."""
    took: list[float] = []
    waited: list[float] = []
    start = time.perf_counter()

    def work(number: int) -> None:
        rng, due = np.random.default_rng(number), start
        with FeedClient(address, timeout_s=30) as client:
            while True:
                due = due + rng.exponential(CLIENTS / rate) if rate else time.perf_counter()
                if due - start > seconds:
                    return
                time.sleep(max(due - time.perf_counter(), 0))
                began = time.perf_counter()
                page = client.get_feed(int(users[rng.integers(len(users))]), k=K)
                ended = time.perf_counter()
                model.check([item.video_id for item in page.items], began)
                model.pages += 1
                model.short += len(page.items) < K
                model.not_full += page.level != Level.FULL
                took.append(1000 * (ended - began))
                waited.append(1000 * (ended - due))

    clients = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wall_s = time.perf_counter() - start
    return {
        "pages": len(took),
        "per_s": len(took) / wall_s,
        **_spread(took),
        "from_due_p99_ms": _spread(waited)["p99_ms"],
    }


def _spread(ms: list[float]) -> dict[str, float]:
    values = np.array(ms or [np.nan])
    return {f"p{p}_ms": float(np.percentile(values, p)) for p in (50, 99)} | {"max_ms": float(values.max())}


def show(figures: dict[str, Any], console: Console) -> None:
    """Three small tables."""
    console.print(f"bundle {figures['bundle']} of {figures['videos']:,} videos; an upload takes "
                  f"{figures['bytes_an_upload']:,.0f} bytes of memory")  # fmt: skip
    pages = Table("GetFeed in this process", "median ms", "times as loaded (median of pairs)")
    for row in figures["pages"]:
        pages.add_row(row["bundle"], f"{row['median_ms']:.2f}", f"{row['ratio']:.3f}")
    console.print(pages)
    events = Table("acknowledged", "p50 ms", "p99 ms", "max ms")
    for name, row in {**figures["acknowledged_ms"], "upload retrievable": figures["retrievable_ms"]}.items():
        events.add_row(name, *(f"{row[part]:.1f}" for part in ("p50_ms", "p99_ms", "max_ms")))
    console.print(events)
    table = Table("pages over gRPC", "per s", "p50 ms", "p99 ms", "from due p99")
    for name, label in (("quiet", "quiet"), ("loaded", f"{figures['per_minute']:,} uploads and removals a minute")):
        row = figures[name]
        cells = (row["p50_ms"], row["p99_ms"], row["from_due_p99_ms"])
        table.add_row(f"{label} ({row['pages']:,})", f"{row['per_s']:.0f}", *(f"{cell:.1f}" for cell in cells))
    console.print(table)
    console.print(
        f"p99 of pages {figures['p99_ratio']:.2f} times the quiet one; in {figures['answers_checked']:,} pages "
        f"{figures['removed_shown']} removed videos, {figures['short']} short, {figures['not_full']} not at the full "
        f"level; {figures['uploads_not_found']} uploads not in the first Retrieve after their acknowledgement; kill -9 "
        f"lost {figures['lost_by_kill']} uploads and undid {figures['removals_undone_by_kill']} removals, "
        f"the restart took {figures['restart_s']:.1f} s"
    )
    console.print(line(figures["machine"]))


if __name__ == "__main__":
    main()
