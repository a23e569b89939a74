"""Uploads and removals over gRPC: clear refusals, shown from the acknowledgement on, kept through crashes and swaps."""

from __future__ import annotations

import queue
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from candidate_gen.live import LiveConfig
from features.artifacts import Registry
from features.eligibility import Viewer
from features.schema import VIDEOS
from serving.client import FeedClient
from serving.golden import record
from serving.messages import Event, Level, RemoveOutcome, UpsertOutcome, Video
from serving.protos.reelrank.v1 import feed_pb2, feed_pb2_grpc
from serving.swap import KEPT_MS

sys.path.insert(0, str(Path(__file__).parent))
from servers import CONFIG, refused, running, subprocess_server

NEW_0, EVERYTHING = 2**57, 2_000
STRANGER = -5


@pytest.fixture
def server(world, tmp_path) -> Iterator:
    with running(world.registry, tmp_path / "events.sqlite") as server:
        yield server


@pytest.fixture
def client(server) -> Iterator[FeedClient]:
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        yield client


def videos(world, first: int, n: int, seed: int = 0, **fields) -> list[Video]:
    rng = np.random.default_rng([seed, first % 1000])
    return [
        Video(
            video_id=first + i,
            author_id=2**59 + int(rng.integers(10, 33)),
            upload_ts_ms=int(world.now_ms - rng.integers(1, 10**9)),
            duration_ms=int(rng.integers(5_000, 60_000)),
            tags=tuple(rng.integers(0, 9, 2).tolist()),
            content=rng.normal(size=4).astype(np.float32),
            columns={"music_id": str(2**60 + i), "video_type": "a"},
            **fields,
        )
        for i in range(n)
    ]


def there(client: FeedClient, world) -> set[int]:
    """Every video that a stranger may be shown."""
    response = client.retrieve(STRANGER, k=EVERYTHING, now_ms=world.now_ms)
    assert response.level == Level.FULL
    return set(response.video_id_K.tolist())


def test_an_acknowledged_upload_is_in_the_next_request_and_an_acknowledged_removal_is_not(world, client):
    before = there(client, world)
    new = videos(world, NEW_0, 5)
    assert client.upsert_videos(new) == UpsertOutcome(5, 0)
    assert there(client, world) == before | {video.video_id for video in new}
    assert client.rank(STRANGER, [NEW_0, 3], now_ms=world.now_ms).unknown.tolist() == [1]
    gone = [NEW_0 + 1, *sorted(before)[:3]]
    assert client.remove_videos([*gone, 3, gone[0]]) == RemoveOutcome(4, 1)
    assert there(client, world) == (before | {video.video_id for video in new}) - set(gone)
    assert client.upsert_videos([replace(new[0], eligible=False), new[1]]) == UpsertOutcome(0, 2)
    assert there(client, world) == (before | {v.video_id for v in new[1:]}) - set(gone[1:])
    page = client.get_feed(STRANGER, k=100, now_ms=world.now_ms)
    assert not {item.video_id for item in page.items} & {NEW_0, *gone[1:]}


@pytest.mark.parametrize(
    ("fields", "details"),
    [
        ({"content": np.zeros(3, np.float32)}, "content: 3 numbers, this bundle reads 4"),
        ({"content": np.array([0, np.nan, 0, 0], np.float32)}, "content: holds numbers that are not finite"),
        ({"duration_ms": -1}, "duration_ms: -1 is outside 0 .. 253402300799000"),
        ({"video_id": 0}, "video_id: 0 names no video"),
        ({"video_id": -(2**63)}, "video_id: -9223372036854775808 names no video"),
        ({"tags": tuple(range(1_001))}, "tags: 1001 entries, allowed are 0 .. 1000"),
        ({"min_age": 131}, "min_age: 131 is outside 0 .. 130"),
        ({"safety_level": -1}, "safety_level: -1 is outside 0 .. 9"),
        ({"regions": ("DE", " ")}, "regions[1]: empty; leave it out where there is no limit"),
        ({"language": "x" * 36}, "language: 36 characters, allowed are 35"),
        (
            {"available_from_ms": 7, "available_until_ms": 7},
            "available_until_ms: 7 is not after available_from_ms, 7",
        ),
        (
            {"columns": {"colour": "red"}},
            "columns: 'colour' is no column of a video; there are music_id, upload_type, video_type",
        ),
        ({"columns": {"music_id": "C sharp"}}, "columns[music_id]: 'C sharp' is not an integer"),
        (
            {"columns": {"music_id": str(2**63)}},
            f"columns[music_id]: {2**63} is outside {-(2**63)} .. {2**63 - 1}",
        ),
    ],
)
def test_a_bad_upload_is_refused_by_its_field_path_and_nothing_of_its_list_is_kept(world, client, fields, details):
    listed = videos(world, NEW_0, 4)
    listed[3] = replace(listed[3], **fields)
    assert refused(client.upsert_videos, listed) == (grpc.StatusCode.INVALID_ARGUMENT, f"videos[3].{details}")
    assert client.rank(STRANGER, [NEW_0], now_ms=world.now_ms).unknown.tolist() == [0]


