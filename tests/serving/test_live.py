"""Uploads and removals in process: every channel and rule answers as if the catalogue had always been as it is now."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from candidate_gen.blend import BlendConfig, Quota
from candidate_gen.live import LiveConfig
from features.inputs import age_features
from features.schema import LIMITS, VIDEOS
from serving.bundle import FeedBundle
from serving.config import FeedConfig, FilterConfig
from serving.feed import Feed
from serving.hydrate import hydrate, model_inputs
from serving.live import LiveBundle
from serving.messages import CandidatesResponse, Event, FeedRequest, Level, RemoveOutcome, UpsertOutcome, Video
from serving.store import NOTHING_KNOWN, NoStore, SqliteStore

sys.path.insert(0, str(Path(__file__).parents[1] / "features"))
from video_limits import HOUR_MS, may_be_shown, random_limits, random_viewer

DAY_MS = 86_400_000
NEW_0 = 2**57
EVERYTHING, STRANGER = 2_000, -5


@pytest.fixture
def live(world, tmp_path) -> Iterator[LiveBundle]:
    live = LiveBundle(world.bundle(), tmp_path / "index", LiveConfig(compact_at=60, flush=False))
    yield live
    live.close()


def a_video(rng: np.random.Generator, video_id: int, now_ms: int, **fields) -> Video:
    said = {
        "author_id": int(rng.choice([2**60 + rng.integers(10), 2**59 + rng.integers(10, 33)])),
        "upload_ts_ms": int(now_ms - rng.integers(0, 20 * DAY_MS)),
        "duration_ms": int(rng.integers(5_000, 60_000)),
        "tags": tuple(rng.integers(0, 9, rng.integers(0, 5)).tolist()),
        "content": rng.normal(size=4).astype(np.float32),
    }
    return Video(video_id=video_id, **{**said, **fields})


def upsert(live: LiveBundle, *videos: Video) -> UpsertOutcome:
    return live.put(live.encode(videos))


def only(bundle: FeedBundle, source: str, **config) -> FeedBundle:
    """The same bundle with one source; the popular one must have a quota."""
    quotas = {source: Quota(source=source, share=1.0)}
    quotas.setdefault("popular", Quota(source="popular", share=0.0, at_most=0))
    blend = BlendConfig(quotas=tuple(quotas.values()))
    sources = tuple(s for s in bundle.sources if s.name == source)
    return replace(bundle, sources=sources, config=replace(bundle.config, blend=blend, **config))


def with_limits(world, share: float):
    """The world with limits of so many of its videos."""
    videos = world.tables["videos"]
    if share:
        limits = random_limits(np.random.default_rng(4), len(videos), world.now_ms, open_share=1 - share)
        for name, column in limits.items():
            videos = videos.append_column(name, column)
    return replace(world, tables={**world.tables, "videos": videos})


class Truth:
    """What a plain dictionary says may be shown."""

    def __init__(self, world) -> None:
        nothing = dict.fromkeys(field.name for field in LIMITS)
        self.videos = {row["video_id"]: {**nothing, **row} for row in world.tables["videos"].to_pylist()}
        self.events, self.follows = (world.tables[name].to_pylist() for name in ("events", "follows"))

    def upsert(self, video: Video) -> None:
        self.videos[video.video_id] = {
            name: getattr(video, name)
            for name in ("video_id", "author_id", "upload_ts_ms", "eligible", *(field.name for field in LIMITS))
        }

    def followed(self, user: int) -> set[int]:
        return {row["author_id"] for row in self.follows if row["user_id"] == user}

    def allowed(self, request: FeedRequest, max_age_h: float | None) -> dict[int, dict]:
        user, now_ms = request.user_id, request.now_ms
        seen = {row["video_id"] for row in self.events if row["user_id"] == user and row["ts_ms"] < now_ms}
        out = {}
        for video_id, video in self.videos.items():
            uploaded = video["upload_ts_ms"]
            if not video["eligible"] or video_id in seen or video_id in request.excluded_video_ids:
                continue
            if video["author_id"] in (user, *request.blocked_author_ids):
                continue
            if not may_be_shown(video, request.viewer, now_ms):
                continue
            if uploaded is not None and (
                uploaded > now_ms or (max_age_h is not None and uploaded < now_ms - max_age_h * HOUR_MS)
            ):
                continue
            out[video_id] = video
        return out


def found(bundle: FeedBundle, request: FeedRequest) -> CandidatesResponse:
    response = Feed(bundle, NoStore()).retrieve(request)
    assert response.level == Level.FULL, response.degraded_reason
    return response


@pytest.mark.parametrize(("max_age_h", "limited"), [(None, 0.0), (24.0 * 9, 0.4), (None, 0.7)])
def test_after_any_uploads_and_removals_exactly_what_may_be_shown_is_found(world, tmp_path, max_age_h, limited):
    """`limited`: how much of whom and when is said of videos, by the bundle and by uploads."""
    world = with_limits(world, limited)
    config = FeedConfig(surfaces=("main", "search"), filters=FilterConfig(max_age_h=max_age_h))
    known = FeedBundle.open(world.stage(config), "limited")
    live = LiveBundle(known, tmp_path / "index", LiveConfig(compact_at=60, flush=False))
    truth, rng = Truth(world), np.random.default_rng()
    of_bundle, newest = list(truth.videos), NEW_0
    for _ in range(40):
        ids = [*rng.choice(of_bundle, rng.integers(0, 8)).tolist(), *range(newest, newest + rng.integers(0, 8))]
        if newest > NEW_0:
            ids += rng.integers(NEW_0, newest, rng.integers(0, 4)).tolist()
        newest = max([newest, *(i + 1 for i in ids if NEW_0 <= i < NEW_0 + 10_000)])
        soon = {"upload_ts_ms": world.now_ms + HOUR_MS}
        videos = [
            a_video(rng, i, world.now_ms, eligible=bool(rng.random() < 0.8), **(soon if rng.random() < 0.1 else {}))
            if rng.random() < 0.9
            else a_video(rng, i, world.now_ms, upload_ts_ms=None)
            for i in ids
        ]
        limits = pa.table(random_limits(rng, len(ids), world.now_ms, open_share=1 - limited)).to_pylist()
        videos = [
            replace(video, **{**row, "regions": tuple(row["regions"] or ())})
            for video, row in zip(videos, limits, strict=True)
        ]
        there = {v.video_id for v in videos} & set(live.bundle.videos.ids_of(np.arange(1, len(live.bundle.videos) + 1)))
        if videos:
            assert upsert(live, *videos) == UpsertOutcome(len({*ids} - there), len(there))
        for video in videos:
            truth.upsert(video)
        gone = rng.choice([*truth.videos], rng.integers(0, 8), replace=False).tolist()
        assert live.remove([*gone, NEW_0 - 1]) == RemoveOutcome(len(gone), 1)
        for video_id in gone:
            truth.videos[video_id]["eligible"] = False

        authors = [2**59 + a for a in range(10, 33)]
        request = FeedRequest(
            user_id=int(rng.choice([*known.users.ids, 77])),
            k=EVERYTHING,
            now_ms=world.now_ms + int(rng.integers(-3 * DAY_MS, 2 * HOUR_MS)),
            excluded_video_ids=rng.choice([*truth.videos], rng.choice([0, 30]), replace=False).tolist(),
            blocked_author_ids=rng.choice(authors, rng.choice([0, 3]), replace=False).tolist(),
            viewer=random_viewer(rng),
        )
        allowed, followed = truth.allowed(request, max_age_h), truth.followed(request.user_id)
        response = found(live.bundle, request)
        assert sorted(response.video_id_K.tolist()) == sorted(allowed)
        stages = {stage.name: stage for stage in response.stages}
        assert stages["filter"].received == len(truth.videos)
        assert stages["filter"].kept == stages["retrieve"].received == stages["retrieve"].kept == len(allowed)
        for video_id, connected in zip(response.video_id_K.tolist(), response.connected_K.tolist(), strict=True):
            assert connected == (allowed[video_id]["author_id"] in followed)

        few, dated = replace(request, k=9), {i: v for i, v in allowed.items() if v["upload_ts_ms"] is not None}
        fresh = found(only(live.bundle, "fresh"), few).video_id_K.tolist()
        newest_first = sorted((video["upload_ts_ms"] for video in dated.values()), reverse=True)
        assert [dated[i]["upload_ts_ms"] for i in fresh] == newest_first[:9]
        times = [v["upload_ts_ms"] or -1 for v in allowed.values() if v["author_id"] in followed]
        connected = found(only(live.bundle, "followed"), few).video_id_K.tolist()
        assert [allowed[i]["upload_ts_ms"] or -1 for i in connected] == sorted(times, reverse=True)[:9]
        assert {allowed[i]["author_id"] for i in connected} <= followed
        nearest = found(only(live.bundle, "ann"), few)
        others = np.array([i for i, v in allowed.items() if v["author_id"] not in followed])
        query = hydrate(live.bundle, NOTHING_KNOWN, user_id=few.user_id, now_ms=few.now_ms, surface="main")
        user_D = live.bundle.towers.user_vectors(model_inputs(live.bundle, query, np.zeros(0, np.int64)))[0]
        scores = live.bundle.vectors[live.bundle.videos.rows_of(others)] @ user_D
        assert nearest.score_K == pytest.approx(np.sort(scores)[::-1][:9], abs=1e-5)
        assert set(nearest.video_id_K.tolist()) <= set(others.tolist())
    assert live.bundle.catalogue is not None
    live.close()


def test_an_upload_is_encoded_and_embedded_as_the_bundle_encodes_and_embeds_its_own(world, live):
    """The bundle's own videos under new ids: the same rows but for the id, the same age and no counters."""
    known, rng = live.known, np.random.default_rng(1)
    table = world.tables["videos"].take(rng.choice(300, 50, replace=False)).to_pylist()
    videos = [
        Video(
            video_id=NEW_0 + i,
            content=np.array(row["content"], np.float32),
            tags=tuple(row["tags"]),
            columns={"music_id": str(row["music_id"]), "video_type": row["video_type"]},
            **{name: row[name] for name in ("author_id", "upload_ts_ms", "duration_ms", "eligible")},
        )
        for i, row in enumerate(table)
    ]
    assert upsert(live, *videos) == UpsertOutcome(50, 0)
    bundle, ids = live.bundle, np.array([video.video_id for video in videos])
    rows = bundle.videos.rows_of(ids)
    assert rows.tolist() == list(range(301, 351))
    renamed = pa.Table.from_pylist([{**row, "video_id": NEW_0 + i} for i, row in enumerate(table)], VIDEOS)
    expected = known.encoder.videos(renamed)
    assert bundle.videos.sparse[rows].tobytes() == expected.sparse[1:].tobytes()
    assert bundle.videos.dense[rows].tobytes() == expected.dense[1:].tobytes()
    unknown = np.repeat(known.video_counters[[0]], 50, axis=0)
    assert bundle.video_counters[rows].tobytes() == unknown.tobytes()
    age = age_features(np.array(known.newest_event_ms + 1), np.array([row["upload_ts_ms"] for row in table]))
    at_instant = np.concatenate([unknown, age], axis=1)
    vectors = known.towers.video_vectors(expected, np.arange(1, 51), at_instant)
    assert bundle.vectors[rows] == pytest.approx(vectors, abs=2e-3)
    for name in ("author_id", "upload_ts_ms", "duration_ms", "eligible"):
        assert getattr(bundle, name)[rows].tolist() == [row[name] for row in table]


