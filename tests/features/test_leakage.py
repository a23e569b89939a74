"""Nothing that happens at or after an instant changes what is known at it: of any user, for any input of any model.

The property is put to a log of 1,000 users: everything at or after t is deleted (events, follows, and with them the
days, known authors and rates that they made), all is built again, and each user asks at t for some videos. N questions.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset import Dataset
from features.examples import Examples
from features.history import UNDATED_TS_MS
from features.inputs import Inputs
from features.schema import FOLLOWS, SIGNALS

sys.path.insert(0, str(Path(__file__).parent))
from feature_world import DAY_MS, SPEC, START_MS, tables

USERS, EVENTS, DAYS = 1000, 12_000, 5
TRAIN_DAYS = 1
"""The encoder is fitted on the first day, which every instant lies after, as every served request does."""
Log = dict[str, pa.Table]


@pytest.fixture(scope="module", params=["follows in a table", "follows as events report them"])
def log(request) -> Log:
    rng = np.random.default_rng(11)
    found = tables(11, users=USERS, videos=300, events=EVENTS, days=DAYS)
    user, video = (found["events"][name].to_numpy()[:900] for name in ("user_id", "video_id"))
    found["undated"] = pa.table(
        {"user_id": user, "video_id": video, "position": pa.array(np.arange(900), pa.int32())}
        | {signal: pa.array(rng.integers(0, 2, 900), pa.int8()) for signal in SIGNALS}
    )
    # Times on the hour, as the events have them: many follows are at the very instant that is asked about.
    times = START_MS + rng.integers(-24, DAYS * 24, 4 * USERS) * 3_600_000
    if request.param == "follows in a table":
        found["follows"] = pa.table(
            {
                "user_id": rng.choice(found["users"]["user_id"].to_numpy(), 4 * USERS),
                "author_id": rng.integers(0, 9, 4 * USERS),
                "ts_ms": pa.array(times, mask=rng.random(4 * USERS) < 0.2),
            },
            schema=FOLLOWS,
        )
    return found


@pytest.fixture(scope="module")
def everything(log: Log) -> Dataset:
    return build(log)


def build(log: Log) -> Dataset:
    dates = sorted(set(log["events"]["date"].to_pylist()))
    return Dataset.build(
        SPEC,
        users=log["users"],
        videos=log["videos"],
        events=log["events"],
        undated=log["undated"],
        follows=log.get("follows"),
        train_dates=tuple(dates[:TRAIN_DAYS]),
    )


def before(log: Log, t_ms: int) -> Log:
    """What was there before the instant; a follow without a time was there before the log."""
    kept = {"events": log["events"].filter(pa.array(log["events"]["ts_ms"].to_numpy() < t_ms))}
    if "follows" in log:
        since_ms = log["follows"]["ts_ms"].fill_null(UNDATED_TS_MS).to_numpy()
        kept["follows"] = log["follows"].filter(pa.array(since_ms < t_ms))
    return log | kept


def asked(data: Dataset, t_ms: int, videos_a_user: int = 2) -> Inputs:
    """Every user at the instant, with some videos each: what the ranker reads, of which the towers read a part."""
    user_row = np.repeat(np.arange(1, USERS + 1), videos_a_user)
    video_row = np.random.default_rng(t_ms % 2**32).integers(1, len(data.videos) + 1, len(user_row))
    ts_ms, zeros = np.full(len(user_row), t_ms), np.zeros(len(user_row), np.int64)
    day = np.full(len(user_row), (t_ms - START_MS) // DAY_MS)
    nothing = np.zeros(len(user_row), np.float32)
    return data.inputs_of(
        Examples(
            user_row=user_row,
            video_row=video_row,
            ts_ms=ts_ms,
            day=day,
            history_end=data.history.ends_at(user_row, ts_ms),
            surface=zeros,
            slot=zeros,
            signals=np.zeros((len(user_row), len(SIGNALS)), np.float32),
            watch_ms=nothing,
            duration_ms=nothing,
            followed=data.follows.at(user_row, data.author_id[video_row], ts_ms),
        )
    )


def differences(a: Inputs, b: Inputs) -> list[str]:
    """Names of the inputs that are not equal to the bit."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in Inputs.__slots__}
    arrays = {name: both for name, both in pairs.items() if isinstance(both[0], np.ndarray)}
    assert {"history_BL", "user_dense_BD", "candidate_dense_NC", "history_gap_BL"} <= set(arrays)
    return [name for name, (x, y) in arrays.items() if x.dtype != y.dtype or x.tobytes() != y.tobytes()]


def leaks(log: Log, everything: Dataset, t_ms: int) -> list[str]:
    """Inputs that differ without what is at or after the instant: asked then, and stored with what came before."""
    past = build(before(log, t_ms))
    assert past.dates == everything.dates[: len(past.dates)]
    at_the_instant = differences(asked(everything, t_ms), asked(past, t_ms))
    rows = np.flatnonzero(everything.examples.ts_ms < t_ms)
    assert len(rows) == len(past.examples)
    sample = np.random.default_rng(t_ms % 2**32).choice(rows, min(len(rows), 1000), replace=False)
    return at_the_instant + differences(everything.inputs(sample), past.inputs(sample))


HOURS = range(TRAIN_DAYS * 24 + 1, DAYS * 24)


@pytest.mark.parametrize("hour", [25, 48, 71, 100])
def test_deleting_all_that_is_at_or_after_an_instant_changes_no_input_of_a_thousand_users(
    log: Log, everything: Dataset, hour: int
) -> None:
    assert leaks(log, everything, START_MS + hour * 3_600_000) == []


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hour=st.sampled_from(HOURS), offset_ms=st.sampled_from([-1, 0, 1, 1_799_999]))
def test_at_any_instant(log: Log, everything: Dataset, hour: int, offset_ms: int) -> None:
    assert leaks(log, everything, START_MS + hour * 3_600_000 + offset_ms) == []


@pytest.mark.parametrize("leak", ["history", "follows", "counters"])
def test_one_event_too_many_would_be_noticed(log: Log, everything: Dataset, leak: str) -> None:
    """The check finds what it looks for: each input is made to see the instant itself, or its day."""
    t_ms = START_MS + 60 * 3_600_000
    honest, knows = asked(everything, t_ms), everything
    if leak == "history":
        late = replace(everything.history, ts_ms=everything.history.ts_ms - 1)
        knows = replace(everything, history=late)
    elif leak == "follows":
        known = np.where(everything.follows.since_ms == UNDATED_TS_MS, UNDATED_TS_MS, everything.follows.since_ms - 1)
        knows = replace(everything, follows=replace(everything.follows, since_ms=known))
    else:
        views = everything.counters
        moved = type(views)(views.user_day[1:], views.video_day[1:])
        knows = replace(everything, counters=moved)
    assert differences(asked(knows, t_ms), honest) != []
