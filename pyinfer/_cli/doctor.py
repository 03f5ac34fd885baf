"""Check that pyinfer works here: run one kernel per backend against its reference, say what is wrong and how to fix it.

A machine without an NVIDIA GPU is healthy: CUDA is then checked as far as the compiler. `--device cuda` makes a missing
GPU a failure.
Exit code 0: everything that can work here does. 1: something is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = "check this machine, with one kernel per backend"

OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do about it."""

    status: str
    what: str
    detail: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to check (default: all there is)"
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="print the traceback of a failed check")


def check_packages() -> Iterator[Finding]:
    """The base dependencies import, with their versions."""
    import importlib

    versions = []
    for name in ("numpy", "ml_dtypes", "jinja2", "numba"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # numba refuses NumPy versions it does not know with its own ImportError
            yield Finding(
                FAIL, "packages", f"{name} cannot be imported: {error}", "pip install --upgrade pyinfer-kernels"
            )
            return
        versions.append(f"{name} {getattr(module, '__version__', '?')}")
    yield Finding(OK, "packages", ", ".join(versions))


def check_cache() -> Iterator[Finding]:
    """Some cache folder can be written, the one asked for by preference, and its entries are whole."""
    from pyinfer.jit import cache, env

    bases = env.cache_bases()
    broken = [(base, _write_error(base)) for base in bases]
    writable = [base for base, error in broken if error is None]
    entries = cache.entries()
    if not writable:
        reasons = "; ".join(f"{base}: {error}" for base, error in broken)
        yield Finding(
            FAIL,
            "cache",
            f"no folder can be written ({reasons}): kernels are compiled anew in every process",
            _FIX_CACHE,
        )
    elif writable[0] != bases[0]:
        asked = os.environ.get("PYINFER_WORKSPACE_BASE") or os.environ.get("PYINFER_CACHE_DIR")
        status = FAIL if asked else NOTE
        yield Finding(
            status, "cache", f"{broken[0][0]} cannot be written ({broken[0][1]}); using {writable[0]}", _FIX_CACHE
        )
    else:
        yield Finding(OK, "cache", f"{writable[0]} can be written, {len(entries)} kernels")
    _, bad = cache.verify(quarantine=False)
    if bad:
        yield Finding(
            FAIL,
            "cache",
            f"{len(bad)} damaged entries, e.g. {bad[0].path}",
            "pyinfer cache verify (they are built again when next needed)",
        )


_FIX_CACHE = "set PYINFER_WORKSPACE_BASE to a writable folder"


def _write_error(base: Path) -> str | None:
    """Why nothing can be written below `base`, or None. Leaves nothing behind."""
    folder = base
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent  # creating the rest is the cache's business
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".pyinfer-doctor-") as file:
            file.write(b"\0" * 65536)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_cpu() -> Iterator[Finding]:
    """rmsnorm on the CPU backend against float64 NumPy."""
    import numpy as np

    from pyinfer.cpu import threads

    start = time.perf_counter()
    finding = _rmsnorm(np.asarray, np.asarray, "CPU backend")
    seconds = time.perf_counter() - start
    if finding.status is OK:
        finding = Finding(
            OK, finding.what, f"{finding.detail}, {threads.get_num_threads()} threads, first call {seconds:.1f} s"
        )
    yield finding


