"""What ingest promises: in = kept + quarantined, the same input gives the same bytes, a bad source replaces nothing."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.validate import SchemaError
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.adapters.mapping import MappingAdapter
from pipelines.cluster import ClusterConfig, cluster
from pipelines.ingest import IngestError, Progress, ingest, load_events, load_table

DOC = Path(__file__).parents[2] / "docs" / "bring-your-own-logs.md"
DAY_MS = 24 * 3600 * 1000
DAY_ONE_TS_MS = 1769817600000  # 2026-01-31 00:00 UTC
DAYS = ("2026-01-31", "2026-02-01")


@pytest.fixture(scope="module", autouse=True)
def ray_session():
    with cluster(ClusterConfig(cpus=2, object_store_mib=128)):
        yield


def write_source(root: Path, *, broken: int = 0) -> CanonicalAdapter:
    """Two days of 100 events in two files a day (one repeated row a day, `broken` negative watch times), 3 users."""
    for index, day in enumerate(DAYS):
        folder = root / "events" / f"date={day}"
        folder.mkdir(parents=True)
        rows = list(range(100))
        rows[50] = 49
        table = pa.table(
            {
                "request_id": [f"{day}-{place}" for place in range(100)],
                "user_id": [row % 3 for row in rows],
                "video_id": [2**40 + row for row in rows],
                "ts_ms": [DAY_ONE_TS_MS + index * DAY_MS + 1000 * (100 - row) for row in rows],
                "watch_ms": [-1 if place < broken else row for place, row in enumerate(rows)],
            }
        )
        for part in range(2):
            pq.write_table(table.slice(part * 60, 60), folder / f"{part}.parquet")
    pq.write_table(pa.table({"user_id": [0, 1, 2], "country": ["de", "fr", None]}), root / "users.parquet")
    return CanonicalAdapter(root)


def files_of(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def loaded(dataset: Path, name: str) -> pa.Table:
    table = load_table(dataset, name)
    assert table is not None
    return table


def test_every_row_is_kept_or_set_aside_in_input_order_and_bytes_repeat(tmp_path: Path) -> None:
    adapter = write_source(tmp_path / "source", broken=2)
    seen: list[Progress] = []
    report = ingest(adapter, tmp_path / "out", on_progress=seen.append)
    events = report.tables["events"]
    assert (events.rows_in, events.kept, events.quarantined) == (200, 196, 4)
    assert events.reasons == {"watch_ms is negative": 4}
    assert events.exact_duplicates == 2
    assert [count.rows_in for count in events.files.values()] == [60, 40, 60, 40]
    assert report.dates == dict.fromkeys(DAYS, 98)
    assert [step.done for step in seen] == [1, 2, 3, 4, 5, 1, 2]
    events_out = load_events(tmp_path / "out")
    expected = [f"{day}-{place}" for day in DAYS for place in range(2, 100)]
    assert events_out["request_id"].to_pylist() == expected
    assert events_out["date"].to_pylist() == [DAYS[0]] * 98 + [DAYS[1]] * 98
    assert events_out["video_id"].to_pylist()[0] == 2**40 + 2
    assert load_events(tmp_path / "out", [DAYS[1]])["request_id"].to_pylist() == expected[98:]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine" / "events.parquet")
    assert quarantine["line"].to_pylist() == [1, 2, 1, 2]
    assert set(quarantine["reason"].to_pylist()) == {"watch_ms is negative"}
    assert quarantine["watch_ms"].to_pylist() == [-1] * 4
    assert Path(quarantine["file"].to_pylist()[3]).parts[-2:] == (f"date={DAYS[1]}", "0.parquet")
    saved = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert saved["tables"]["events"]["kept"] == 196
    before = files_of(tmp_path / "out")
    ingest(adapter, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_source_too_bad_is_refused_with_examples_and_replaces_nothing(tmp_path: Path) -> None:
    ingest(write_source(tmp_path / "good"), tmp_path / "out")
    before = files_of(tmp_path / "out")
    bad = write_source(tmp_path / "bad", broken=6)
    with pytest.raises(IngestError) as refusal:
        ingest(bad, tmp_path / "out")
    message = str(refusal.value)
    assert "events: 12 of 200 rows (6.0%) break the schema (at most 5.0% may); nothing was replaced" in message
    assert "watch_ms is negative: 12" in message
    assert re.search(r"date=2026-01-31/0\.parquet line 1 \(watch_ms is negative\)", message)
    assert files_of(tmp_path / "out") == before
    assert ingest(bad, tmp_path / "out", max_bad_share=0.06).tables["events"].kept == 188


def test_a_table_of_the_wrong_shape_is_refused_by_file_and_column(tmp_path: Path) -> None:
    adapter = write_source(tmp_path / "source")
    file = tmp_path / "source" / "events" / f"date={DAYS[0]}" / "1.parquet"
    pq.write_table(pq.ParquetFile(file).read().drop_columns(["user_id"]), file)
    with pytest.raises(SchemaError, match=rf"{DAYS[0]}/1\.parquet: events lacks the required column user_id"):
        ingest(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_ingest_wrote_is_never_replaced(tmp_path: Path) -> None:
    adapter = write_source(tmp_path / "source")
    before = files_of(tmp_path / "source")
    with pytest.raises(IngestError, match="holds something that no ingest wrote"):
        ingest(adapter, tmp_path / "source")
    assert files_of(tmp_path / "source") == before


def test_damaged_files_and_missing_days_are_errors(tmp_path: Path) -> None:
    ingest(write_source(tmp_path / "source"), tmp_path / "out")
    assert load_table(tmp_path / "out", "videos") is None
    assert loaded(tmp_path / "out", "users").num_rows == 3
    with pytest.raises(IngestError, match="no events of 2026-02-09"):
        load_events(tmp_path / "out", ["2026-02-09"])
    part = tmp_path / "out" / "events" / f"date={DAYS[0]}" / "part-00000.parquet"
    good = part.read_bytes()
    for position in range(4, len(good), 89):
        flipped = bytearray(good)
        flipped[position] ^= 4
        part.write_bytes(flipped)
        with pytest.raises(IngestError, match=r"part-00000\.parquet is damaged"):
            load_events(tmp_path / "out", [DAYS[0]])
    part.write_bytes(good)
    assert load_events(tmp_path / "out", [DAYS[0]]).num_rows == 100
    part.unlink()
    with pytest.raises(IngestError, match="damaged or gone"):
        load_events(tmp_path / "out")


def test_the_second_row_of_a_user_in_another_file_is_set_aside(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    pq.write_table(pa.table({"u": [5, 6]}), tmp_path / "u1.parquet")
    pq.write_table(pa.table({"u": [6, 7, 8]}), tmp_path / "u2.parquet")
    (tmp_path / "m.toml").write_text('[users]\nfiles = "u*.parquet"\ncolumns = { user_id = "u" }\n')
    report = ingest(MappingAdapter(tmp_path / "m.toml"), tmp_path / "out", max_bad_share=0.2)
    assert report.tables["users"].reasons == {"user_id was already seen": 1}
    assert loaded(tmp_path / "out", "users")["user_id"].to_pylist() == [5, 6, 7, 8]


def test_the_worked_example_of_the_documentation_runs(tmp_path: Path, monkeypatch) -> None:
    text = DOC.read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["toml", "csv", "csv", "csv", "python"]
    for language, block in blocks[:-1]:
        first, rest = block.split("\n", 1)
        file = tmp_path / first.removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(rest if language == "csv" else block)
    (tmp_path / "example.py").write_text(blocks[-1][1])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("example.py")
    dates, long_view, like = (names["events"][name].to_pylist() for name in ("date", "long_view", "like"))
    quarantined = names["report"].tables["events"].reasons
    assert dates == ["2026-01-31", "2026-02-01"]
    assert (long_view, like) == ([0, 1], [0, 1])
    assert quarantined == {"watch_ms is negative": 1, "the line has 4 fields, its header 5": 1}
    quarantine = pq.read_table(tmp_path / "dataset" / "quarantine" / "events.parquet").to_pylist()
    assert [(row["line"], row["raw"]) for row in quarantine] == [(3, None), (4, "anna,12,2026-01-31T08:00:05Z,3.0")]
    videos = loaded(tmp_path / "dataset", "videos").to_pylist()
    assert [(row["duration_ms"], row["tags"], row["eligible"]) for row in videos] == [
        (30000, [3, 7], True),
        (12500, None, False),
    ]
    assert loaded(tmp_path / "dataset", "users")["age"].to_pylist() == [31, None]
