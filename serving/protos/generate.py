"""Regenerate the committed stubs: `python -m serving.protos.generate [OUT]`. A test compares them with a fresh run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "serving/protos/reelrank/v1/feed.proto"


def generate(out: Path) -> list[Path]:
    """Write feed_pb2.py, feed_pb2.pyi and feed_pb2_grpc.py below `out`, at their import path."""
    from grpc_tools import protoc  # a development tool: not needed to serve

    status = protoc.main(
        ["protoc", f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", str(ROOT / PROTO)]
    )
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {PROTO}")
    folder = out / Path(PROTO).parent
    return [folder / name for name in ("feed_pb2.py", "feed_pb2.pyi", "feed_pb2_grpc.py")]


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT):
        sys.stdout.write(f"{path}\n")
