"""Logs and datasets that lie elsewhere: the same rows and hashes as on this machine, through Ray's workers too."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import fsspec
import numpy as np
import pytest

from features.validate import SchemaError
from pipelines.adapters.canonical import CanonicalAdapter
from pipelines.adapters.detect import open_adapter
from pipelines.adapters.mapping import MappingAdapter
from pipelines.cluster import ClusterConfig, cluster
from pipelines.ingest import IngestError, event_dates, event_parts, ingest, load_events, load_table
from pipelines.ingest.spread import run_here
from pipelines.ingest.tables import stored
from pipelines.storage import RemotePath, StorageError, location

DAY_MS, START_MS = 86_400_000, 1_769_817_600_000
MAPPING = """
[events]
files = "log/*.csv"
[events.columns]
user_id = "u"
video_id = "v"
ts_ms = "t"
watch_ms = "w"
[users]
files = "users.csv"
columns.user_id = "u"
"""


def write_logs(root: Path, days: int = 2, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    (root / "log").mkdir(parents=True, exist_ok=True)
    (root / "m.toml").write_text(MAPPING)
    (root / "users.csv").write_text("u\n1\n2\n")
    for day in range(days):
        rows = [
            f"{rng.integers(1, 3)},{rng.integers(0, 9)},{START_MS + day * DAY_MS + i},{-1 if i == 3 else i}"
            for i in range(40)
        ]
        (root / "log" / f"{day}.csv").write_text("\n".join(["u,v,t,w", *rows, "torn,", ""]))


def upload(root: Path, url: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    for file in root.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{path}/{file.relative_to(root).as_posix()}", file.read_bytes())


def hashes(out: RemotePath | Path) -> dict[str, str]:
    return json.loads((out / "ingest.json").read_text())["sha256"]


def assert_goes_on_as_here(tmp_path: Path, url: str) -> None:
    """Ingest from and to `url`, late data, nothing new, damage; each step beside the same on this machine."""
    here, out = tmp_path / "logs", location(f"{url}/out")
    assert isinstance(out, RemotePath)
    write_logs(here)
    upload(here, f"{url}/logs")
    first = ingest(open_adapter(f"{url}/logs/m.toml"), f"{url}/out")
    ingest(MappingAdapter(here / "m.toml"), tmp_path / "out")
    assert hashes(out) == hashes(tmp_path / "out") | {k: v for k, v in hashes(out).items() if "quarantine" in k}
    assert load_events(out).equals(load_events(tmp_path / "out"))
    assert first.tables["events"].reasons == {"watch_ms is negative": 2, "the line has 2 fields, its header 4": 2}
    assert load_table(out, "users") == load_table(tmp_path / "out", "users")
    assert ingest(open_adapter(f"{url}/logs/m.toml"), out).note == "nothing written: all 3 files are as they were"
    write_logs(here, days=3)
    (here / "log" / "late.csv").write_text(f"u,v,t,w\n1,2,{START_MS + DAY_MS + 5},7\n")
    upload(here / "log", f"{url}/logs/log")
    again = ingest(open_adapter(f"{url}/logs/m.toml"), out)
    ingest(MappingAdapter(here / "m.toml"), tmp_path / "out")
    assert again.days_written == event_dates(out)[1:]
    assert load_events(out).equals(load_events(tmp_path / "out"))
    assert [part.rows for part in event_parts(out)] == list(again.dates.values())
    copied = ingest(CanonicalAdapter(tmp_path / "out"), f"{url}/copy")
    assert load_events(f"{url}/copy").equals(load_events(out))
    assert copied.tables["events"].kept == again.tables["events"].kept
    back = ingest(
        CanonicalAdapter(out), tmp_path / "back"
    )  # what the last ingest replaced is still there, and left out
    assert back.dates == again.dates
    assert load_events(tmp_path / "back").equals(load_events(out))
    victim = stored(out, *next((name, sha) for name, sha in hashes(out).items() if name.startswith("events/")))
    fs, path = fsspec.core.url_to_fs(str(victim))
    fs.pipe_file(path, b"PAR1")
    with pytest.raises(IngestError, match="is damaged"):
        load_events(out)
    ingest(open_adapter(f"{url}/logs/m.toml"), out)
    assert load_events(out).equals(load_events(tmp_path / "out"))


def test_logs_and_dataset_in_the_memory_of_this_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.ingest.run.run_on_ray", run_here)
    monkeypatch.setattr("pipelines.ingest.run.cluster", lambda where: nullcontext())
    assert_goes_on_as_here(tmp_path, f"memory://{tmp_path.name}")


def test_a_file_url_is_a_path_and_a_url_that_was_a_path_is_found_again(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}") == tmp_path
    assert location(Path(f"file://{tmp_path}")) == tmp_path
    assert location(Path("memory://bucket/a")) == RemotePath("memory://bucket/a")
    assert location("relative/a") == Path("relative/a").absolute()


def test_a_mapping_here_may_name_files_elsewhere(tmp_path: Path) -> None:
    write_logs(tmp_path)
    upload(tmp_path, f"memory://{tmp_path.name}/far")
    mapping = MAPPING.replace("log/*.csv", f"memory://{tmp_path.name}/far/log/*.csv")
    (tmp_path / "m.toml").write_text(mapping)
    adapter = MappingAdapter(tmp_path / "m.toml")
    assert [str(file) for file in adapter.files("events")] == [
        f"memory://{tmp_path.name}/far/log/{day}.csv" for day in (0, 1)
    ]
    assert ingest(adapter, tmp_path / "out").tables["events"].rows_in == 82


def test_what_is_missing_is_said_with_its_cure(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"gs://b/x: gs:// needs a package .* pip install gcsfs"):
        location("gs://b/x")
    with pytest.raises(StorageError, match=r"no file system is called nope://"):
        location("nope://b/x")
    with pytest.raises(SchemaError, match=r"memory://nothing/here: no adapter reads this"):
        open_adapter("memory://nothing/here")


@pytest.fixture
def s3(monkeypatch):
    """A real S3 client against moto's server, in a Ray of its own whose workers know of it too."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    with cluster(ClusterConfig(cpus=2, object_store_mib=128)):
        yield "s3://bucket"
    server.stop()


@pytest.mark.slow
def test_logs_and_dataset_in_s3_through_rays_workers(tmp_path: Path, s3: str) -> None:
    assert_goes_on_as_here(tmp_path, f"{s3}/{tmp_path.name}")