def test_uploads_of_tomorrow_and_lists_too_long_or_empty_are_refused(world, server, client):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    ahead_ms = server.live.feed.now_ms() + 86_400_000
    code, details = refused(client.upsert_videos, [replace(videos(world, NEW_0, 1)[0], upload_ts_ms=ahead_ms)])
    assert code == invalid
    assert details.startswith(f"videos[0].upload_ts_ms: {ahead_ms} is outside 0 .. ")
    too_many = [Video(video_id=1)] * 1_001
    assert refused(client.upsert_videos, too_many) == (invalid, "videos: 1001 entries, allowed are 1 .. 1000")
    assert refused(client.upsert_videos, [])[0] == invalid
    assert refused(client.remove_videos, [])[0] == invalid
    assert refused(client.remove_videos, [1, 0]) == (invalid, "video_ids[1]: 0 names no video")
    assert refused(client.remove_videos, [1] * 10_001) == (invalid, "video_ids: 10001 entries, allowed are 1 .. 10000")


def test_a_thousand_uploads_in_one_call_and_a_compaction_lose_nothing(world, tmp_path):
    config = replace(CONFIG, live=LiveConfig(compact_at=300, flush=False))
    with (
        running(world.registry, tmp_path / "s.sqlite", config) as server,
        FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client,
    ):
        before = there(client, world)
        assert client.upsert_videos(videos(world, NEW_0, 1_000)) == UpsertOutcome(1_000, 0)
        assert client.remove_videos(range(NEW_0, NEW_0 + 100)) == RemoveOutcome(100, 0)
        assert there(client, world) == before | set(range(NEW_0 + 100, NEW_0 + 1_000))
    assert not (tmp_path / "s.sqlite.index" / "v1").exists(), "the index of the uploads goes with its server"


def test_acknowledged_uploads_and_removals_survive_kill_9(world, tmp_path):
    """Killed the instant after an acknowledgement, again and again on one store; and restarted into what was said."""
    store, said, removed = tmp_path / "events.sqlite", {}, set()
    of_bundle = world.dataset.videos.ids[np.asarray(world.dataset.eligible)[1:]].tolist()
    before = set(of_bundle)
    for kill_after in ("upload", "removal"):
        with (
            subprocess_server(world.registry, store) as (process, address),
            FeedClient(address, timeout_s=30) as client,
        ):
            assert there(client, world) == (before | said.keys()) - removed
            for step in range(4):
                first = NEW_0 + 10 * len(said)
                new = videos(world, first, 3, seed=step)
                gone = [first, of_bundle.pop()]
                client.upsert_videos(new)
                if kill_after == "upload" and step == 3:
                    gone = []
                    process.send_signal(signal.SIGKILL)
                else:
                    client.remove_videos(gone)
                    if step == 3:
                        process.send_signal(signal.SIGKILL)
                said |= {video.video_id: video for video in new}
                removed |= set(gone)
            process.wait(timeout=20)
    with running(world.registry, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        assert there(client, world) == (before | said.keys()) - removed
        page = client.get_feed(STRANGER, k=100, now_ms=world.now_ms)
        shown = [item for item in page.items if item.video_id in said]
        assert shown
        for item in shown:
            video = said[item.video_id]
            assert (item.author_id, item.duration_ms) == (video.author_id, video.duration_ms)


def test_nothing_is_acknowledged_or_shown_before_it_is_on_disk(world, client, tmp_path):
    """Another connection holds the database: the calls wait, and nobody sees what may yet be lost."""
    some = min(there(client, world))
    with ThreadPoolExecutor(1) as pool, sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None) as database:
        for call, argument, shown in (
            (client.upsert_videos, videos(world, NEW_0, 2), {some, NEW_0, NEW_0 + 1}),
            (client.remove_videos, [some], {NEW_0, NEW_0 + 1}),
        ):
            before = there(client, world)
            database.execute("BEGIN IMMEDIATE")
            calling = pool.submit(call, argument)
            with pytest.raises(TimeoutError):
                calling.result(timeout=0.7)
            assert there(client, world) == before
            database.execute("ROLLBACK")
            calling.result(timeout=30)
            assert there(client, world) & {some, NEW_0, NEW_0 + 1} == shown


