"""`reelrank doctor`: what this machine has, what is wrong with it, and how to mend it.

Nothing here needs a working installation: every look is guarded, because a doctor that dies on the first broken
import says nothing about the second.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTED = {
    "torch": "2.13.0",
    "torchrec": "1.8.0",
    "fbgemm-gpu-cpu": "1.8.0",
    "faiss-cpu": "1.15.1",
    "ray": "2.60.0",
    "pyarrow": "26.0.1",
    "numpy": "2.4.6",
    "polars": "2.1.0",
    "grpcio": "1.85.1",
}
"""The set that was measured to import, train and serve together; the locks in requirements/ hold it."""
GPU_TWIN = {"fbgemm-gpu-cpu": "fbgemm-gpu", "faiss-cpu": "faiss-gpu"}
"""On a CUDA machine the second of each pair is installed instead; both at once shadow each other."""
PACKAGES = ("features", "candidate_gen", "ranking", "serving", "pipelines")
INSTALL = "install the locked set again: pip install -r requirements/cpu.txt (or gpu.txt)"
CPU_FLAGS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512-BF16", "amx_bf16": "AMX-BF16", "amx_int8": "AMX-INT8"}
MIN_MEMORY_GIB = 4.0
MIN_DISK_GIB = 5.0
MIN_SHM_GIB = 0.5
SHM = Path("/dev/shm")  # noqa: S108 (shared memory, not a temporary file)
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding. A check that is not ok has a cure."""

    area: str
    found: str
    ok: bool = True
    cure: str = ""


def diagnose() -> list[Check]:
    """Look at the interpreter, the libraries, our own packages and the machine."""
    looks: list[Callable[[], list[Check]]] = [_python, _versions, _imports, _ray, _own_packages, _cpu, _gpu]
    looks += [_memory, _disk, _shared_memory]
    checks: list[Check] = []
    for look in looks:
        try:
            checks += look()
        except Exception as error:
            name = look.__name__.strip("_").replace("_", " ")
            checks.append(Check(area=name, found=f"could not look: {error!r}", ok=False, cure=INSTALL))
    return checks


