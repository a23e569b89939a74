"""A registry on an object store: whole or not there, one LIVE, and nothing parsed that was not verified."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from features import artifacts
from features.artifacts import ArtifactError, LiveMovedError, Registry
from features.remote import RemoteRegistry, open_registry

FILES = {"ranker.bin": b"weights" * 40, "index/ids.npy": bytes(range(256)), "config.json": b"{}"}


def publish(registry: Registry, version: str) -> str:
    staged = registry.stage()
    for name, content in FILES.items():
        path = staged / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content + version.encode())
    against = registry.live()
    registry.publish(staged, version=version, meta={"judged_against": against})
    registry.set_live(version, if_live=against)
    return version


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "local")


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteRegistry:
    where = f"memory://{uuid.uuid4().hex}/registry" if request.param == "memory" else f"file://{tmp_path}/remote"
    found = open_registry(where)
    assert isinstance(found, RemoteRegistry)
    return found


def test_what_is_pushed_is_what_is_pulled(local: Registry, remote: RemoteRegistry, tmp_path: Path):
    with pytest.raises(ArtifactError, match="no live bundle"):
        remote.pull(local)
    publish(local, "v1")
    assert remote.push(local, if_live=None) == remote.live() == "v1"
    assert remote.push(local) == "v1"
    assert [entry["version"] for entry in remote.history()] == ["v1"], "a push that is repeated promotes nothing"
    other = Registry(tmp_path / "other")
    assert remote.pull(other) == other.live() == "v1"
    pulled, pushed = other.open(), local.open()
    assert pulled.files == pushed.files
    assert {name: pulled.path(name).read_bytes() for name in FILES} == {n: c + b"v1" for n, c in FILES.items()}
    assert json.loads(remote.read_text("v1", "config.json")[:2]) == {}
    publish(local, "v2")
    remote.push(local, if_live="v1")
    assert remote.pull(other, "v2") == "v2"
    assert other.live() == "v1", "a version that is asked for by name is fetched, and LIVE left alone"
    assert remote.pull(other) == other.live() == "v2"


@pytest.mark.parametrize("kept", range(len(FILES) + 1))
def test_a_push_that_was_cut_off_is_no_version_and_is_finished_by_the_next(
    local: Registry, remote: RemoteRegistry, monkeypatch: pytest.MonkeyPatch, kept: int
):
    publish(local, "v1")
    sent = []

    def put(source: Path, target: str, real=remote._put) -> None:
        if len(sent) == kept:
            raise ConnectionError("cut off")
        sent.append(target)
        real(source, target)

    monkeypatch.setattr(remote, "_put", put)
    with pytest.raises(ConnectionError):
        remote.push(local)
    assert (remote.list(), remote.live()) == ([], None)
    monkeypatch.undo()
    remote.push(local)
    assert (remote.list(), remote.live()) == (["v1"], "v1")


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "manifest.sha256"])
def test_a_bit_that_flipped_on_the_way_is_refused_before_it_is_in_the_local_registry(
    local: Registry, remote: RemoteRegistry, tmp_path: Path, name: str
):
    publish(local, "v1")
    remote.push(local)
    fs, root = fsspec.core.url_to_fs(remote.url)
    raw = bytearray(fs.cat_file(f"{root}/bundles/v1/{name}"))
    raw[len(raw) // 2] ^= 1
    fs.pipe_file(f"{root}/bundles/v1/{name}", bytes(raw))
    other = Registry(tmp_path / "other")
    with pytest.raises(ArtifactError, match="v1"):
        remote.pull(other)
    assert (other.list(), other.live()) == ([], None)
    assert list((other.root / ".staging").iterdir()) == []


def test_a_publisher_who_judged_against_what_is_live_no_more_is_told(local: Registry, remote: RemoteRegistry, tmp_path):
    publish(local, "v1")
    remote.push(local, if_live=None)
    other = Registry(tmp_path / "other")
    remote.pull(other)
    publish(local, "v2")
    publish(other, "w2")
    remote.push(local, if_live="v1")
    with pytest.raises(LiveMovedError, match=r"has v2 live, w2 was judged against v1: pull, and publish again"):
        remote.push(other, if_live="v1")
    assert remote.live() == "v2"
    assert remote.list() == ["v1", "v2", "w2"]
    assert remote.rollback() == remote.live() == "v1"
    assert remote.history()[-1]["action"] == "rollback"
    with pytest.raises(ArtifactError, match="cannot roll back from v1"):
        remote.rollback()


def test_two_who_promote_at_the_same_moment_get_one_number(local: Registry, remote: RemoteRegistry, monkeypatch):
    publish(local, "v1")
    remote.push(local)
    publish(local, "v2")
    create = remote._create

    def late(path: str, raw: bytes) -> None:
        if "/promotions/" in path:  # another publisher, between our look and our put
            monkeypatch.undo()
            create(path, json.dumps({"at": "now", "action": "promote", "version": "w2"}).encode())
        create(path, raw)

    monkeypatch.setattr(remote, "_create", late)
    with pytest.raises(LiveMovedError, match="another publisher made w2 live"):
        remote.push(local, if_live="v1")
    assert [entry["version"] for entry in remote.history()] == ["v1", "w2"]


RACER = """
import sys
from features.artifacts import LiveMovedError, Registry
from features.remote import RemoteRegistry
who, url, folder = sys.argv[1:]
remote, local, won, tried = RemoteRegistry(url), Registry(folder), 0, 0
while won < 5:
    tried += 1
    if remote.live() is not None:
        remote.pull(local)
    against, staged = local.live(), local.stage()
    for name in ("a", "b"):
        (staged / name).write_text(f"{who} {tried}")
    version = local.publish(staged, meta={"who": who, "against": against})
    try:
        remote.push(local, version, if_live=against)
        local.set_live(version)
        won += 1
    except LiveMovedError:
        pass
