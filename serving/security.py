"""Who may connect, and who is believed: addresses, TLS certificates and bearer tokens, of the server and its clients.

Secure by default: loopback only; an address that others reach needs TLS or an explicit word. Tokens are kept as
digests, all of them compared in constant time, and read again when their file changes, so rotation needs no restart.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health

_log = logging.getLogger(__name__)
MIN_TOKEN = 16
"""Characters; `openssl rand -hex 32` gives 64."""
_AUTHORIZATION, _BEARER = "authorization", "Bearer "
_OPEN_TO_ALL = f"/{health.SERVICE_NAME}/"
"""Balancers and kubelets ask for health without a token; the answer tells nothing but that."""


class SecurityError(ValueError):
    """Certificates, keys or tokens that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSecurity:
    """What protects the port."""

    cert_file: Path | None = None
    """PEM chain of the server; with `key_file` it turns TLS on."""
    key_file: Path | None = None
    client_ca_file: Path | None = None
    """PEM; only clients with a certificate signed by it may connect (mTLS)."""
    token_file: Path | None = None
    """One token a line, `#` begins a comment; a call must bring one of them as `authorization: Bearer TOKEN`."""
    insecure_public: bool = False
    """Allow an address that other machines can reach without TLS."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise SecurityError("TLS needs a certificate and its key: give both --tls-cert and --tls-key")
        if self.client_ca_file is not None and self.cert_file is None:
            raise SecurityError("--client-ca needs TLS: give --tls-cert and --tls-key too")

    def check_address(self, host: str) -> None:
        """Raises SecurityError for an address beyond this machine that is neither encrypted nor asked for."""
        if is_loopback(host) or self.insecure_public:
            return
        if self.cert_file is None:
            raise SecurityError(
                f"host {host!r} can be reached from other machines, and this server has no TLS: give --tls-cert and "
                "--tls-key, use 127.0.0.1 behind a proxy, or say --insecure-public if the network is trusted"
            )
        if self.client_ca_file is None and self.token_file is None:
            _log.warning("%s is encrypted, but whoever reaches it is served: --tokens or --client-ca limit that", host)

    def credentials(self) -> grpc.ServerCredentials | None:
        """What the port is opened with; None without TLS."""
        if self.cert_file is None or self.key_file is None:
            return None
        ca = None if self.client_ca_file is None else _pem(self.client_ca_file, "--client-ca", b"CERTIFICATE")
        pair = _pem(self.key_file, "--tls-key", b"PRIVATE KEY"), _pem(self.cert_file, "--tls-cert", b"CERTIFICATE")
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientSecurity:
    """How a client connects and what it shows."""

    tls: bool = False
    """Implied by any of the next three."""
    ca_file: Path | None = None
    """PEM of whoever signed the server's certificate; None: what the system trusts."""
    cert_file: Path | None = None
    """The client's own, where the server asks for one."""
    key_file: Path | None = None
    token_file: Path | None = None
    """The first token in it is sent."""

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise SecurityError("a client certificate needs its key: give both --cert and --key, or neither")

    def channel(self, address: str) -> grpc.Channel:
        """A channel that shows what this says; raises SecurityError rather than send a token in the clear."""
        encrypted = self.tls or self.ca_file is not None or self.cert_file is not None
        channel = grpc.secure_channel(address, self._credentials()) if encrypted else grpc.insecure_channel(address)
        if self.token_file is None:
            return channel
        if not encrypted and not is_loopback(address.rpartition(":")[0].strip("[]")):
            raise SecurityError(f"a token would go to {address} unencrypted: give --ca (or --tls)")
        return grpc.intercept_channel(channel, _SendToken(read_tokens(self.token_file)[0]))

    def _credentials(self) -> grpc.ChannelCredentials:
        ca = None if self.ca_file is None else _pem(self.ca_file, "--ca", b"CERTIFICATE")
        key = None if self.key_file is None else _pem(self.key_file, "--key", b"PRIVATE KEY")
        cert = None if self.cert_file is None else _pem(self.cert_file, "--cert", b"CERTIFICATE")
        return grpc.ssl_channel_credentials(ca, key, cert)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost is taken to be public."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: Path) -> list[str]:
    """Tokens of a file; raises SecurityError when there is none or one is too short to be a secret."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    tokens = [line for line in lines if line]
    if not tokens:
        raise SecurityError(f"{path} holds no token: write one a line, e.g. of `openssl rand -hex 32`")
    if any(len(token) < MIN_TOKEN for token in tokens):
        raise SecurityError(f"{path} holds a token shorter than {MIN_TOKEN} characters: use `openssl rand -hex 32`")
    return tokens


class Tokens:
    """The tokens of a file, as digests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._digests = _digests(path)
        if path.stat().st_mode & 0o004:
            _log.warning("%s can be read by every user of this machine: chmod 600 it", path)

    def knows(self, token: str) -> bool:
        """Compared with every token, whichever matches, in constant time."""
        found = hashlib.sha256(token.encode()).digest()
        matches = [hmac.compare_digest(found, digest) for digest in self._digests]  # all of them: no early end
        return any(matches)

    def shown(self, authorization: Sequence[str]) -> bool:
        """Whether the values of a call's `authorization` are one, and a known token."""
        if len(authorization) != 1 or not authorization[0].startswith(_BEARER):
            return False
        return self.knows(authorization[0].removeprefix(_BEARER))

    def refresh(self) -> None:
        """Read the file again if it changed; one that cannot be used changes nothing but a log line."""
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._digests, self._stamp = _digests(self._path), stamp
            _log.info("%d tokens read from %s", len(self._digests), self._path)
        except (OSError, SecurityError) as error:
            _log.error("the tokens of before stay valid: %s", error)


class AskToken(grpc.aio.ServerInterceptor):
    """Ends calls without a known token, health checks excepted, before their message is read."""

    def __init__(self, tokens: Tokens, on_refused: Callable[[], None]) -> None:
        self._tokens, self._on_refused = tokens, on_refused
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)  # the one kind that reads no message first

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method.startswith(_OPEN_TO_ALL) or self._shown(handler_call_details):  # pyright: ignore[reportAttributeAccessIssue]
            return await continuation(handler_call_details)
        return self._refusal

    def _shown(self, details: Any) -> bool:
        return self._tokens.shown([v for name, v in details.invocation_metadata or () if name == _AUTHORIZATION])

    async def _refuse(self, messages: Any, context: Any) -> None:
        self._on_refused()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no known token: send `authorization: Bearer TOKEN`")


class _SendToken(grpc.UnaryUnaryClientInterceptor):
    def __init__(self, token: str) -> None:
        self._metadata = ((_AUTHORIZATION, _BEARER + token),)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_WithMetadata(client_call_details, self._metadata), request)


class _WithMetadata(grpc.ClientCallDetails):
    """The same call, with metadata added."""

    def __init__(self, details: Any, added: tuple[tuple[str, str], ...]) -> None:
        self.method, self.timeout, self.credentials = details.method, details.timeout, details.credentials
        self.metadata = (*(details.metadata or ()), *added)
        self.wait_for_ready, self.compression = details.wait_for_ready, details.compression


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digests(path: Path) -> list[bytes]:
    return [hashlib.sha256(token.encode()).digest() for token in read_tokens(path)]


def _pem(path: Path, option: str, holds: bytes) -> bytes:
    """gRPC says nothing useful of a file it cannot use, and says it late."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SecurityError(f"{option} {path}: {error.strerror}") from error
    if b"-----BEGIN " not in raw or holds not in raw:
        raise SecurityError(f"{option} {path} is no PEM file with a {holds.decode()}")
    return raw