def test_uploads_that_pile_up_are_refused_and_leave_room_for_pages(world, server, client, tmp_path):
    request = feed_pb2.UpsertVideosRequest(videos=[feed_pb2.Video(video_id=NEW_0)])
    with (
        sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None) as database,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        database.execute("BEGIN IMMEDIATE")
        stub = feed_pb2_grpc.FeedServiceStub(channel)
        ended: queue.Queue[grpc.Future] = queue.Queue()
        for _ in range(CONFIG.max_in_flight):
            stub.UpsertVideos.future(request, timeout=60).add_done_callback(ended.put)
        refusals = [ended.get(timeout=30) for _ in range(CONFIG.max_in_flight - CONFIG.max_changes_waiting)]
        assert {call.code() for call in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert "overload: 16 uploads and removals are waiting" in refusals[0].details()
        assert len(client.get_feed(STRANGER, now_ms=world.now_ms).items) == 10
        database.execute("ROLLBACK")
        taken = {ended.get(timeout=60).code() for _ in range(CONFIG.max_changes_waiting)}
        assert taken <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, "the latter after some seconds of waiting"
        assert client.upsert_videos([Video(video_id=NEW_0 + 1)]) == UpsertOutcome(1, 0)


def test_whom_an_upload_may_be_shown_to_is_kept_through_a_restart_and_a_swap(world, tmp_path):
    registry, store = Registry(shutil.copytree(world.registry, tmp_path / "registry")), tmp_path / "s.sqlite"
    said = {
        NEW_0: {"min_age": 18},
        NEW_0 + 1: {"regions": ("DE", "fr")},
        NEW_0 + 2: {"language": "pt-BR", "safety_level": 2},
        NEW_0 + 3: {"available_from_ms": world.now_ms - 5, "available_until_ms": world.now_ms + 5},
        NEW_0 + 4: {"available_until_ms": world.now_ms},
    }
    seen_by = (
        (Viewer(), {NEW_0 + 3}),
        (Viewer(age_years=18), {NEW_0, NEW_0 + 3}),
        (Viewer(region="FR", max_safety_level=2), {NEW_0 + 1, NEW_0 + 2, NEW_0 + 3}),
        (Viewer(languages=("pt",), max_safety_level=3), {NEW_0 + 2, NEW_0 + 3}),
        (Viewer(languages=("en",), max_safety_level=3), {NEW_0 + 3}),
    )
    for start in range(2):
        with running(registry.root, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            if start == 0:
                client.upsert_videos([replace(videos(world, i, 1)[0], **limits) for i, limits in said.items()])
            for version in ("v1", "v2"):
                for viewer, expected in seen_by:
                    response = client.retrieve(STRANGER, k=EVERYTHING, viewer=viewer, now_ms=world.now_ms)
                    assert set(response.video_id_K.tolist()) & said.keys() == expected, (start, version, viewer)
                    page = client.get_feed(STRANGER, k=100, viewer=viewer, now_ms=world.now_ms)
                    assert {item.video_id for item in page.items} & said.keys() <= expected
                registry.set_live("v2" if version == "v1" else "v1")
                assert server.live.poll()


def test_a_swap_keeps_what_came_before_it_and_what_comes_while_it_loads(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    of_bundle = world.dataset.videos.ids[np.asarray(world.dataset.eligible)[1:]].tolist()
    with running(registry.root, tmp_path / "s.sqlite") as server, ThreadPoolExecutor(1) as pool:
        address, stop, steps = f"127.0.0.1:{server.port}", threading.Event(), []
        with FeedClient(address, timeout_s=30) as client:
            before = there(client, world)

            def write() -> None:
                while not stop.is_set():
                    step = len(steps)
                    client.upsert_videos(videos(world, NEW_0 + 10 * step, 2, seed=step))
                    client.remove_videos([NEW_0 + 10 * step, of_bundle[step % 200]])
                    steps.append(step)

            writing = pool.submit(write)
            for version in ("v2", "v1", "v2"):
                registry.set_live(version)
                assert server.live.poll()
                assert client.get_feed(STRANGER, now_ms=world.now_ms).bundle_version == version
                assert sorted(path.name for path in (tmp_path / "s.sqlite.index").iterdir()) == [version]
            stop.set()
            writing.result(timeout=30)
            removed = {of_bundle[step % 200] for step in steps}
            uploaded = {NEW_0 + 10 * step + 1 for step in steps}
            assert there(client, world) == (before | uploaded) - removed
            assert len(steps) > 5


def test_what_comes_between_a_load_and_its_swap_is_caught_up_with(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    with running(registry.root, tmp_path / "s.sqlite") as server, FeedClient(f"127.0.0.1:{server.port}") as client:
        client.upsert_videos(videos(world, NEW_0, 3), timeout_s=30)
        fresh = server.live._load("v2")
        client.upsert_videos(videos(world, NEW_0 + 5, 3), timeout_s=30)
        client.remove_videos([NEW_0, NEW_0 + 5], timeout_s=30)
        server.live._swap(fresh).close()
        assert client.get_feed(STRANGER, now_ms=world.now_ms, timeout_s=30).bundle_version == "v2"
        found = there(client, world)
        assert {i for i in found if NEW_0 <= i < NEW_0 + 10} == {NEW_0 + 1, NEW_0 + 2, NEW_0 + 6, NEW_0 + 7}


def publish_later(registry: Registry, version: str, newest_ms: int) -> None:
    """A published version whose logs reach up to an instant, and whose catalogue is v1's."""
    staged = registry.stage()
    shutil.copytree(registry.open("v1").folder, staged, dirs_exist_ok=True)
    for name in ("manifest.json", "manifest.sha256", "golden.json"):
        (staged / name).unlink()
    path = staged / "history" / "history_ts_ms.npy"
    ts_ms = np.load(path)
    ts_ms[np.argmax(ts_ms)] = newest_ms
    np.save(path, ts_ms)
    record(staged, n=2)
    registry.publish(staged, version=version, meta={})


def test_what_a_newer_bundle_was_made_with_is_passed_over_and_forgotten_only_when_old(world, tmp_path):
    """Two videos of the bundle said to be of another author, one removed, one new: then versions made of later logs."""
    registry, store = Registry(shutil.copytree(world.registry, tmp_path / "registry")), tmp_path / "s.sqlite"
    of_bundle = world.dataset.videos.ids[np.asarray(world.dataset.eligible)[1:]].tolist()
    changed, gone, author = of_bundle[0], of_bundle[1], 2**59 + 777

    def kept() -> list[int]:
        with sqlite3.connect(store) as database:
            return [row[0] for row in database.execute("SELECT video_id FROM uploads ORDER BY video_id")]

    def owner(client: FeedClient) -> bool:
        response = client.retrieve(STRANGER, k=EVERYTHING, now_ms=world.now_ms, blocked_author_ids=[author])
        return changed not in response.video_id_K.tolist()

    with running(registry.root, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        said = replace(videos(world, NEW_0, 1)[0], video_id=changed, author_id=author)
        client.upsert_videos([said, *videos(world, NEW_0, 1)])
        client.remove_videos([gone])
        now_ms = server.live.feed.now_ms()
        publish_later(registry, "v3", now_ms + 1)
        publish_later(registry, "v4", now_ms + 1)
        registry.set_live("v3")
        assert server.live.poll()
        assert not owner(client), "v3 was made of logs that reach beyond the upload: it knows better"
        assert NEW_0 in there(client, world), "it does not know this one"
        assert gone not in there(client, world), "only an upload undoes a removal"
        registry.set_live("v1")
        assert server.live.poll()
        assert owner(client), "back to a version that was made before"
        assert kept() == sorted([changed, gone, NEW_0])

    with sqlite3.connect(store) as database:
        database.execute("UPDATE uploads SET acknowledged_ms = acknowledged_ms - ?", (KEPT_MS + 60_000,))
    with running(registry.root, store) as server, FeedClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        for version, left in (("v3", {gone, NEW_0, changed}), ("v4", {gone, NEW_0})):
            registry.set_live(version)
            assert server.live.poll()
            assert set(kept()) == left
        assert there(client, world) & {changed, gone, NEW_0} == {changed, NEW_0}


def test_a_version_that_is_refused_loses_no_upload(world, tmp_path):
    registry = Registry(shutil.copytree(world.registry, tmp_path / "registry"))
    with running(registry.root, tmp_path / "s.sqlite") as server, FeedClient(f"127.0.0.1:{server.port}") as client:
        client.upsert_videos(videos(world, NEW_0, 3), timeout_s=30)
        damaged = registry.root / "bundles" / "v2" / "ranker" / "ranker.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        (registry.root / "LIVE").write_text("v2\n")
        assert not server.live.poll()
        client.upsert_videos(videos(world, NEW_0 + 5, 3), timeout_s=30)
        assert {*range(NEW_0, NEW_0 + 3), *range(NEW_0 + 5, NEW_0 + 8)} <= there(client, world)


def test_events_on_uploads_carry_author_and_length_and_are_seen(world, client, tmp_path):
    new = videos(world, NEW_0, 2)
    client.upsert_videos(new)
    event = Event(request_id="q", slot=0, user_id=STRANGER, video_id=NEW_0, ts_ms=world.now_ms - 1, watch_ms=100)
    client.log_events([replace(event, signals={"follow": True})])
    assert NEW_0 not in there(client, world)
    with sqlite3.connect(tmp_path / "events.sqlite") as database:
        logged = database.execute("SELECT author_id, duration_ms FROM events").fetchall()
    assert logged == [(new[0].author_id, new[0].duration_ms)]
    client.upsert_videos([replace(new[1], author_id=new[0].author_id)])
    response = client.retrieve(STRANGER, k=EVERYTHING, now_ms=world.now_ms)
    at = response.video_id_K.tolist().index(NEW_0 + 1)
    assert response.connected_K[at]
    assert response.sources[response.source_K[at]] == "followed"


def test_many_clients_search_while_others_upload_and_remove(world, server):
    """Never a removed id after its acknowledgement, and always as many videos as were asked for."""
    address, stop, removed, asked = f"127.0.0.1:{server.port}", threading.Event(), set(), [0, 0]
    users = world.dataset.users.ids.tolist()

    def ask(number: int) -> None:
        with FeedClient(address, timeout_s=30) as client:
            while not stop.is_set():
                before = set(removed)
                page = client.get_feed(users[asked[number] % len(users)], now_ms=world.now_ms)
                assert not before & {item.video_id for item in page.items}
                assert (len(page.items), page.level) == (10, Level.FULL)
                asked[number] += 1

    def write(writer: int) -> None:
        mine = world.dataset.videos.ids[writer::2].tolist()
        with FeedClient(address, timeout_s=30) as client:
            step = 0
            while not stop.is_set():
                step += 1
                first = NEW_0 + 10_000 * writer + 10 * step
                client.upsert_videos(videos(world, first, 4, seed=step))
                gone = [first, mine[step % 60]]
                client.remove_videos(gone)
                removed.update(gone)
                assert NEW_0 + 10_000 * writer + 10 * step + 1 in there(client, world)
                if min(asked) >= 25 and step >= 8:
                    stop.set()

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(ask, number) for number in range(2)] + [pool.submit(write, w) for w in range(2)]
        for one in working:
            one.add_done_callback(lambda done: stop.set() if done.exception() else None)
        for one in working:
            one.result(timeout=120)
    assert len(removed) > 15


def test_the_command_line_uploads_a_file_counts_what_it_leaves_out_and_removes(world, client, server, tmp_path):
    """Rows of another catalogue, one of them broken: the rest is served, and the exit code says that not all is."""
    rows = world.tables["videos"].to_pylist()
    rows = [{**row, "video_id": NEW_0 + i, "eligible": True} for i, row in enumerate(rows)]
    rows[8] |= {"regions": ["DE"], "min_age": 12}
    rows[7]["duration_ms"] = -1
    path, address = tmp_path / "videos.parquet", f"127.0.0.1:{server.port}"
    pq.write_table(pa.Table.from_pylist(rows, VIDEOS), path)

    def reelrank(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pipelines.cli", *arguments, "--address", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    sent = reelrank("upload", str(path))
    assert sent.returncode == 2, sent.stderr
    assert sent.stdout == "299 new videos, 0 known ones replaced, 1 left out\n"
    assert "left out: 1 rows, duration_ms" in sent.stderr
    wanted = {row["video_id"] for i, row in enumerate(rows) if i != 7}
    assert wanted - there(client, world) == {NEW_0 + 8}
    german = client.retrieve(STRANGER, k=EVERYTHING, viewer=Viewer(region="de", age_years=12), now_ms=world.now_ms)
    assert NEW_0 + 8 in german.video_id_K.tolist()
    assert client.rank(STRANGER, [NEW_0 + 7], now_ms=world.now_ms).unknown.tolist() == [0]

    gone = reelrank("remove", str(NEW_0), str(NEW_0 + 1), "3")
    assert (gone.returncode, gone.stdout) == (0, "2 videos removed, 1 not known (and kept out from now on)\n")
    assert there(client, world) & {NEW_0, NEW_0 + 1} == set()

    pq.write_table(pa.Table.from_pylist([{**rows[0], "content": [1.0]}], VIDEOS), path)
    refused_file = reelrank("upload", str(path))
    assert refused_file.returncode == 2
    assert "videos[0].content: 1 numbers, this bundle reads 4" in refused_file.stderr
    assert "Traceback" not in refused_file.stderr
