"""sha256 of files, and one of a whole set of files: what it says hangs on their names and bytes, on nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_sha256(sha256_by_name: Mapping[str, str]) -> str:
    """One digest of many files, over their sorted (name, sha256): neither time nor place nor order is in it."""
    return hashlib.sha256(json.dumps(sorted(sha256_by_name.items())).encode()).hexdigest()
