"""A process of its own that loads a staged bundle and asks it its golden requests, as a server does before it serves.

    python -m pipelines.gate.answers FOLDER

What the process that made the bundle has in memory (a patched class, a cache, an environment) cannot help it here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipelines.gate.config import GateConfig
from pipelines.gate.verdict import Verdict

RULE = "golden requests answered as recorded, in a clean process"
SOURCES = Path(__file__).parents[2]
_STDERR_LINES = 4


def answers_rule(folder: Path, config: GateConfig) -> Verdict:
    """Its last words are quoted when it fails or does not end in time."""
    asked = len((folder / "golden.json").read_text().split('"request"')) - 1
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "pipelines.gate.answers", str(folder)],
            capture_output=True, text=True, check=False, timeout=config.clean_process_timeout_s,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        late = f"not within {config.clean_process_timeout_s:g} s; {_last(said)}"
        return Verdict(RULE, 0, asked, None, False, late, _LOOK_AT)
    answered = int(done.stdout) if done.returncode == 0 else 0
    note = "" if done.returncode == 0 else f"exit code {done.returncode}: {_last(done.stderr)}"
    return Verdict(RULE, answered, asked, None, answered == asked > 0, note, _LOOK_AT)


def main(folder: Path) -> int:
    """Golden requests that were answered as recorded."""
    from serving.bundle import FeedBundle
    from serving.golden import NAME, check

    return check(FeedBundle.open(folder, "candidate"), folder / NAME)


_LOOK_AT = "the message, and `python -m pipelines.gate.answers` on a copy published with --force"


def _last(stderr: str) -> str:
    lines = stderr.strip().splitlines()[-_STDERR_LINES:]
    return " | ".join(line.strip() for line in lines) or "it said nothing"


if __name__ == "__main__":
    sys.stdout.write(str(main(Path(sys.argv[1]))))
