"""Calls that reach the servicer by another way than this process's gRPC server: over HTTP, or through Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence

import grpc


class StatusError(Exception):
    """A call that ended without an answer: gRPC's status and its details."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(code, details)  # both, so that it can go from one process to another
        self.code, self.details = code, details

    def __str__(self) -> str:
        return self.details


class OutsideCall:
    """What the servicer asks of a call's context."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def time_remaining(self) -> None:
        """The caller's deadline is not known here: the server's default counts."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """For the tracer."""
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise StatusError(code, details)