def test_saying_again_what_the_bundle_knows_changes_no_answer(world, live):
    """Half of the catalogue uploaded as it is: pages and scores stay, but for the precision of stored vectors."""
    before = {user: found(live.known, FeedRequest(user_id=user, k=EVERYTHING, now_ms=world.now_ms)) for user in (1, 5)}
    ranked = Feed(live.known, NoStore()).rank(1, live.known.videos.ids.tolist(), now_ms=world.now_ms)
    videos = [
        Video(**{**row, "content": np.array(row["content"], np.float32), "tags": tuple(row["tags"]), "columns": {}})
        for row in world.tables["videos"].drop(["music_id", "video_type", "upload_type"]).to_pylist()[::2]
    ]
    assert upsert(live, *videos) == UpsertOutcome(0, 150)
    for user, was in before.items():
        now = found(live.bundle, FeedRequest(user_id=user, k=EVERYTHING, now_ms=world.now_ms))
        assert sorted(now.video_id_K.tolist()) == sorted(was.video_id_K.tolist())
    again = Feed(live.bundle, NoStore()).rank(1, live.known.videos.ids.tolist(), now_ms=world.now_ms)
    assert again.value_N.tobytes() == ranked.value_N.tobytes()


def test_new_videos_stand_in_histories_as_training_would_have_put_them(world, live, tmp_path):
    rng, user = np.random.default_rng(2), int(live.known.users.ids[4])
    upsert(live, *(a_video(rng, NEW_0 + i, world.now_ms) for i in range(12)))
    store = SqliteStore(tmp_path / "events.sqlite")
    feed = Feed(live.bundle, store)
    events = [
        Event(request_id="q", slot=i, user_id=user, video_id=NEW_0 + i, ts_ms=world.now_ms + i, watch_ms=900,
              signals={"like": True})
        for i in range(12)
    ]  # fmt: skip
    completed = feed.complete(events)
    assert [event.duration_ms for event in completed] == live.bundle.duration_ms[np.arange(301, 313)].tolist()
    store.log_events(completed).result(timeout=10)
    query = hydrate(live.bundle, store.user(user), user_id=user, now_ms=world.now_ms + 60, surface="main")
    assert query.history.video_row_BL[0].tolist() == list(range(305, 313))
    inputs = model_inputs(live.bundle, query, np.array([3, 302, 0]))
    in_order = inputs.video_sparse_UW[inputs.history_BL[0]]
    assert in_order.tobytes() == live.bundle.videos.sparse[np.arange(305, 313)].tobytes()
    live.remove([NEW_0 + 11])
    after = hydrate(live.bundle, store.user(user), user_id=user, now_ms=world.now_ms + 60, surface="main")
    for field in fields(query.history):
        assert np.array_equal(getattr(after.history, field.name), getattr(query.history, field.name)), field.name
    page = feed.get_feed(FeedRequest(user_id=user, k=100, now_ms=world.now_ms + 60))
    assert page.level == Level.FULL
    assert not {item.video_id for item in page.items} & {event.video_id for event in events}
    store.close()