def check_nvrtc() -> Iterator[Finding]:
    """CuPy and NVRTC are there, and every header of one kernel compiles."""
    from pyinfer._cli.config import driver_version
    from pyinfer.jit import compiler, env

    driver = driver_version()
    extra = _extra(driver)
    needed = driver is not None
    try:
        import cupy  # noqa: F401 - is it there?
    except Exception as error:
        status = FAIL if needed else NOTE
        yield Finding(status, "CuPy", f"cannot be imported: {error}", f"pip install 'pyinfer-kernels[{extra}]'")
        return
    several = _several_cupys()
    if several:
        yield Finding(
            FAIL,
            "CuPy",
            f"{' and '.join(several)} are installed together and overwrite each other",
            f"pip uninstall {' '.join(several)}; pip install 'pyinfer-kernels[{extra}]'",
        )
    try:
        version = compiler.nvrtc_version()
    except compiler.JitError as error:
        yield Finding(
            FAIL if needed else NOTE,
            "NVRTC",
            str(error).split(" Install them")[0],
            f"pip install 'pyinfer-kernels[{extra}]'",
        )
        return
    from pyinfer._cli import select

    arch = env.default_archs()[0]
    spec = next(s for s in select.find("rmsnorm") if s.suits(env.arch_number(arch)))
    source = spec.source(arch)
    start = time.perf_counter()
    compiler.compile_source(
        source, f"{spec.name}.cu", compiler.included_headers(source), compiler.options_for(spec, arch), spec, arch
    )
    yield Finding(OK, "NVRTC", f"{version} compiled {spec.name} for {arch} in {time.perf_counter() - start:.2f} s")


def check_variants() -> Iterator[Finding]:
    """What compiles attention variants in Python for a GPU is there, and links a function into a kernel. Nothing else needs it."""
    from pyinfer._cli.config import driver_version
    from pyinfer.core.params import ParamStruct, ptr
    from pyinfer.jit import compiler, env, variant_link
    from pyinfer.jit.spec import DeviceFunction, JitSpec

    function = DeviceFunction(
        "pyinfer_square", "def pyinfer_square(x):\n    return _f32(_mul(x, x))\n", ("f32",), "f32"
    )
    spec = JitSpec("pyinfer_doctor", "", ParamStruct("Doctor", ptr("x", "float")), link=(function,))
    source = 'extern "C" __device__ float pyinfer_square(float);\n'
    source += 'extern "C" __global__ void pyinfer_doctor(float* x) { *x = pyinfer_square(*x); }\n'
    arch = env.default_archs()[0]
    start = time.perf_counter()
    try:
        code, _ = compiler.compile_source(source, "pyinfer_doctor.cu", {}, compiler.options_for(spec, arch))
        variant_link.link(spec, code, arch)
    except compiler.JitError as error:
        extra = _extra(driver_version())
        reason = str(error).split("; a Python variant")[0].splitlines()[0]
        yield Finding(NOTE, "variants in Python", reason, f"pip install 'pyinfer-kernels[{extra},variants-{extra}]'")
        return
    took = time.perf_counter() - start
    yield Finding(OK, "variants in Python", f"{variant_link.toolchain()} linked one for {arch} in {took:.2f} s")


def _extra(driver: str | None) -> str:
    """The extra that fits a driver: it must be at least as new as the CUDA version it runs."""
    return "cu13" if driver is not None and int(driver.split(".")[0]) >= 13 else "cu12"


def _several_cupys() -> list[str]:
    from importlib.metadata import distributions

    names = {(d.metadata["Name"] or "").lower() for d in distributions()}
    found = sorted(n for n in names if n == "cupy" or n.startswith(("cupy-cuda", "cupy-rocm")))
    return found if len(found) > 1 else []