def print_checks(checks: list[Check], console: Console | None = None) -> int:
    """Print the findings as a table, then the cures; the exit code: 0 fine, 1 something is wrong."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row("[green]ok[/]" if check.ok else "[red]!![/]", check.area, check.found)
    console.print(table)
    wrong = [check for check in checks if not check.ok]
    for check in wrong:
        console.print(f"[red]{check.area}[/]: {check.found}\n  mend: {check.cure}", soft_wrap=True)
    console.print("[green]nothing is wrong[/]" if not wrong else f"[red]{len(wrong)} wrong[/]")
    return 1 if wrong else 0


def _python() -> list[Check]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    found = f"{platform.python_version()} at {sys.executable}"
    return [Check(area="python", found=found, ok=ok, cure="" if ok else "use Python 3.11 or 3.12")]


def _versions() -> list[Check]:
    installed = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in metadata.distributions()}
    return check_versions(installed)


def check_versions(installed: Mapping[str, str]) -> list[Check]:
    """Installed distributions against the tested set; a local label such as +cpu is not a difference."""
    checks = []
    for name, tested in TESTED.items():
        twin = GPU_TWIN.get(name)
        present = [candidate for candidate in (name, twin) if candidate is not None and candidate in installed]
        if not present:
            missing = f"not installed, tested with {tested}"
            checks.append(Check(area=name, found=missing, ok=False, cure=INSTALL))
        elif len(present) == 2:
            cure = f"uninstall both, then {INSTALL}"
            checks.append(Check(area=name, found=f"{' and '.join(present)} shadow each other", ok=False, cure=cure))
        elif (version := installed[present[0]]).split("+")[0] != tested:
            found = f"{version}, tested with {tested}"
            checks.append(Check(area=present[0], found=found, ok=False, cure=INSTALL))
        else:
            checks.append(Check(area=present[0], found=version))
    return checks


def _imports() -> list[Check]:
    """In a process of their own: a binary mismatch kills the interpreter instead of raising."""
    script = (
        "import torch, fbgemm_gpu, torchrec\n"
        "from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor\n"
        "table = EmbeddingBagConfig(name='t', embedding_dim=4, num_embeddings=8, feature_names=['f'])\n"
        "ids = KeyedJaggedTensor(['f'], torch.tensor([1, 2]), lengths=torch.tensor([2]))\n"
        "assert EmbeddingBagCollection(tables=[table])(ids)['f'].shape == (1, 4)\n"
    )
    return [_runs("torch + fbgemm + torchrec", script, "import together and look up an embedding")]


def _ray() -> list[Check]:
    """Ray starts agents that import more than ray itself; a package they miss shows only as a timeout of ray.init."""
    script = "import ray.data, ray.train\nimport ray.dashboard.modules.aggregator.aggregator_agent\n"
    if _has_modules("aiohttp_cors", "opencensus", "opentelemetry.exporter.prometheus"):
        return [_runs("ray", script, "ray.data, ray.train and Ray's agents import")]
    return [_runs("ray", script.split("\n")[0], "ray.data and ray.train import")]


def _has_modules(*names: str) -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in names)
    except ModuleNotFoundError:
        return False


def _runs(area: str, script: str, promise: str) -> Check:
    done = subprocess.run(  # noqa: S603 (our own interpreter and our own script)
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 0:
        return Check(area=area, found=promise)
    last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
    return Check(area=area, found=last, ok=False, cure=INSTALL)


def _own_packages() -> list[Check]:
    home = Path(__file__).resolve().parents[1]
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    origins = {name: Path(spec.origin).parent if spec and spec.origin else None for name, spec in found.items()}
    return check_origins(origins, home)


def check_origins(origins: Mapping[str, Path | None], home: Path) -> list[Check]:
    """Our five names are plain words, so another package of that name may come first on sys.path."""
    checks = []
    for name, origin in origins.items():
        ok = origin is not None and origin.resolve() == home / name
        cure = f"remove {origin} from sys.path, or run from {home} in an environment of its own"
        if origin is None:
            cure = f"install it: pip install -e {home}"
        checks.append(Check(area=f"package {name}", found=str(origin or "not found"), ok=ok, cure="" if ok else cure))
    return checks


def _cpu() -> list[Check]:
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "flags :")
        flags = set(line.split(":", 1)[1].split())
    has = [label for flag, label in CPU_FLAGS.items() if flag in flags] or ["none of AVX-512 and AMX"]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Check(area="cpu", found=f"{usable} usable of {os.cpu_count()}; {', '.join(has)}")]


def _gpu() -> list[Check]:
    driver = ""
    if (tool := shutil.which("nvidia-smi")) is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
        driver = "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""
    import torch

    return [check_gpu(driver, torch.version.cuda, torch.cuda.is_available())]


def check_gpu(driver: str, built_for: str | None, available: bool) -> Check:
    """The driver's GPU against what torch was built for. No GPU is fine; a GPU that torch cannot reach is not."""
    if available:
        return Check(area="gpu", found=f"{driver}, torch built for CUDA {built_for}")
    if not driver:
        return Check(area="gpu", found="none; training and serving run on the CPU")
    if built_for is None:
        cure = "to use the GPU: pip install -r requirements/gpu.txt"
        return Check(area="gpu", found=f"{driver}, but torch is the CPU build", ok=False, cure=cure)
    cure = f"update the driver to one that serves CUDA {built_for}, and check CUDA_VISIBLE_DEVICES"
    return Check(area="gpu", found=f"{driver}, but torch cannot reach it", ok=False, cure=cure)


def _memory() -> list[Check]:
    """What this process may use: the machine's memory, or less where a container says so."""
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    limit, used = _cgroup("memory.max", "limit_in_bytes"), _cgroup("memory.current", "usage_in_bytes")
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    cure = "close other programs, or raise the container's memory limit"
    return [_enough("memory", free, MIN_MEMORY_GIB, f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB", cure)]


def _meminfo(name: str) -> int:
    """Bytes of an entry of /proc/meminfo, which counts in KiB."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _cgroup(v2_name: str, v1_name: str) -> int | None:
    for file in (Path("/sys/fs/cgroup") / v2_name, Path("/sys/fs/cgroup/memory") / f"memory.{v1_name}"):
        if file.exists() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return None


def _disk() -> list[Check]:
    cure = "free some space, or run from another disk"
    places = dict.fromkeys([Path.cwd(), Path(tempfile.gettempdir())])
    free = {place: shutil.disk_usage(place).free for place in places}
    return [_enough(f"disk at {at}", n, MIN_DISK_GIB, f"{n / GIB:.1f} GiB free", cure) for at, n in free.items()]


def _shared_memory() -> list[Check]:
    """Ray's object store lives there; without it Ray falls back to files in its temporary folder."""
    if not SHM.exists():
        return [Check(area=str(SHM), found="absent; Ray's object store falls back to files and is slower")]
    free = shutil.disk_usage(SHM).free
    cure = "give the container more: docker run --shm-size=2g (Ray's object store lives there)"
    return [_enough(str(SHM), free, MIN_SHM_GIB, f"{free / GIB:.1f} GiB free", cure)]


def _enough(area: str, free: float, wanted_gib: float, found: str, cure: str) -> Check:
    if free >= wanted_gib * GIB:
        return Check(area=area, found=found)
    return Check(area=area, found=f"{found}, {wanted_gib} GiB are needed", ok=False, cure=cure)
