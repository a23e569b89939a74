"""What adapters promise: a wrong file is named at once, a bad row keeps its line and reason, every row is somewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from features.schema import TABLES
from features.validate import SchemaError, validate
from pipelines.adapters import Adapter, Chunk
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.adapters.kuairand import LOG_COLUMNS, USER_COUNTS, USER_LABELS, VIDEO_COLUMNS, KuaiRandAdapter
from pipelines.adapters.mapping import MappingAdapter
from pipelines.adapters.reading import read_csv

REAL = Path(__file__).parents[3] / "shared" / "data" / "kuairand-pure"
LOG = "log_standard_4_22_to_5_08_pure.csv"
ROW = {
    **dict.fromkeys(LOG_COLUMNS, "0"),
    "user_id": "7",
    "video_id": "11",
    "date": "20220425",
    "time_ms": "1650812741436",
    "play_time_ms": "61802",
    "duration_ms": "49866",
    "is_click": "1",
    "tab": "1",
}


def write_kuairand(folder: Path, *rows: dict | str, columns: tuple[str, ...] = LOG_COLUMNS, log: str = LOG) -> Path:
    """A KuaiRand folder with the given log rows (changes to ROW, or a raw line), one video and one user."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else ",".join({**ROW, **row}[name] for name in columns) for row in rows]
    (folder / log).write_text("\n".join([",".join(columns), *lines, ""]))
    values = ("11", "501", "NORMAL", "2022-04-10", "Web", "0.0", "49866.0", "91", '"39,2"')
    video = dict(zip(VIDEO_COLUMNS, values, strict=True))
    (folder / "video_features_basic_pure.csv").write_text(",".join(video) + "\n" + ",".join(video.values()) + "\n")
    users = {"user_id": "7", **dict.fromkeys(USER_COUNTS, "3"), **dict.fromkeys(USER_LABELS, "1.0"), "onehot_feat4": ""}
    (folder / "user_features_pure.csv").write_text(",".join(users) + "\n" + ",".join(users.values()) + "\n")
    return folder


def read_all(adapter: Adapter, table: str) -> list[Chunk]:
    return [chunk for file in adapter.files(table) for chunk in adapter.read(table, file)]


def test_a_kuairand_impression_becomes_a_canonical_event(tmp_path: Path) -> None:
    adapter = KuaiRandAdapter(write_kuairand(tmp_path, {}, {"is_rand": "1", "duration_ms": "0", "is_forward": "1"}))
    [chunk] = read_all(adapter, "events")
    first, photo = chunk.rows.to_pylist()
    assert first["request_id"] == "log_standard_4_22_to_5_08_pure:2"
    assert (first["user_id"], first["video_id"], first["author_id"]) == (7, 11, 501)
    assert (first["ts_ms"], first["date"], first["surface"]) == (1650812741436, "2022-04-25", "tab1")
    assert (first["watch_ms"], first["duration_ms"], first["click"], first["share"]) == (61802, 49866, 1, 0)
    assert (first["policy_id"], photo["policy_id"], photo["source"]) == ("standard", "random", "random")
    assert (photo["duration_ms"], photo["share"]) == (None, 1)
    [videos], [users] = read_all(adapter, "videos"), read_all(adapter, "users")
    assert videos.rows.to_pylist()[0]["tags"] == [39, 2]
    assert videos.rows.to_pylist()[0]["upload_ts_ms"] == 1649520000000  # 2022-04-10 00:00 in UTC+8
    assert users.rows.to_pylist()[0]["onehot_feat0"] == "1"
    assert users.rows.to_pylist()[0]["onehot_feat4"] is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("7,11,20220425,1650", f"the line has 4 fields, its header {len(LOG_COLUMNS)}"),
        ({"play_time_ms": "NaN"}, "play_time_ms is not a whole number"),
        ({"time_ms": "soon"}, "time_ms is not a whole number"),
        ({"user_id": "9223372036854775808"}, "user_id is not a whole number"),
        ({"date": "2022"}, "date is not a day like 20220425"),
        ({"is_rand": "2"}, "is_rand is not 0 or 1"),
        ({"user_id": "7\ufffd"}, "user_id is not a whole number"),
    ],
)
def test_a_raw_row_that_cannot_be_read_is_reported_with_line_text_and_reason(tmp_path: Path, row, reason: str) -> None:
    adapter = KuaiRandAdapter(write_kuairand(tmp_path, {}, row, {"user_id": "8"}))
    chunks = read_all(adapter, "events")
    assert [user for chunk in chunks for user in chunk.rows["user_id"].to_pylist()] == [7, 8]
    assert [line for chunk in chunks for line in chunk.lines.tolist()] == [2, 4]
    [malformed] = [row for chunk in chunks for row in chunk.malformed.to_pylist()]
    assert (malformed["line"], malformed["reason"]) == (3, reason)
    assert (row if isinstance(row, str) else next(iter(row.values()))) in malformed["raw"]


