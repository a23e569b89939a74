"""Quality of a finished run on its test days: retrieval, ranking and the long_view protocol, as one small JSON.

reelrank demo --scale small && python -m benchmarks.quality runs/demo-small [--json FILE]
reelrank run --recipe kuairand-pure --data PATH && python -m benchmarks.quality runs/kuairand-pure [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pipelines.console import output
from pipelines.show import print_metrics

KEPT = (
    "title",
    "created",
    "machine",
    "versions",
    "split",
    "stages",
    "retrieval",
    "retrieval_note",
    "pools",
    "channels",
    "ranking",
    "slices",
    "slots",
    "primary",
    "watch",
    "collisions",
)


def main() -> None:
    """Print the tables; with --json also keep them, without feeds, curves and replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    record = json.loads((arguments.run / "run.json").read_text())
    kept = {name: record[name] for name in KEPT}
    console = output()
    console.print(f"{kept['title']} on {kept['machine']['cpu']}, {kept['machine']['cores']} cores")
    console.print(", ".join(f"{name} {version}" for name, version in kept["versions"].items()), soft_wrap=True)
    for stage in kept["stages"]:
        console.print(f"{stage['name']:<16}{stage['seconds']:>8.1f} s")
    print_metrics(kept, console)
    console.print(kept["retrieval_note"], soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