def test_a_page_of_uploads_names_author_and_length_and_is_ranked_by_id_alike(world, live):
    rng = np.random.default_rng(3)
    videos = {NEW_0 + i: a_video(rng, NEW_0 + i, world.now_ms) for i in range(40)}
    live.remove(live.known.videos.ids.tolist())
    upsert(live, *videos.values())
    feed = Feed(live.bundle, NoStore())
    page = feed.get_feed(FeedRequest(user_id=STRANGER, now_ms=world.now_ms))
    assert len(page.items) == 10
    ranked = feed.rank(STRANGER, [item.video_id for item in page.items], now_ms=world.now_ms)
    assert ranked.unknown.tolist() == []
    for item, value in zip(page.items, ranked.value_N.tolist(), strict=True):
        assert (item.author_id, item.duration_ms) == (
            videos[item.video_id].author_id,
            videos[item.video_id].duration_ms,
        )
        assert item.value == pytest.approx(value, abs=1e-6)


def test_hidden_by_one_upload_shown_by_the_next_and_removed_ids_come_back_when_uploaded(world, live):
    rng = np.random.default_rng(4)
    for video_id in (int(live.known.videos.ids[7]), NEW_0):

        def is_there(video_id: int = video_id) -> bool:
            request = FeedRequest(user_id=STRANGER, k=EVERYTHING, now_ms=world.now_ms)
            return video_id in found(live.bundle, request).video_id_K.tolist()

        for shown in (True, False, True):
            upsert(live, a_video(rng, video_id, world.now_ms, eligible=shown))
            assert is_there() == shown
        live.remove([video_id])
        assert not is_there()
        live.remove([video_id])
        upsert(live, a_video(rng, video_id, world.now_ms))
        assert is_there()