def test_values_that_can_be_read_but_not_believed_are_left_to_the_validator(tmp_path: Path) -> None:
    adapter = KuaiRandAdapter(write_kuairand(tmp_path, {"play_time_ms": "-5"}, {"user_id": ""}, {"is_like": "3"}, {}))
    [chunk] = read_all(adapter, "events")
    split = validate("events", chunk.rows.drop_columns(["date"]))
    assert split.counts == {"watch_ms is negative": 1, "user_id is null": 1, "like is not 0, 1 or null": 1}
    assert chunk.lines[~split.kept].tolist() == [2, 3, 4]


def test_bytes_that_are_not_text_cost_their_row_only(tmp_path: Path) -> None:
    folder = write_kuairand(tmp_path, {}, {"surface": "x"}, {"user_id": "8"})
    raw = (folder / LOG).read_bytes().split(b"\n")
    raw[2] = b"\xff" + raw[2][1:]
    (folder / LOG).write_bytes(b"\n".join(raw))
    [chunk] = read_all(KuaiRandAdapter(folder), "events")
    assert chunk.rows["user_id"].to_pylist() == [7, 8]
    assert [(row["line"], row["reason"]) for row in chunk.malformed.to_pylist()] == [(3, "the line is not UTF-8 text")]


@pytest.mark.parametrize("column", LOG_COLUMNS)
def test_a_log_without_a_needed_column_is_refused_by_name(tmp_path: Path, column: str) -> None:
    write_kuairand(tmp_path, {}, columns=tuple(name for name in LOG_COLUMNS if name != column))
    with pytest.raises(SchemaError, match=f"{LOG}: missing column {column} .found: .*check that the file"):
        KuaiRandAdapter(tmp_path)


def test_an_empty_file_and_an_empty_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"no log_\*\.csv there for events"):
        KuaiRandAdapter(tmp_path)
    write_kuairand(tmp_path, {})
    (tmp_path / LOG).write_text("")
    with pytest.raises(SchemaError, match=f"{LOG}: the file is empty"):
        KuaiRandAdapter(tmp_path)


def test_the_complete_download_is_read_with_all_its_logs_and_without_the_undated(tmp_path: Path) -> None:
    data = write_kuairand(tmp_path / "data", {})
    undated = {"user_id": [7], "video_id": [11], "seq_pos": [1], "long_view": [1], "is_like": [0]}
    (tmp_path / "reconstructed").mkdir()
    pq.write_table(pa.table(undated), tmp_path / "reconstructed" / "train_impressions_last50.parquet")
    partial = KuaiRandAdapter(tmp_path)
    assert partial.tables() == ["users", "videos", "events", "undated"]
    [chunk] = read_all(partial, "undated")
    assert chunk.rows.to_pylist() == [{"user_id": 7, "video_id": 11, "position": 1, "long_view": 1, "like": 0}]
    write_kuairand(data, {}, log="log_standard_4_08_to_4_21_pure.csv")
    write_kuairand(data, {"is_rand": "1"}, log="log_random_4_22_to_5_08_pure.csv")
    complete = KuaiRandAdapter(tmp_path)
    assert complete.tables() == ["users", "videos", "events"]
    rows = pa.concat_tables([chunk.rows for chunk in read_all(complete, "events")])
    assert rows["policy_id"].to_pylist() == ["random", "standard", "standard"]
    assert len(set(rows["request_id"].to_pylist())) == 3


