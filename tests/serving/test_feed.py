"""The main path: the features are training's, no rule is ever broken, the ladder answers when stages cannot."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from candidate_gen.sources import Retrieved
from features.inputs import INSTANT_WIDTH, Inputs
from features.pairs import PAIR_WIDTH
from serving.bundle import FeedBundle
from serving.config import FeedConfig, FilterConfig
from serving.feed import Feed
from serving.hydrate import hydrate, model_inputs
from serving.limits import InvalidRequestError
from serving.messages import Event, FeedRequest, Level
from serving.records import NOTHING_KNOWN, Shortlist
from serving.rerank import rerank, slate_chance
from serving.store import NoStore, SqliteStore
from serving.trace import Deadline, DeadlineExpiredError, StageCosts

HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def bundle(world) -> FeedBundle:
    return world.bundle()


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(tmp_path / "events.sqlite")
    yield store
    store.close()


def event(user_id: int, video_id: int, ts_ms: int, slot: int = 0, **signals: bool) -> Event:
    return Event(
        request_id=f"{user_id}/{ts_ms}",
        slot=slot,
        user_id=user_id,
        video_id=video_id,
        ts_ms=ts_ms,
        watch_ms=1_000,
        duration_ms=4_000,
        signals=signals,
    )


def log(store: SqliteStore, *events: Event) -> None:
    store.log_events(events).result(timeout=10)


def test_inputs_built_by_serving_are_those_of_training_bit_for_bit(world):
    last_day = len(world.dataset.dates) - 1
    folder = world.stage(FeedConfig(surfaces=("main",)), counters_day=last_day)
    bundle, dataset = FeedBundle.open(folder, "parity"), world.dataset
    surfaces = world.tables["events"]["surface"].to_pylist()
    rows = np.random.default_rng(0).choice(np.flatnonzero(dataset.examples.day == last_day), 60, replace=False)
    lengths, of_pair = set(), np.zeros(2)
    for row in rows:
        user_id = int(dataset.users.ids_of(dataset.examples.user_row[[row]])[0])
        now_ms = int(dataset.examples.ts_ms[row])
        query = hydrate(bundle, NOTHING_KNOWN, user_id=user_id, now_ms=now_ms, surface=surfaces[row])
        served = model_inputs(bundle, query, dataset.examples.video_row[[row]])
        trained = dataset.inputs(np.array([row]), with_slot=False)
        lengths.add(int(trained.history_length_B[0]))
        pair = trained.candidate_dense_NC[0, -INSTANT_WIDTH - PAIR_WIDTH : -INSTANT_WIDTH]
        of_pair += [np.abs(pair).sum() > 0, trained.candidate_dense_NC[0, -1] == 1]
        for field in fields(Inputs):
            ours, theirs = getattr(served, field.name), getattr(trained, field.name)
            if isinstance(theirs, np.ndarray):
                assert ours.dtype == theirs.dtype, field.name
                assert ours.tobytes() == theirs.tobytes(), field.name
                assert ours.shape == theirs.shape, field.name
            else:
                assert ours == theirs, field.name
    assert lengths == {8}
    assert of_pair.min() > 0, "some viewer knows the author or a tag, some follows the author"


def test_live_events_stand_in_the_history_where_training_would_put_them(world, bundle, store):
    user, now_ms = int(bundle.users.ids[3]), world.now_ms
    videos = bundle.videos.ids[[10, 20, 30]].tolist()
    log(store, event(user, videos[0], now_ms - 10, like=True), event(user, videos[1], now_ms - 20, 1))
    log(store, event(user, videos[2], now_ms, 2))  # not strictly before: not seen by this request
    before = hydrate(bundle, NOTHING_KNOWN, user_id=user, now_ms=now_ms, surface="main").history
    after = hydrate(bundle, store.user(user), user_id=user, now_ms=now_ms, surface="main").history
    assert after.video_row_BL[0].tolist() == [*before.video_row_BL[0, 2:], 21, 11]
    assert after.watch_fraction_BL[0, -2:].tolist() == [0.25, 0.25]
    assert after.signals_BL[0, -1] == 1 << 2
    assert after.length_B.tolist() == [8]


def test_an_event_that_the_bundle_already_holds_counts_once(world, bundle, store):
    user_row = 5
    start, end = bundle.history.user_start[user_row : user_row + 2]
    user = int(bundle.users.ids[user_row - 1])
    last = int(bundle.history.video_row[end - 1]), int(bundle.history.ts_ms[end - 1])
    log(store, event(user, int(bundle.videos.ids[last[0] - 1]), last[1], like=True))
    before = hydrate(bundle, NOTHING_KNOWN, user_id=user, now_ms=world.now_ms, surface="main").history
    after = hydrate(bundle, store.user(user), user_id=user, now_ms=world.now_ms, surface="main").history
    assert end - start > 8
    assert after.video_row_BL.tolist() == before.video_row_BL.tolist()


@pytest.mark.parametrize("max_age_h", [None, 24.0 * 15])
def test_no_rule_is_ever_broken_over_many_random_requests(world, bundle, store, max_age_h):
    config = replace(bundle.config, filters=FilterConfig(max_age_h=max_age_h))
    feed, rng = Feed(replace(bundle, config=config), store), np.random.default_rng(3)
    videos = world.tables["videos"].to_pylist()
    by_id = {video["video_id"]: video for video in videos}
    ids, authors = np.array(list(by_id)), np.unique([video["author_id"] for video in videos])
    history, follows = world.tables["events"].to_pylist(), world.tables["follows"].to_pylist()
    full = 0
    for number in range(150):
        user = int(rng.choice([*bundle.users.ids, 77]))
        now_ms = world.now_ms - int(rng.integers(0, 3 * 24 * HOUR_MS))
        excluded = rng.choice(ids, rng.choice([0, 5, 150]), replace=False).tolist()
        blocked = rng.choice(authors, rng.choice([0, 3, 20]), replace=False).tolist()
        live = int(rng.choice(ids))
        log(store, event(user, live, now_ms - 1, slot=number))
        k = int(rng.choice([1, 10, 100]))
        response = feed.get_feed(
            FeedRequest(user_id=user, k=k, excluded_video_ids=excluded, blocked_author_ids=blocked, now_ms=now_ms)
        )
        seen = {row["video_id"] for row in history if row["user_id"] == user and row["ts_ms"] < now_ms}
        followed = {row["author_id"] for row in follows if row["user_id"] == user}
        shown = [item.video_id for item in response.items]
        assert response.level == Level.FULL
        assert len(set(shown)) == len(shown)
        assert not set(shown) & ({live} | seen | set(excluded))
        for item in response.items:
            video = by_id[item.video_id]
            assert video["eligible"]
            assert video["author_id"] == item.author_id
            assert item.author_id not in blocked
            assert item.author_id != user
            assert video["upload_ts_ms"] <= now_ms
            assert max_age_h is None or video["upload_ts_ms"] >= now_ms - max_age_h * HOUR_MS
            assert item.connected == (item.author_id in followed)
            assert not (item.sources[0] == "ann" and item.author_id in followed)
            assert 0 < item.propensity <= 1
        assert len(shown) == k or response.shortfall_reason
        full += len(shown) == k
        for stage in response.stages:
            assert stage.received - stage.kept == sum(stage.removed.values()), stage
    assert full > 50


def test_a_source_that_ignores_the_filter_loses_its_candidates(world, bundle):
    class Lying:
        name = "ann"

        def retrieve(self, query, k):
            rows = np.arange(1, 8 * len(query.allowed.bits) - 8)
            return Retrieved(rows, np.ones(len(rows), np.float32))

    feed = Feed(replace(bundle, sources=(Lying(),)), NoStore())
    user, blocked = int(bundle.users.ids[0]), np.unique(bundle.author_id[1:])[12:20]
    response = feed.get_feed(FeedRequest(user_id=user, k=100, blocked_author_ids=blocked, now_ms=world.now_ms))
    rows = bundle.videos.rows_of(np.array([item.video_id for item in response.items]))
    query = hydrate(bundle, NOTHING_KNOWN, user_id=user, now_ms=world.now_ms, surface="main")
    assert len(rows) > 10
    assert bundle.eligible[rows].all()
    assert not np.isin(rows, query.seen_rows).any()
    assert not np.isin(bundle.author_id[rows], [*blocked, *query.followed_authors, user]).any()
    removed = {stage.name: stage.removed for stage in response.stages}["retrieve"]
    assert {"ineligible", "seen", "blocked_author", "followed_in_unconnected"} <= removed.keys()


def test_nothing_left_to_show_is_an_empty_feed_with_its_reason(world, bundle):
    everybody = np.unique(bundle.author_id[1:]).tolist()
    response = Feed(bundle, NoStore()).get_feed(
        FeedRequest(user_id=1, blocked_author_ids=everybody, now_ms=world.now_ms)
    )
    assert response.items == ()
    assert response.shortfall_reason.startswith("0 candidates passed the filters")


def test_an_unknown_user_gets_a_feed_flagged_cold_until_the_first_event(world, bundle, store):
    feed, stranger = Feed(bundle, store), -5
    first = feed.get_feed(FeedRequest(user_id=stranger, now_ms=world.now_ms))
    assert (first.cold, len(first.items), first.level) == (True, 10, Level.FULL)
    log(store, event(stranger, first.items[0].video_id, world.now_ms + 1))
    second = feed.get_feed(FeedRequest(user_id=stranger, now_ms=world.now_ms + 2))
    assert not second.cold
    assert first.items[0].video_id not in [item.video_id for item in second.items]
    assert not feed.get_feed(FeedRequest(user_id=int(bundle.users.ids[0]), now_ms=world.now_ms)).cold


def test_each_item_says_how_its_value_came_about(world, bundle):
    response = Feed(bundle, NoStore()).get_feed(FeedRequest(user_id=int(bundle.users.ids[0]), now_ms=world.now_ms))
    assert response.policy_id == bundle.config.policy_id
    for slot, item in enumerate(response.items):
        assert item.slot == slot
        assert sum(item.value_terms.values()) == pytest.approx(item.value)
        assert len(item.scores) == len(response.tasks) > 0
        assert all(0 <= score <= 1 for score in item.scores)
        assert item.reason
        assert item.duration_ms >= 5_000


def test_a_request_id_fixes_the_slate_and_other_ids_explore(world, bundle):
    feed = Feed(bundle, NoStore())

    def slate(request_id: str) -> list[tuple[int, float]]:
        request = FeedRequest(user_id=int(bundle.users.ids[0]), request_id=request_id, now_ms=world.now_ms)
        return [(item.video_id, item.propensity) for item in feed.get_feed(request).items]

    assert slate("a") == slate("a")
    assert len({tuple(slate(str(number))) for number in range(5)}) > 1


def test_replay_values_are_those_of_the_online_ranker(world, bundle, store):
    feed, user = Feed(bundle, store), int(bundle.users.ids[4])
    candidates = [*bundle.videos.ids[5:25].tolist(), 12345]
    ranked = feed.rank(user, candidates, "main", world.now_ms)
    log(store, event(user, candidates[0], world.now_ms, like=True))

    def replayed(ts_ms: int) -> np.ndarray:
        asked = Shortlist("r", user, ts_ms, "main", np.array(candidates), np.zeros(0, np.int64))
        return rerank(bundle, store.user(user), asked).value_K

    assert replayed(world.now_ms).tobytes() == ranked.value_N.tobytes()
    assert ranked.unknown.tolist() == [20]
    assert replayed(world.now_ms + 1).tolist() != replayed(world.now_ms).tolist()


def test_a_slate_has_the_same_propensities_among_what_it_was_drawn_from(world, bundle):
    """The kept shortlist, of one page and of the page after it, is all that replay needs."""

    class Keeping(NoStore):
        def log_served(self, rows, shortlist=None):
            self.rows, self.shortlist = rows, shortlist

    narrow = replace(bundle.config.arrange, top_m=15, duplicate_cosine=0.99)
    kept, bundle = Keeping(), replace(bundle, config=replace(bundle.config, arrange=narrow))
    feed, token = Feed(bundle, kept), b""
    for number in range(8):
        request = FeedRequest(
            user_id=int(bundle.users.ids[number]), request_id=f"q{number}", now_ms=world.now_ms, page_token=token
        )
        page = feed.get_feed(request)
        shortlist = kept.shortlist
        pool = next(stage.received for stage in page.stages if stage.name == "arrange")
        assert 15 <= len(shortlist.video_id_K) < pool / 2, "not the whole pool"
        again = rerank(bundle, NOTHING_KNOWN, shortlist)
        order = np.array([shortlist.video_id_K.tolist().index(item.video_id) for item in page.items])
        found = [p[considered == item].sum() for item, (considered, p) in zip(order, again.along(order), strict=True)]
        assert found == pytest.approx([item.propensity for item in page.items], rel=1e-5)
        assert again.draw(10, slate_chance(f"q{number}")).order_S.tolist() == order.tolist()
        token = page.next_page_token if number % 2 == 0 else b""
    feed.get_feed(replace(request, explore=False))
    assert kept.shortlist is None, "nothing can be learnt from a page without exploration"


def test_a_score_does_not_depend_on_the_candidates_beside_it(world, bundle):
    feed, user = Feed(bundle, NoStore()), int(bundle.users.ids[4])
    candidates = bundle.videos.ids[5:25].tolist()
    together = feed.rank(user, candidates, "main", world.now_ms).value_N
    alone = [feed.rank(user, [candidate], "main", world.now_ms).value_N[0] for candidate in candidates]
    assert together == pytest.approx(alone, abs=1e-6)


class Slow:
    """A real ranker behind a delay."""

    def __init__(self, ranker, delay_s: float) -> None:
        self._ranker, self._delay_s = ranker, delay_s

    def score(self, inputs):
        time.sleep(self._delay_s)
        return self._ranker.score(inputs)


class Broken:
    """A ranker whose every probability is NaN, or that raises."""

    def __init__(self, ranker, error: Exception | None = None) -> None:
        self._ranker, self._error = ranker, error

    def score(self, inputs):
        if self._error is not None:
            raise self._error
        scores = self._ranker.score(inputs)
        return replace(scores, probability_NT=np.full_like(scores.probability_NT, np.nan))


def test_a_stage_that_cannot_end_in_time_is_skipped_and_the_answer_says_so(world, bundle):
    feed = Feed(replace(bundle, ranker=Slow(bundle.ranker, 1.0)), NoStore())
    request = FeedRequest(user_id=int(bundle.users.ids[0]), now_ms=world.now_ms)
    assert feed.get_feed(request).level == Level.FULL
    hurried = feed.get_feed(request, Deadline.after(0.9))
    assert (hurried.level, hurried.degraded_reason) == (Level.RETRIEVAL_ORDER, "no time left to rank")
    assert hurried.policy_id.endswith("/retrieval_order")
    assert len(hurried.items) == 10
    assert hurried.tasks == ()
    assert feed.get_feed(request).level == Level.FULL
    with pytest.raises(DeadlineExpiredError):
        feed.get_feed(request, Deadline.after(0.0))


@pytest.mark.parametrize("error", [None, RuntimeError("damaged weights")])
def test_a_ranker_that_fails_leaves_candidates_in_retrieval_order(world, bundle, error):
    feed = Feed(replace(bundle, ranker=Broken(bundle.ranker, error)), NoStore())
    response = feed.get_feed(FeedRequest(user_id=int(bundle.users.ids[0]), now_ms=world.now_ms))
    assert response.level == Level.RETRIEVAL_ORDER
    assert response.degraded_reason.startswith("the ranker failed")
    assert len(response.items) == 10
    assert all(np.isfinite(item.value) for item in response.items)


def test_without_retrieval_the_popular_list_answers_filtered(world, bundle):
    class NoTowers:
        def user_vectors(self, inputs):
            raise RuntimeError("no towers")

    feed = Feed(replace(bundle, towers=NoTowers()), NoStore())
    user = int(bundle.users.ids[0])
    request = FeedRequest(user_id=user, now_ms=world.now_ms)
    blocked = [item.author_id for item in feed.get_feed(request).items[:2]]
    response = feed.get_feed(replace(request, blocked_author_ids=blocked))
    assert response.level == Level.POPULAR
    assert len(response.items) == 10
    assert {item.sources for item in response.items} == {("popular",)}
    assert not {item.author_id for item in response.items} & set(blocked)


def test_a_stage_skipped_long_enough_is_tried_again():
    costs = StageCosts()
    costs.observe("rank", 800.0)
    assert costs.expected_ms("rank") == 800.0
    for _ in range(60):
        costs.skipped("rank")
    assert costs.expected_ms("rank") == pytest.approx(800.0 * 0.95**60)
    assert costs.expected_ms("rank") < 50


def test_the_slate_is_logged_as_it_was_answered(world, bundle):
    class Keeping(NoStore):
        def log_served(self, rows, shortlist=None):
            self.rows = rows

    kept = Keeping()
    response = Feed(bundle, kept).get_feed(
        FeedRequest(user_id=9, request_id="q", surface="search", now_ms=world.now_ms)
    )
    assert [(r.request_id, r.slot, r.video_id, r.propensity, r.source, r.surface) for r in kept.rows] == [
        ("q", i.slot, i.video_id, i.propensity, i.sources[0], "search") for i in response.items
    ]
    assert {(r.user_id, r.ts_ms, r.bundle_version, r.policy_id) for r in kept.rows} == {
        (9, world.now_ms, "v1", response.policy_id)
    }


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (FeedRequest(user_id=1, k=0), "k: 0 is outside 1 .. 100"),
        (FeedRequest(user_id=1, k=10_000), "k: 10000 is outside 1 .. 100"),
        (FeedRequest(user_id=1, surface="x"), "surface: 'x' is not known to this bundle; it knows 'main', 'search'"),
        (FeedRequest(user_id=1, now_ms=-1), "now_ms: -1 is outside"),
        (FeedRequest(user_id=1, request_id="x" * 129), "request_id: 129 characters, allowed are 128"),
        (FeedRequest(user_id=1, request_id="a\nb"), "request_id: holds characters that cannot be printed"),
        (FeedRequest(user_id=1, excluded_video_ids=range(10_001)), "excluded_video_ids: 10001 entries"),
    ],
)
def test_a_bad_request_names_field_and_limit(bundle, request_, message):
    with pytest.raises(InvalidRequestError) as caught:
        Feed(bundle, NoStore()).get_feed(request_)
    assert str(caught.value).startswith(message)


def test_a_feed_config_survives_json_and_its_policy_id_changes_with_any_field():
    config = FeedConfig(surfaces=("a", "b"), filters=FilterConfig(max_age_h=3.5))
    assert FeedConfig.from_json(config.to_json()) == config
    assert replace(config, filters=FilterConfig()).policy_id != config.policy_id
    with pytest.raises(ValueError, match=r"feed\.json: filters: unknown fields \['age'\]"):
        FeedConfig.from_json('{"filters": {"age": 1}}')


def test_a_feed_gives_no_chance_to_what_its_rules_forbid(world, bundle):
    """What another feed showed may be a second video of one author, which this one never shows."""
    strict = replace(bundle, config=replace(bundle.config, arrange=replace(bundle.config.arrange, author_cap=1)))
    author, rows = next((a, np.flatnonzero(bundle.author_id == a)) for a in bundle.author_id[1:])
    assert len(rows) > 1
    asked = bundle.videos.ids_of(np.concatenate([rows, np.flatnonzero(bundle.author_id != author)[1:30]]))
    logged = Shortlist("r", int(bundle.users.ids[0]), world.now_ms, "main", asked, np.zeros(0, np.int64))
    chances = []
    for feed in (bundle, strict):
        ranked = rerank(feed, NOTHING_KNOWN, logged)
        slots = zip((0, 1), ranked.along(np.array([0, 1])), strict=True)
        chances.append([float(p[considered == item].sum()) for item, (considered, p) in slots])
    assert min(chances[0]) > 0
    assert chances[1] == [pytest.approx(chances[0][0], rel=1e-9), 0.0]
