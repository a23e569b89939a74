"""Certificates and tokens over real connections: who is not known gets nothing, and says so to the right person."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from pipelines.cli import app
from serving.client import PLAIN, FeedClient
from serving.security import ClientSecurity, SecurityError, ServerSecurity, Tokens, read_tokens
from serving.server import FeedServer
from serving.server_config import ServerConfig

sys.path.insert(0, str(Path(__file__).parent))
from certificates import Authority
from servers import CONFIG, refused, running

TOKEN, NEXT_TOKEN = "a-long-enough-secret", "the-secret-of-tomorrow"
UNAVAILABLE, UNAUTHENTICATED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pki")
    ours, theirs = Authority(folder, "our-ca"), Authority(folder, "their-ca")
    tokens = folder / "tokens"
    tokens.write_text(f"# rotated yearly\n{TOKEN}\n")
    tokens.chmod(0o600)
    return {
        "ours": ours,
        "theirs": theirs,
        "server": ours.sign("server"),
        "client": ours.sign("client"),
        "stranger": theirs.sign("stranger"),
        "tokens": tokens,
    }


@pytest.fixture(scope="module")
def guarded(world, pki, tmp_path_factory) -> Iterator[FeedServer]:
    """TLS, client certificates and tokens, all of them."""
    server = pki["server"]
    security = ServerSecurity(
        cert_file=server.cert, key_file=server.key, client_ca_file=pki["ours"].cert, token_file=pki["tokens"]
    )
    config = replace(CONFIG, security=security, metrics_port=0)
    with running(world.registry, tmp_path_factory.mktemp("guarded") / "s.sqlite", config) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def known(pki) -> ClientSecurity:
    return ClientSecurity(
        ca_file=pki["ours"].cert, cert_file=pki["client"].cert, key_file=pki["client"].key, token_file=pki["tokens"]
    )


def ask(server: FeedServer, security: ClientSecurity) -> tuple[grpc.StatusCode, str]:
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20, security=security) as client:
        return refused(client.get_feed, 1)


def test_a_client_with_all_three_is_served(world, guarded, known):
    with FeedClient(f"127.0.0.1:{guarded.port}", timeout_s=20, security=known) as client:
        assert len(client.get_feed(1, now_ms=world.now_ms).items) == 10
        assert client.serving()


def test_plaintext_the_wrong_authority_and_a_missing_certificate_are_refused(guarded, known, pki):
    bad = [
        replace(known, ca_file=None, cert_file=None, key_file=None, token_file=None),
        replace(known, ca_file=pki["theirs"].cert),
        replace(known, cert_file=None, key_file=None),
        replace(known, cert_file=pki["stranger"].cert, key_file=pki["stranger"].key),
    ]
    assert [ask(guarded, security)[0] for security in bad] == [UNAVAILABLE] * 4


def test_missing_and_wrong_tokens_are_refused_counted_and_never_repeated(guarded, known, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-right-secret")
    for security in (replace(known, token_file=None), replace(known, token_file=wrong)):
        code, details = ask(guarded, security)
        assert code == UNAUTHENTICATED
        assert "not-the-right-secret" not in details
    address = f"http://127.0.0.1:{guarded.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert 'reelrank_refusals_total{cause="unauthenticated"} 2.0' in answer.read().decode()


def test_health_needs_no_token_and_reflection_does(guarded, known):
    without = replace(known, token_file=None)
    with FeedClient(f"127.0.0.1:{guarded.port}", timeout_s=20, security=without) as client:
        assert client.serving()
    with without.channel(f"127.0.0.1:{guarded.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert refused(list, stub.ServerReflectionInfo(requests, timeout=20))[0] == UNAUTHENTICATED


def test_tokens_rotate_without_a_restart(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n{NEXT_TOKEN}\n")
    tokens = Tokens(path)
    assert [tokens.knows(token) for token in (TOKEN, NEXT_TOKEN, "", TOKEN + "x", TOKEN[:-1])] == [
        True,
        True,
        False,
        False,
        False,
    ]
    path.write_text(f"{NEXT_TOKEN}  # the only one now\n")
    tokens.refresh()
    assert (tokens.knows(TOKEN), tokens.knows(NEXT_TOKEN)) == (False, True)
    path.write_text("")
    tokens.refresh()
    assert tokens.knows(NEXT_TOKEN), "a file without tokens is a mistake, not a wish to lock everybody out"


def test_a_server_reads_new_tokens_while_it_runs(world, tmp_path):
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    config = replace(CONFIG, security=ServerSecurity(token_file=path), poll_s=0.05)
    with running(world.registry, tmp_path / "s.sqlite", config) as server:
        assert ask(server, PLAIN)[0] == UNAUTHENTICATED
        old = ClientSecurity(token_file=tmp_path / "old")
        (tmp_path / "old").write_text(TOKEN)
        with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20, security=old) as client:
            client.get_feed(1, now_ms=world.now_ms)
            path.write_text(NEXT_TOKEN)
            while True:  # ended by the test's time limit
                try:
                    client.get_feed(1, now_ms=world.now_ms)
                except grpc.RpcError as error:
                    assert error.code() == UNAUTHENTICATED  # noqa: PT017
                    break


def test_what_cannot_protect_is_refused_before_anything_starts(pki, tmp_path):
    server = pki["server"]
    with pytest.raises(SecurityError, match="--tls-cert and --tls-key"):
        ServerSecurity(cert_file=server.cert)
    with pytest.raises(SecurityError, match="--client-ca needs TLS"):
        ServerSecurity(client_ca_file=pki["ours"].cert)
    with pytest.raises(SecurityError, match=r"--tls-key .*server\.pem is no PEM file with a PRIVATE KEY"):
        ServerSecurity(cert_file=server.cert, key_file=server.cert).credentials()
    short = tmp_path / "short"
    short.write_text("secret")
    with pytest.raises(SecurityError, match="shorter than 16"):
        read_tokens(short)
    with pytest.raises(SecurityError, match=r"a token would go to feeds\.example\.com:443 unencrypted"):
        ClientSecurity(token_file=pki["tokens"]).channel("feeds.example.com:443")
    tls = ServerSecurity(cert_file=server.cert, key_file=server.key)
    tls.check_address("0.0.0.0")  # noqa: S104
    assert ServerConfig().host == "127.0.0.1"
    assert ServerConfig().metrics_host == "127.0.0.1"


def test_a_key_of_another_certificate_is_a_clear_error(world, pki, tmp_path):
    security = ServerSecurity(cert_file=pki["server"].cert, key_file=pki["client"].key)
    with (
        pytest.raises(SecurityError, match="do not fit each other"),
        running(world.registry, tmp_path / "s.sqlite", replace(CONFIG, security=security)),
    ):
        pass


def test_the_command_line_serves_and_asks_with_certificates_and_tokens(world, pki, tmp_path):
    server, client, reelrank = pki["server"], pki["client"], CliRunner()
    serve = [
        "serve",
        "--registry",
        str(world.registry),
        "--store",
        str(tmp_path / "s.sqlite"),
        "--port",
        "0",
        "--scorer",
        "plain",
    ]
    public = reelrank.invoke(app, [*serve, "--host", "0.0.0.0"])  # noqa: S104
    assert isinstance(public.exception, SecurityError)
    serve += ["--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tokens", str(pki["tokens"])]
    command = [sys.executable, "-m", "pipelines.cli", *serve, "--client-ca", str(pki["ours"].cert)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[2]
            feed = ["feed", "--user", "1", "--address", address, "--now-ms", str(world.now_ms)]
            feed += ["--ca", str(pki["ours"].cert), "--cert", str(client.cert), "--key", str(client.key)]
            without = reelrank.invoke(app, feed).exception
            assert isinstance(without, grpc.RpcError)
            assert without.code() == UNAUTHENTICATED
            assert reelrank.invoke(app, [*feed, "--token-file", str(pki["tokens"])]).exit_code == 0
        finally:
            process.terminate()
            process.wait(timeout=30)