def test_clicks_of_undated_impressions_are_known_up_to_the_last_one_on_the_list(tmp_path: Path) -> None:
    write_kuairand(tmp_path / "data", {})
    # User 7: clicks on 11 and 13, so what lies at or before position 3 is known; user 8 is not on the list.
    user, video, position = [7, 7, 7, 7, 8], [11, 12, 13, 14, 11], [1, 2, 3, 4, 1]
    undated = {"user_id": user, "video_id": video, "seq_pos": position, "long_view": [0] * 5, "is_like": [0] * 5}
    folder = tmp_path / "reconstructed"
    folder.mkdir()
    pq.write_table(pa.table(undated), folder / "train_impressions_last50.parquet")
    clicked = pa.table(
        {"user_id": pa.array([7, 7, 7, 9], pa.int32()), "video_id": pa.array([13, 11, 99, 11], pa.int32())}
    )
    pq.write_table(clicked, folder / "standard_clicks_0408_0421.parquet")
    [chunk] = read_all(KuaiRandAdapter(tmp_path), "undated")
    assert chunk.rows["click"].to_pylist() == [1, 0, 1, None, None]
    assert chunk.rows["video_id"].to_pylist() == video, "the order of the file"


def test_lines_are_counted_right_across_blocks_blank_lines_and_bad_lines(tmp_path: Path, monkeypatch) -> None:
    lines = [f"{n},{n}" if n % 7 else ("" if n % 2 else f"{n}") for n in range(2, 400)]
    file = tmp_path / "x.csv"
    file.write_text("\n".join(["a,b", *lines, ""]))
    monkeypatch.setattr("pipelines.adapters.reading.CSV_BLOCK_BYTES", 64)
    rows: dict[int, int] = {}
    bad: list[int] = []
    for raw in read_csv(file, ["a", "b"]):
        chunk = raw.chunk({"a": raw.whole("a")})
        rows |= dict(zip(chunk.lines.tolist(), chunk.rows["a"].to_pylist(), strict=True))
        bad += chunk.malformed["line"].to_pylist()
    assert rows == {n: n for n in range(2, 400) if n % 7}
    assert bad == [n for n in range(2, 400) if n % 14 == 0]


def test_a_canonical_folder_comes_back_as_it_is(tmp_path: Path) -> None:
    day = tmp_path / "events" / "date=2026-01-31"
    day.mkdir(parents=True)
    events = pa.table({"request_id": ["r"], "user_id": [1], "video_id": [2], "ts_ms": [1769817600000], "oracle": [0.5]})
    pq.write_table(events, day / "part-0.parquet")
    pq.write_table(pa.table({"user_id": [1], "country": ["de"]}), tmp_path / "users.parquet")
    adapter = CanonicalAdapter(tmp_path)
    assert adapter.tables() == ["events", "users"]
    [chunk] = read_all(adapter, "events")
    assert chunk.rows.to_pylist() == [{**events.drop_columns(["oracle"]).to_pylist()[0], "date": "2026-01-31"}]
    assert read_all(adapter, "users")[0].rows.to_pylist() == [{"user_id": 1, "country": "de"}]
    with pytest.raises(SchemaError, match="point at a folder in the canonical layout"):
        CanonicalAdapter(day)


MAPPING = """
[events]
files = "log.parquet"
[events.columns]
user_id = { column = "u", hash = true }
video_id = "v"
ts_ms = { column = "t" , unit = "s" }
watch_ms = { column = "w", unit = "s" }
long_view = { column = "w", unit = "s", at_least = 18000 }
like = "liked"
click = { value = 1 }
propensity = "p"
"""