def test_an_upload_overrules_the_time_that_the_bundle_gives(world, live):
    """A video that the bundle says comes a minute after the request was there yesterday, says its upload."""
    upload_ts_ms, rng = np.asarray(live.known.upload_ts_ms), np.random.default_rng(5)
    tried = 0
    for row in np.flatnonzero(live.known.eligible & (upload_ts_ms % 600_000 > 120_000)):
        video_id, now_ms = int(live.known.videos.ids_of(np.array([row]))[0]), int(upload_ts_ms[row]) - 60_000
        request = FeedRequest(user_id=STRANGER, k=EVERYTHING, now_ms=now_ms)
        assert video_id not in found(live.bundle, request).video_id_K.tolist()
        upsert(live, a_video(rng, video_id, now_ms))
        for source in ("ann", "fresh"):
            assert video_id in found(only(live.bundle, source), request).video_id_K.tolist(), source
        upsert(live, a_video(rng, video_id, now_ms, upload_ts_ms=now_ms + 1))
        assert video_id not in found(live.bundle, request).video_id_K.tolist()
        tried += 1
        if tried == 10:
            break
    assert tried == 10


def test_the_newest_are_not_crowded_out_by_what_the_bundle_thought_new(world, live):
    """Uploads say that the bundle's newest videos are its oldest: the channel's few places go to the next."""
    upload_ts_ms = np.asarray(live.known.upload_ts_ms)
    order = np.flatnonzero(live.known.eligible)
    order = live.known.videos.ids_of(order[np.argsort(-upload_ts_ms[order])]).tolist()
    rng = np.random.default_rng(6)
    upsert(live, *(a_video(rng, video_id, world.now_ms, upload_ts_ms=1) for video_id in order[:30]))
    request = FeedRequest(user_id=STRANGER, k=20, now_ms=world.now_ms)
    assert found(only(live.bundle, "fresh"), request).video_id_K.tolist() == order[30:50]


