"""Print versions, GPUs, architectures, the cache and the environment variables that pyinfer reads."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

HELP = "versions, GPU, architecture, cache"

_PACKAGES = (
    *("numpy", "numba", "llvmlite", "jinja2", "ml_dtypes", "torch"),
    *("cupy-cuda12x", "cupy-cuda13x", "cupy", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"),
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH",
    "XDG_CACHE_HOME",
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="machine-readable")


def package_versions() -> dict[str, str]:
    """Installed versions by distribution name, read from metadata: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def driver_version() -> str | None:
    """The newest CUDA version the installed driver supports ('13.0'), or None without a driver."""
    import ctypes

    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def gpus() -> list[dict[str, Any]]:
    """What CuPy sees; empty without CuPy, driver or device."""
    from pyinfer.core.device import arch_of, cuda_available, device_info

    if not cuda_available():
        return []
    import cupy

    found = []
    for i in range(cupy.cuda.runtime.getDeviceCount()):
        info = device_info(i)
        with cupy.cuda.Device(i):
            free, total = cupy.cuda.runtime.memGetInfo()
        try:
            arch = arch_of(i)
        except ValueError as error:  # PYINFER_CUDA_ARCH_LIST has nothing for it
            arch = str(error)
        found.append(
            {
                "index": i,
                "name": info.name,
                "capability": f"{info.capability // 10}.{info.capability % 10}",
                "multiprocessors": info.num_sms,
                "memory_bytes": total,
                "free_bytes": free,
                "builds_for": arch,
            }
        )
    return found


def nvrtc_version() -> str:
    """NVRTC's version, or why there is none."""
    from pyinfer.jit import compiler

    try:
        return compiler.nvrtc_version()
    except compiler.JitError as error:
        return f"none ({error})"


def collect() -> dict[str, Any]:
    """Everything the command prints."""
    import pyinfer
    from pyinfer.cpu import threads
    from pyinfer.jit import cache, env

    entries = cache.entries()
    bases = []
    for base in env.cache_bases():
        own = [e for e in entries if base in e.path.parents]
        bases.append(
            {"path": str(base), "exists": base.is_dir(), "kernels": len(own), "bytes": sum(e.size for e in own)}
        )
    return {
        "pyinfer": pyinfer.__version__,
        "location": os.path.dirname(pyinfer.__file__),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpu_threads": threads.get_num_threads(),
        "packages": package_versions(),
        "cuda_driver": driver_version(),
        "nvrtc": nvrtc_version(),
        "gpus": gpus(),
        "arch_list": env.arch_list(),
        "ahead_of_time_archs": list(env.arch_list() or env.NATIVE_ARCHS),
        "cache": bases,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYINFER_") or k in _VARIABLES},
    }


def run(args: argparse.Namespace) -> int:
    """Print the configuration."""
    from pyinfer._cli.text import human_bytes, plural

    c = collect()
    if args.json:
        print(json.dumps(c, indent=2))
        return 0
    rows = [
        ("pyinfer", f"{c['pyinfer']} ({c['location']})"),
        ("Python", c["python"]),
        ("platform", c["platform"]),
        ("CPU threads", c["cpu_threads"]),
        *c["packages"].items(),
        ("CUDA driver", f"supports CUDA {c['cuda_driver']}" if c["cuda_driver"] else "none"),
        ("NVRTC", c["nvrtc"]),
    ]
    for g in c["gpus"]:
        memory = f"{human_bytes(g['free_bytes'])} of {human_bytes(g['memory_bytes'])} free"
        text = f"{g['name']}, compute capability {g['capability']}, {g['multiprocessors']} SMs, {memory}; builds for {g['builds_for']}"
        rows.append((f"GPU {g['index']}", text))
    if not c["gpus"]:
        rows.append(("GPU", "none: CUDA kernels can be built here, not run; `pyinfer doctor` says more"))
    rows.append(("builds ahead for", " ".join(c["ahead_of_time_archs"])))
    for i, base in enumerate(c["cache"]):
        state = (
            f"{plural(base['kernels'], 'kernel')}, {human_bytes(base['bytes'])}" if base["exists"] else "not there yet"
        )
        rows.append(("cache" if i == 0 else "  else", f"{base['path']} ({state})"))
    rows += c["environment"].items()
    width = max(len(str(k)) for k, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    return 0