def test_a_mapping_converts_units_thresholds_ids_and_constants(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MAPPING)
    log = {
        "u": ["ann", "bob", None, "dan", "eve"],
        "v": [1, 2**62, 3, 4, 5],
        "t": [1_700_000_000.25] * 5,
        "w": [18.0, 17.9, None, float("nan"), 1.0],
        "liked": ["yes", "0", None, "1", "perhaps"],
        "p": [0.5, 1.0, None, 0.1, float("nan")],
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    [chunk] = read_all(MappingAdapter(tmp_path / "m.toml"), "events")
    rows = chunk.rows.to_pylist()
    signed = int(np.uint64(xxhash.xxh64_intdigest(b"ann", seed=0)).astype(np.int64))
    assert [row["user_id"] for row in rows][0::2] == [signed, None]
    assert [row["video_id"] for row in rows] == [1, 2**62, 3]
    assert [row["ts_ms"] for row in rows] == [1_700_000_000_250] * 3
    assert [row["watch_ms"] for row in rows] == [18000, 17900, None]
    assert [row["long_view"] for row in rows] == [1, 0, None]
    assert [row["like"] for row in rows] == [1, 0, None]
    assert [row["click"] for row in rows] == [1, 1, 1]
    assert [(row["line"], row["reason"]) for row in chunk.malformed.to_pylist()] == [
        (4, "w is not finite"),
        (5, "liked is neither yes nor no"),
    ]


LIMITS_MAPPING = """
[videos]
files = "FILE"
[videos.columns]
video_id = "v"
eligible = { value = true }
regions = { column = "where", split = "|" }
language = "tongue"
min_age = "fsk"
safety_level = { value = 2 }
available_until_ms = { column = "ends", unit = "iso" }
"""


def test_a_mapping_reads_the_limits_of_videos_from_text_and_from_lists(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("v,where,tongue,fsk,ends\n1,DE | fr,pt-BR,18,2026-01-31T08:00:00Z\n2,,,,\n")
    listed = {"v": [1, 2], "where": [["DE", "fr"], None], "tongue": ["pt-BR", None], "fsk": [18, None]}
    ends = pa.array([1_769_846_400_000, None], pa.timestamp("ms"))
    pq.write_table(pa.table({**listed, "ends": ends}), tmp_path / "clips.parquet")
    for file in ("clips.csv", "clips.parquet"):
        (tmp_path / "m.toml").write_text(LIMITS_MAPPING.replace("FILE", file))
        [chunk] = read_all(MappingAdapter(tmp_path / "m.toml"), "videos")
        good = validate("videos", chunk.rows).good
        assert good.select(["regions", "language", "min_age", "safety_level", "available_until_ms"]).to_pylist() == [
            {
                "regions": ["DE", "fr"],
                "language": "pt-BR",
                "min_age": 18,
                "safety_level": 2,
                "available_until_ms": 1_769_846_400_000,
            },
            {"regions": None, "language": None, "min_age": None, "safety_level": 2, "available_until_ms": None},
        ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[events]", "[impressions]", r"\[impressions\] is not a table"),
        ('video_id = "v"', "", "must map video_id"),
        ('video_id = "v"', 'video_id = "w2"', r"log\.parquet: missing column w2"),
        ('video_id = "v"', 'video = "v"', "maps video, unknown to the table"),
        ("log.parquet", "nothing*.csv", "matches 0 files"),
        ("log.parquet", "../*.xlsx", "matches 0 files"),
        ('unit = "s"', 'unit = "min"', "has unit 'min'"),
        ("value = 1", 'value = 1, column = "v"', "give a column's name"),
        ("value = 1", "values = 1", "give a column's name"),
        ("files =", "file =", "has unknown"),
        ("[events]", "[events", "not a readable TOML file"),
    ],
)
def test_a_mistake_in_the_mapping_is_named_with_its_place(tmp_path: Path, old: str, new: str, words: str) -> None:
    pq.write_table(pa.table({name: [1] for name in ("u", "v", "t", "w", "liked", "p")}), tmp_path / "log.parquet")
    (tmp_path / "m.toml").write_text(MAPPING)
    assert MappingAdapter(tmp_path / "m.toml").tables() == ["events"]
    (tmp_path / "m.toml").write_text(MAPPING.replace(old, new))
    with pytest.raises(SchemaError, match=words):
        MappingAdapter(tmp_path / "m.toml")


@pytest.mark.skipif(not REAL.exists(), reason=f"the real KuaiRand-Pure files are not at {REAL}")
def test_every_row_of_the_real_log_is_read_and_good() -> None:
    adapter = KuaiRandAdapter(REAL)
    expected = {"users": 27285, "videos": 7583, "events": 171671, "undated": 817187}
    assert adapter.tables() == list(expected)
    for table, rows in expected.items():
        [file] = adapter.files(table)
        lines = sum(1 for _ in file.open("rb")) - 1 if file.suffix == ".csv" else pq.read_metadata(file).num_rows
        chunks = list(adapter.read(table, file))
        assert sum(len(chunk.rows) + len(chunk.malformed) for chunk in chunks) == rows == lines
        known = [name for name in chunks[0].rows.column_names if table == "users" or name in TABLES[table].names]
        assert {reason for chunk in chunks for reason in validate(table, chunk.rows.select(known)).counts} == set()
    photos = pl.DataFrame(pa.concat_tables([chunk.rows for chunk in read_all(adapter, "events")]))["duration_ms"]
    assert photos.null_count() == 2646
