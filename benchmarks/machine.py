"""What a measurement has to name to be read later: machine, driver, versions, commit, digest of the sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_DISTRIBUTIONS = ("pyinfer-kernels", "numpy", "numba", "torch", "triton", "ml_dtypes", "jinja2")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def commit() -> str:
    """The commit of this checkout, with '+' behind it if tracked files differ.

    The GPU machine, whose copy has no .git or that of another commit, takes it from .peers/COMMIT, which tools/gpu/stamp.sh writes; it is known by $PEERS
    (tools/gpu/common.sh). 'unknown' if there is neither.
    """
    stamp = Path(os.environ.get("PEERS", "/nowhere")) / "COMMIT"
    head = "" if stamp.exists() else _output("git", "rev-parse", "HEAD")
    if head:
        return head + ("+" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")
    for path in (stamp, ROOT / ".peers" / "COMMIT"):
        if path.exists():
            lines = path.read_text().split()
            return lines[0] + ("+" if "dirty" in lines else "")
    return "unknown"


@functools.cache
def sources_digest() -> str:
    """sha256 over the names and bytes of pyinfer/, schedulers/ and cuda_src/: what was measured, whatever the commit says."""
    digest = hashlib.sha256()
    for folder in ("pyinfer", "schedulers", "cuda_src"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cuh", ".jinja") and path.is_file():
                data = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


@functools.cache
def describe() -> dict[str, Any]:
    """CPU, cores, memory, system; GPU, its driver and memory if there is one (never a serial number or a host name)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    line = _output(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
        "--format=csv,noheader,nounits",
        "--id=0",
    )
    if line:
        name, driver, memory, clock, power = (part.strip() for part in line.split(",")[:5])
        result |= {
            "gpu": name,
            "driver": driver,
            "gpu_memory_mib": memory,
            "gpu_max_sm_mhz": clock,
            "gpu_power_limit_w": power,
        }
    return result


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of everything measured or measured with, and of CUDA, NVRTC and the driver's CUDA."""
    found = {"python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, "cupy-cuda12x", "cupy-cuda13x"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "pyinfer-kernels" not in found:
        try:
            import pyinfer

            found["pyinfer-kernels"] = pyinfer.__version__
        except ImportError:
            pass
    try:
        import torch

        found["torch CUDA"] = str(torch.version.cuda)
    except ImportError:
        pass
    try:
        import cupy.cuda

        found["NVRTC"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        found["driver CUDA"] = str(cupy.cuda.runtime.driverGetVersion())
    except Exception:  # no CuPy, or no driver: said by the absence
        pass
    return found


def short_gpu_name() -> str:
    """'h200' for 'NVIDIA H200'; 'cpu' without a GPU. Names result files."""
    name = describe().get("gpu", "cpu").lower()
    name = re.sub(r"^(nvidia|amd|intel)\s+", "", name)
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


if __name__ == "__main__":
    import json

    json.dump(
        {"commit": commit(), "sources_sha256": sources_digest(), "machine": describe(), "versions": versions()},
        sys.stdout,
        indent=1,
    )
