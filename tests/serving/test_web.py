"""The HTTP gateway: the same answers and refusals as over gRPC, and nothing for pages of other sites."""

from __future__ import annotations

import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.client import FeedClient
from serving.security import SecurityError, ServerSecurity
from serving.server import FeedServer

sys.path.insert(0, str(Path(__file__).parent))
from certificates import Authority
from servers import CONFIG, running

WEB = replace(CONFIG, web_port=0, default_deadline_ms=20_000)
KNOWN = "a-long-enough-secret"


@pytest.fixture(scope="module")
def server(world, tmp_path_factory) -> Iterator[FeedServer]:
    with running(world.registry, tmp_path_factory.mktemp("web") / "s.sqlite", WEB) as server:
        yield server


def post(server: FeedServer, path: str, body: Any, scheme: str = "http", context=None, **headers: str):
    """(status, JSON, headers) of a call, whatever the status."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    url = f"{scheme}://127.0.0.1:{server.web_port}/api/{path}"
    request = urllib.request.Request(url, raw, headers)  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_a_page_is_the_one_that_grpc_gives(world, server):
    asked = {"user_id": str(int(world.dataset.users.ids[3])), "k": 7, "request_id": "same", "now_ms": world.now_ms}
    status, answer, _ = post(server, "GetFeed", asked)
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
        page = client.get_feed(int(asked["user_id"]), k=7, request_id="same", now_ms=world.now_ms)
    assert status == 200
    items = answer["page"]["items"]
    assert [item["video_id"] for item in items] == [str(item.video_id) for item in page.items]
    for shown, item in zip(items, page.items, strict=True):
        assert (shown["propensity"], shown["value"]) == (item.propensity, item.value)
        assert shown["value_terms"] == item.value_terms
        assert shown["scores"] == pytest.approx(list(item.scores), abs=1e-7)
    row = int(world.dataset.videos.rows_of([page.items[0].video_id])[0])
    uploaded = answer["videos"][items[0]["video_id"]]["upload_ts_ms"]
    assert uploaded == int(world.dataset.upload_ts_ms[row])
    assert answer["page"]["level"] == "LEVEL_FULL"


def test_events_are_stored_and_counted_once(world, server):
    user = int(world.dataset.users.ids[4])
    _, answer, _ = post(server, "GetFeed", {"user_id": str(user), "k": 2, "now_ms": world.now_ms})
    page = answer["page"]
    event = {"request_id": page["request_id"], "slot": 0, "user_id": str(user)}
    event |= {"video_id": page["items"][0]["video_id"], "watch_ms": 900, "like": True}
    assert post(server, "LogEvents", {"events": [event]})[:2] == (200, {"stored": 1, "merged": 0, "conflicting": 0})
    assert post(server, "LogEvents", {"events": [event]})[1]["merged"] == 1
    assert int(event["video_id"]) in server.store.user(user).seen_ids


@pytest.mark.parametrize(
    ("path", "body", "details"),
    [
        ("GetFeed", {"k": 0}, "k: 0 is outside 1 .. 100"),
        ("GetFeed", {"k": 5, "surface": "<b>"}, "surface: '<b>' is not known"),
        ("GetFeed", {"kk": 5}, "no field named"),
        ("GetFeed", [], "expected an object"),
        ("GetFeed", {"user_id": str(2**63)}, "out of range"),
        ("GetFeed", b"{", "not a GetFeedRequest in JSON"),
        ("GetFeed", b"[" * 100_000, "not a GetFeedRequest in JSON"),
        ("GetFeed", b"\xff", "not a GetFeedRequest in JSON"),
        ("LogEvents", {"events": []}, "events: 0 entries"),
    ],
)
def test_mistakes_of_the_caller_name_the_field(server, path, body, details):
    status, answer, _ = post(server, path, body)
    assert (status, answer["code"]) == (400, "INVALID_ARGUMENT")
    assert details in answer["details"]


def test_other_sites_other_names_and_other_paths_get_nothing(server):
    own = f"http://127.0.0.1:{server.web_port}"
    body = {"k": 3}
    assert post(server, "GetFeed", body, Origin=own)[0] == 200
    assert post(server, "GetFeed", body, Origin="http://evil.example")[:2] == (
        403,
        {"code": "PERMISSION_DENIED", "details": "pages of other sites may not call this server"},
    )
    assert post(server, "GetFeed", body, Origin="null")[0] == 403
    assert post(server, "GetFeed", body, Host="rebound.example")[0] == 403
    assert post(server, "GetFeed", body, Content_Type="text/plain")[0] == 400, "what a form of another site may send"
    assert post(server, "Rank", body)[0] == 404
    assert post(server, "GetFeed", b" " * (5 << 20))[0] == 413
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{own}/..%2fserver.py", timeout=10)  # noqa: S310


def test_no_answer_allows_inline_code_or_another_origin(server):
    for _, _, headers in (post(server, "GetFeed", {"k": 3}), post(server, "GetFeed", {"k": 0})):
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Access-Control-Allow-Origin"] is None
    with urllib.request.urlopen(f"http://127.0.0.1:{server.web_port}/", timeout=10) as page:
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]


def test_every_call_needs_a_token_where_the_server_has_some(world, tmp_path):
    (tmp_path / "tokens").write_text(KNOWN)
    config = replace(WEB, security=ServerSecurity(token_file=tmp_path / "tokens"))
    with running(world.registry, tmp_path / "s.sqlite", config) as server:
        for path in ("about", "GetFeed", "LogEvents"):
            assert post(server, path, {})[:2] == (
                401,
                {"code": "UNAUTHENTICATED", "details": "no known token: send `authorization: Bearer TOKEN`"},
            )
        assert post(server, "about", {}, Authorization="Bearer of-something-else")[0] == 401
        assert post(server, "about", {}, Authorization=f"Bearer {KNOWN}")[0] == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{server.web_port}/", timeout=10) as page:
            assert page.status == 200, "the page itself says nothing of anybody, and asks for the token"


def test_tls_and_client_certificates_protect_the_page_as_they_do_grpc(world, tmp_path):
    ours = Authority(tmp_path, "our-ca")
    pair, client = ours.sign("server"), ours.sign("client")
    security = ServerSecurity(cert_file=pair.cert, key_file=pair.key, client_ca_file=ours.cert)
    with running(world.registry, tmp_path / "s.sqlite", replace(WEB, security=security)) as server:
        known = ssl.create_default_context(cafile=str(ours.cert))
        known.load_cert_chain(client.cert, client.key)
        assert post(server, "about", {}, "https", known)[0] == 200
        stranger = ssl.create_default_context(cafile=str(ours.cert))
        with pytest.raises(OSError, match=r"(?i)certificate|reset|EOF|closed"):
            post(server, "about", {}, "https", stranger)
        with pytest.raises(OSError, match=r"(?i)reset|closed|disconnected"):
            post(server, "about", {}, "http")


def test_a_public_page_needs_the_same_word_as_public_grpc(world, tmp_path):
    config = replace(WEB, host="0.0.0.0")  # noqa: S104 - refused
    with pytest.raises(SecurityError, match="--insecure-public"):
        FeedServer(world.registry, tmp_path / "s.sqlite", config)