"""


def test_racing_publishers_each_promote_over_the_one_they_were_judged_against(tmp_path: Path):
    url = f"file://{tmp_path}/remote"
    racers = [subprocess.Popen([sys.executable, "-c", RACER, who, url, str(tmp_path / who)]) for who in "xy"]
    assert [racer.wait(120) for racer in racers] == [0, 0]
    remote = RemoteRegistry(url)
    promoted = [entry["version"] for entry in remote.history()]
    assert len(promoted) == len(set(promoted)) == 10
    bundles = [remote.describe(version) for version in promoted]
    assert [bundle.meta["against"] for bundle in bundles] == [None, *promoted[:-1]]
    for bundle in bundles:
        texts = {remote.read_text(bundle.version, name) for name in ("a", "b")}
        assert len(texts) == 1
        assert texts.pop().startswith(bundle.meta["who"])


def test_pruning_leaves_live_its_fallback_and_the_newest(local: Registry, remote: RemoteRegistry, monkeypatch):
    for version in ("v1", "v2", "v3", "v4"):
        publish(local, version)
        remote.push(local)
    publish(local, "v5")
    remote.push(local)
    remote.rollback()
    monkeypatch.setattr(artifacts, "STAGING_MAX_AGE_S", -1)
    assert remote.prune(1, dry_run=True) == ["v1", "v2"]
    assert remote.prune(1) == ["v1", "v2"]
    assert remote.list() == ["v3", "v4", "v5"], "v4 is live, v3 its fallback, v5 the newest"
    fs, root = fsspec.core.url_to_fs(remote.url)
    assert not fs.exists(f"{root}/bundles/v1/ranker.bin")
    assert remote.pull(local) == "v4"


def test_a_url_nobody_speaks_is_refused_by_name():
    with pytest.raises(ValueError, match="registry gopher://x: Protocol not known"):
        RemoteRegistry("gopher://x")
    for url in ("s3://bucket/x", Path("s3://bucket/x")):
        with pytest.raises(ValueError, match="give a folder here, and `reelrank registry pull` into it"):
            Registry(url)


def test_s3_puts_conditionally(local: Registry, monkeypatch: pytest.MonkeyPatch):
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]' s3fs to test against S3's protocol")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("KEY_ID", "x"), ("KEY", "x")):
            monkeypatch.setenv(f"AWS_{'ACCESS' if name == 'KEY_ID' else 'SECRET_ACCESS'}_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem().mkdir("bucket")
        remote = RemoteRegistry("s3://bucket/registry")
        publish(local, "v1")
        remote.push(local, if_live=None)
        with pytest.raises(FileExistsError):
            remote._create(f"{remote._root}/promotions/00000001.json", b"{}")
        assert (remote.list(), remote.live()) == (["v1"], "v1")
        other = Registry(local.root.parent / "other")
        assert remote.pull(other) == other.live() == "v1"
        publish(local, "v2")
        with pytest.raises(LiveMovedError):
            remote.push(local, if_live=None)
        remote.push(local, if_live="v1")
        assert remote.rollback() == "v1"
    finally:
        server.stop()
