"""What the doctor promises: it says what is wrong and how to mend it, and exits accordingly."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipelines import doctor
from pipelines.doctor import PACKAGES, TESTED, Check, check_gpu, check_origins, check_versions, diagnose, print_checks

HOME = Path(__file__).parents[2]


def printed(checks: list[Check]) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = print_checks(checks, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_installed_set_is_looked_at_whole_and_every_fault_has_a_cure() -> None:
    checks = diagnose()
    areas = {check.area for check in checks}
    assert {"python", "torch + fbgemm + torchrec", "ray", "cpu", "gpu", "memory", "/dev/shm"} <= areas  # noqa: S108
    assert {f"package {name}" for name in PACKAGES} <= areas
    assert all(check.ok or check.cure for check in checks)
    [together] = [check for check in checks if check.area == "torch + fbgemm + torchrec"]
    assert together.ok, together.found
    code, text = printed(checks)
    assert code == (0 if all(check.ok for check in checks) else 1)
    assert str(HOME / "features") in text


def test_a_version_that_was_not_tested_is_named_beside_the_one_that_was() -> None:
    good = dict(TESTED) | {"torch": TESTED["torch"] + "+cpu"}
    assert all(check.ok for check in check_versions(good))
    del good["fbgemm-gpu-cpu"]
    gpu = {**good, "fbgemm-gpu": "1.8.0", "faiss-cpu": "1.7.0", "torch": "2.1.0"}
    wrong = {check.area: check.found for check in check_versions(gpu) if not check.ok}
    assert wrong == {"faiss-cpu": "1.7.0, tested with 1.15.1", "torch": "2.1.0, tested with 2.13.0"}
    both = [check for check in check_versions({**dict(TESTED), "faiss-gpu": "1.15.1"}) if not check.ok]
    assert [check.found for check in both] == ["faiss-cpu and faiss-gpu shadow each other"]
    assert not any(check.ok for check in check_versions({}))


def test_a_foreign_package_of_our_name_is_found_in_a_real_interpreter(tmp_path: Path) -> None:
    (tmp_path / "ranking").mkdir()
    (tmp_path / "ranking" / "__init__.py").write_text("")
    script = "from pipelines.doctor import _own_packages, print_checks; raise SystemExit(print_checks(_own_packages()))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f"package ranking: {tmp_path / 'ranking'}" in done.stdout
    assert f"remove {tmp_path / 'ranking'} from sys.path" in done.stdout
    assert "1 wrong" in done.stdout


def test_a_package_that_is_not_installed_says_how_to_install_it() -> None:
    [check] = check_origins({"serving": None}, HOME)
    assert not check.ok
    assert "pip install -e" in check.cure


@pytest.mark.parametrize(
    ("driver", "built_for", "available", "ok", "words"),
    [
        ("", None, False, True, "none"),
        ("H100", "12.8", True, True, "CUDA 12.8"),
        ("H100", None, False, False, "CPU build"),
        ("H100", "12.8", False, False, "cannot reach"),
    ],
)
def test_a_gpu_that_torch_cannot_reach_is_a_fault_and_no_gpu_is_not(driver, built_for, available, ok, words) -> None:
    check = check_gpu(driver, built_for, available)
    assert check.ok is ok
    assert words in check.found
    assert ok or check.cure


def test_a_look_that_fails_is_a_finding_and_the_others_still_happen(monkeypatch) -> None:
    def broken() -> list[Check]:
        raise OSError("no such device")

    broken.__name__ = "_memory"
    for name in ("_imports", "_ray"):
        monkeypatch.setattr(doctor, name, list)
    monkeypatch.setattr(doctor, "_memory", broken)
    checks = doctor.diagnose()
    [memory] = [check for check in checks if check.area == "memory"]
    assert not memory.ok
    assert "no such device" in memory.found
    assert any(check.area == "cpu" for check in checks)
    code, text = printed(checks)
    assert code == 1
    assert "mend:" in text
