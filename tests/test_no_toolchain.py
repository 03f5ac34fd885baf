"""The first kernel build needs no compiler, no shell and no other process: nvcc, gcc and ninja are never asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.compile, pytest.mark.smoke]

_BUILD = """
import json, shutil, sys
processes = []
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")
def hook(event, args):
    # CuPy's cuda-pathfinder asks ctypes for libdl, and CPython's ctypes reads the linker's cache with ldconfig.
    if event in STARTING and "/sbin/ldconfig" not in str(args[0]):
        processes.append(f"{event} {args}")
sys.addaudithook(hook)
import numpy as np
import pyinfer
from pyinfer._cli import select

spec = select.find("rmsnorm")[0]
artifact = spec.build("90a")
x = np.ones((3, 64), np.float32)
out = pyinfer.rmsnorm(x, np.full(64, 2, np.float32))  # the CPU kernel: Numba, LLVM in process
print(json.dumps({
    "tools": [t for t in ("nvcc", "gcc", "cc", "c++", "ninja", "ptxas", "sh") if shutil.which(t)],
    "processes": processes, "cached": artifact.cached, "bytes": len(artifact.code), "elf": artifact.code[:4].hex(),
    "seconds": artifact.seconds, "cpu": float(out[0, 0]),
}))
"""


def test_first_build_with_empty_path(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "PYINFER_", "NV", "CC", "CXX"))}
    env.update(
        PATH="",
        HOME=str(tmp_path),
        TMPDIR=str(tmp_path),
        PYINFER_WORKSPACE_BASE=str(tmp_path / "cache"),
        NUMBA_CACHE_DIR=str(tmp_path / "numba"),
    )
    done = subprocess.run(
        [sys.executable, "-c", _BUILD], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["tools"] == []
    assert seen["processes"] == []
    assert not seen["cached"]
    assert seen["elf"] == b"\x7fELF".hex() and seen["bytes"] > 1000
    assert seen["cpu"] == pytest.approx(2.0, rel=1e-5)
    assert list((tmp_path / "cache").rglob("*.kernel"))


def test_a_cuda_home_of_nonsense_changes_nothing(tmp_path):
    """A broken toolkit on the machine (the usual state of affairs) is not looked at."""
    folders = dict.fromkeys(
        ("PYINFER_WORKSPACE_BASE", "PYINFER_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "TMPDIR"), str(tmp_path)
    )
    env = {**os.environ, **folders, "CUDA_HOME": "/nowhere", "CUDA_PATH": "/nowhere"}
    script = "from pyinfer._cli import select; a = select.find('rmsnorm')[0].build('80'); assert not a.cached; print(len(a.code))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