def test_a_video_without_anything_but_its_id_is_found_and_ranked(world, live):
    upsert(live, Video(video_id=NEW_0))
    feed = Feed(live.bundle, NoStore())
    pool = feed.retrieve(FeedRequest(user_id=STRANGER, k=EVERYTHING, now_ms=world.now_ms))
    assert NEW_0 in pool.video_id_K.tolist()
    assert np.isfinite(feed.rank(STRANGER, [NEW_0], now_ms=world.now_ms).value_N).all()


def test_searches_beside_a_writer_never_show_what_was_removed_and_never_come_up_short(world, tmp_path):
    """Readers note what was acknowledged as removed before they began; the writer removes for good."""
    live = LiveBundle(world.bundle(), tmp_path / "index", LiveConfig(compact_at=40, flush=False))
    feed, stop = Feed(live.bundle, NoStore()), threading.Event()
    going: set[int] = set()
    removed: set[int] = set()
    wrong, asked = [], [0, 0]

    def ask(number: int) -> None:
        rng = np.random.default_rng(number)
        users = live.known.users.ids.tolist()
        while not stop.is_set():
            before = set(removed)
            request = FeedRequest(user_id=int(rng.choice(users)), k=40, now_ms=world.now_ms)
            pool, page = feed.retrieve(request), feed.get_feed(replace(request, k=10))
            shown = [*pool.video_id_K.tolist(), *(item.video_id for item in page.items)]
            wrong.extend(before & set(shown))
            if (pool.level, page.level) != (Level.FULL, Level.FULL) or len(page.items) < 10:
                wrong.append((pool.degraded_reason, page.degraded_reason, len(page.items)))
            went_meanwhile = len(going - before)
            if len(set(pool.video_id_K.tolist())) != len(pool.video_id_K):
                wrong.append(("twice", pool.video_id_K))
            if len(pool.video_id_K) + went_meanwhile < 40:
                wrong.append((len(pool.video_id_K), went_meanwhile))
            asked[number] += 1

    readers = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    rng, there, newest = np.random.default_rng(9), live.known.videos.ids.tolist(), NEW_0
    while min(asked) < 40:
        upsert(live, *(a_video(rng, i, world.now_ms) for i in range(newest, newest + 5)))
        there, newest = [*there, *range(newest, newest + 5)], newest + 5
        upsert(live, *(a_video(rng, i, world.now_ms) for i in rng.choice(there, 3, replace=False).tolist()))
        gone = [there.pop(int(rng.integers(len(there)))) for _ in range(5)]
        going.update(gone)
        live.remove(gone)
        removed.update(gone)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(removed) > 20
    live.close()


def test_an_index_folder_of_an_earlier_start_is_not_trusted(world, tmp_path):
    folder: Path = tmp_path / "index"
    first = LiveBundle(world.bundle(), folder, LiveConfig(flush=False))
    upsert(first, Video(video_id=NEW_0))
    first._index.compact()
    (folder / "state.json").write_text("damaged")
    second = LiveBundle(world.bundle(), folder, LiveConfig(flush=False))
    assert second.bundle.videos.rows_of(np.array([NEW_0])).tolist() == [0]
    assert found(second.bundle, FeedRequest(user_id=STRANGER, now_ms=world.now_ms)).video_id_K.size
    second.close()
    assert not folder.exists()
