"""The ranker behind LitServe, which starts its workers anew and so wants its API in a module of its own."""

from __future__ import annotations

import base64

import litserve

from benchmarks.server_peers import AT_ONCE, RankerBehind
from serving.scorer import Scorer


class Api(litserve.LitAPI):
    """JSON in and out, the messages as base64 text in it."""

    def __init__(self, registry: str, scorer: Scorer) -> None:
        super().__init__(api_path="/rank")
        self._of = (registry, scorer)

    def setup(self, device: str) -> None:
        self.behind = RankerBehind(*self._of)

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["message"])

    def predict(self, raw: bytes) -> bytes:
        return self.behind.answer_bytes(raw)

    def encode_response(self, raw: bytes) -> dict[str, str]:
        return {"message": base64.b64encode(raw).decode()}


def serve(registry: str, port: int, scorer: Scorer) -> None:
    """Two worker processes."""
    server = litserve.LitServer(Api(registry, scorer), accelerator="cpu", workers_per_device=AT_ONCE)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
