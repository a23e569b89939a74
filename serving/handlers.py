"""How the service is hung into a server: as the generated stubs do it, but bytes that are no message are the caller's
mistake (INVALID_ARGUMENT), where gRPC calls them the server's (INTERNAL)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from serving.protos.reelrank.v1 import feed_pb2
from serving.servicer import FeedServicer

_SERVICE = feed_pb2.DESCRIPTOR.services_by_name["FeedService"]
SERVICE: str = _SERVICE.full_name


def add_to_server(servicer: FeedServicer, server: grpc.aio.Server) -> None:
    """Every method of the proto; the servicer has one of the same name for each."""
    handlers = {}
    for method in _SERVICE.methods:
        kind = GetMessageClass(method.input_type)
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            _whole(getattr(servicer, method.name), method.input_type.name),
            request_deserializer=_read(kind),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_registered_method_handlers(SERVICE, handlers)  # pyright: ignore[reportAttributeAccessIssue]


def _read(kind: type[Message]) -> Callable[[bytes], Message | None]:
    def read(raw: bytes) -> Message | None:
        try:
            return kind.FromString(raw)
        except DecodeError:
            return None

    return read


def _whole(call: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
    async def answer(request: Message | None, context: Any) -> Any:
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the bytes sent are not a {name}")
        return await call(request, context)

    return answer
