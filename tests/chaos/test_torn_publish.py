"""A publisher killed at every step that touches the disk: LIVE names a complete old or a complete new version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from features.artifacts import Registry

FILES = 36
CHILD = """
import os, sys
from pathlib import Path
from features.artifacts import Registry

def publish(root, version, files):
    registry = Registry(root)
    staged = registry.stage()
    for number in range(files):
        (staged / f"part{number % 3}").mkdir(exist_ok=True)
        (staged / f"part{number % 3}" / f"file{number}").write_bytes(f"{version} {number} ".encode() * 50)
    registry.set_live(registry.publish(staged, version=version, meta={"tag": version}))

def killed_at(step):
    left = step
    def deadly(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))

step = 0
while True:
    step += 1
    root = Path(sys.argv[1]) / str(step)
    publish(root, "old", 2)
    child = os.fork()
    if child == 0:
        killed_at(step)
        publish(root, "new", int(sys.argv[2]))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(step, code, flush=True)
    if code == 0:
        break
"""


def test_a_publisher_killed_at_any_of_its_steps_leaves_a_complete_live_version(tmp_path: Path):
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(FILES)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout
    steps = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert len(steps) > 50, "killed at fifty points at least"
    assert {code for _, code in steps[:-1]} == {9}
    live = []
    for step, _ in steps:
        registry = Registry(tmp_path / str(step))
        bundle = registry.open()
        assert len(bundle.files) == (2 if bundle.version == "old" else FILES)
        assert bundle.meta == {"tag": bundle.version}
        for name in bundle.files:
            assert bundle.path(name).read_text().startswith(f"{bundle.version} ")
        live.append(bundle.version)
        staged = registry.stage()
        (staged / "next").write_text("x")
        registry.set_live(registry.publish(staged, version="next", meta={}))
        assert registry.open().version == "next", "the next publisher is not in the way of what was left"
    assert live == sorted(live, reverse=True), "old up to one step, new from there on"
    assert live[-1] == "new"


@pytest.mark.parametrize("version", ["half", "LIVE"])
def test_a_pointer_to_what_is_not_there_is_refused_by_name(tmp_path: Path, version: str):
    registry = Registry(tmp_path)
    staged = registry.stage()
    (staged / "a").write_text("x")
    registry.set_live(registry.publish(staged, version="v1", meta={}))
    (tmp_path / "LIVE").write_text(f"{version}\n")
    with pytest.raises(Exception, match=f"bundle {version} is not in"):
        registry.open()