def check_gpu(required: bool) -> Iterator[Finding]:
    """A driver, a GPU that is new enough, and rmsnorm on each GPU against float64 NumPy."""
    from pyinfer._cli.config import driver_version, gpus

    driver = driver_version()
    if driver is None:
        if _nvidia_hardware():
            yield Finding(
                FAIL,
                "GPU",
                "an NVIDIA GPU is on the bus, but libcuda.so.1 cannot be used",
                "install the NVIDIA driver; in a container, start it with --gpus all",
            )
        else:
            yield Finding(
                FAIL if required else NOTE,
                "GPU",
                "no NVIDIA driver (libcuda.so.1) here: CUDA kernels can be built, not run",
            )
        return
    try:
        import cupy
    except Exception:
        return  # said by check_nvrtc
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        fix = (
            f"pip install 'pyinfer-kernels[{_extra(driver)}]' (the driver supports CUDA {driver}), or update the driver"
        )
        yield Finding(FAIL, "GPU", f"CuPy {cupy.__version__} finds no usable device: {error}", fix)
        return
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f"CUDA_VISIBLE_DEVICES={visible!r} hides them" if visible is not None else "see nvidia-smi"
        yield Finding(FAIL if required else NOTE, "GPU", f"the driver shows no GPU: {hint}")
        return
    for gpu in gpus():
        name = f"GPU {gpu['index']}"
        if float(gpu["capability"]) < 8.0:
            yield Finding(
                FAIL,
                name,
                f"{gpu['name']} has compute capability {gpu['capability']}",
                "pyinfer needs 8.0 (Ampere) or newer; set CUDA_VISIBLE_DEVICES to another GPU",
            )
            continue
        with cupy.cuda.Device(gpu["index"]):
            start = time.perf_counter()
            finding = _rmsnorm(cupy.asarray, cupy.asnumpy, name)
            seconds = time.perf_counter() - start
        if finding.status is OK:
            finding = Finding(
                OK,
                name,
                f"{gpu['name']}, {gpu['capability']}, driver for CUDA {driver}: {finding.detail}, first call {seconds:.2f} s",
            )
        yield finding


def _nvidia_hardware() -> bool:
    """Whether a display or 3D controller by NVIDIA (PCI vendor 10de, class 03) is on the bus. Linux only."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            if (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith(
                "0x03"
            ):
                return True
        except OSError:
            continue
    return False


def _rmsnorm(to_device: Callable[[Any], Any], to_host: Callable[[Any], Any], what: str) -> Finding:
    """One rmsnorm in fp16 with fresh input, against the formula in float64."""
    import numpy as np

    import pyinfer

    rng = np.random.default_rng()
    x = rng.standard_normal((37, 960)).astype(np.float16)
    w = rng.standard_normal(960).astype(np.float16)
    out = to_device(np.full_like(x, np.nan))
    pyinfer.rmsnorm(to_device(x), to_device(w), 1e-6, out=out)
    got = np.asarray(to_host(out), dtype=np.float64)
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64 * x64).mean(axis=1, keepdims=True) + 1e-6) * w.astype(np.float64)
    error = float(np.max(np.abs(got - want) / np.maximum(np.abs(want), 1e-2)))
    if not error < 2e-3:  # one rounding to fp16 is 5e-4; NaN fails too
        return Finding(
            FAIL,
            what,
            f"rmsnorm is wrong: relative error {error:.1e}",
            "please report it with the output of `pyinfer show-config`",
        )
    return Finding(OK, what, f"rmsnorm agrees with its reference (relative error {error:.0e})")


def _guarded(check: Callable[[], Iterator[Finding]], what: str, verbose: bool) -> Iterator[Finding]:
    """The findings of a check; an exception in it is a finding too."""
    try:
        yield from check()
    except Exception as error:
        if verbose:
            import traceback

            traceback.print_exc()
        yield Finding(
            FAIL,
            what,
            f"{type(error).__name__}: {error}",
            "" if verbose else "`pyinfer doctor --verbose` prints the traceback",
        )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the report."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [("packages", check_packages), ("cache", check_cache)]
    if args.device in ("auto", "cpu"):
        checks.append(("CPU backend", check_cpu))
    if args.device in ("auto", "cuda"):
        checks += [
            ("NVRTC", check_nvrtc),
            ("variants in Python", check_variants),
            ("GPU", lambda: check_gpu(required=args.device == "cuda")),
        ]
    failures = 0
    colours = (
        {OK: "\x1b[32m", NOTE: "\x1b[33m", FAIL: "\x1b[31m"}
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ
        else {}
    )
    for what, check in checks:
        for finding in _guarded(check, what, args.verbose):
            mark = f"{colours.get(finding.status, '')}{finding.status:<4}{chr(27) + '[0m' if colours else ''}"
            print(f"{mark}  {finding.what}: {finding.detail}", flush=True)
            if finding.fix:
                print(f"      → {finding.fix}", flush=True)
            failures += finding.status is FAIL
    print("pyinfer works here." if not failures else f"{failures} of the checks failed.")
    return 1 if failures else 0
