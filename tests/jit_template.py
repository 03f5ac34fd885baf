"""A kernel of a few lines for the tests of rendering, compiling and caching; shipped nowhere. Subprocesses of those tests import this module too."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyinfer.core.params import ParamStruct, i32, ptr
from pyinfer.jit import compiler
from pyinfer.jit.spec import JitSpec

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "test/tiny.cu.jinja"
HEADER = "test/tiny.cuh"
SOURCES = {
    TEMPLATE: '#include "test/tiny.cuh"\n'
    "{{ params }}\n"
    'extern "C" __global__ void {{ kernel_name }}(const __grid_constant__ Params p) {\n'
    "    if (threadIdx.x < p.n) p.out[threadIdx.x] = OFFSET + {{ value }};\n"
    "}\n",
    HEADER: "#pragma once\nusing int32_t = int;\nconstexpr int OFFSET = 7;\n",
}
PARAMS = ParamStruct("Tiny", ptr("out", "int32_t"), i32("n"))


def tiny(value: int = 1, **fields: Any) -> JitSpec:
    """A spec of the tiny kernel; another value is another key."""
    return JitSpec(f"tiny_{value}", TEMPLATE, PARAMS, (("value", value),), **fields)


def reader(extra: dict[str, str] | None = None) -> Callable[[str], str]:
    """A `compiler.read_source` that knows the test's files too. `extra` may change between calls, after `compiler.forget()`."""
    original = compiler.read_source
    sources = SOURCES if extra is None else extra
    return functools.cache(lambda name: sources[name] if name in sources else original(name))


def count_compiles(log: Path, seconds: float = 0.0) -> Callable[..., Any]:
    """A `compiler.compile_source` that appends a line to a file for every call (O_APPEND: processes do not overwrite each other) and takes `seconds` longer."""
    original = compiler.compile_source

    def compile_source(*args: Any) -> Any:
        with open(log, "ab", buffering=0) as file:
            file.write(f"{os.getpid()}\n".encode())
        time.sleep(seconds)
        return original(*args)

    return compile_source


def start(code: str, *, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Run Python code in a process of its own, in which `tiny` works. The code finds this module as `t` and `pyinfer.jit`'s as `compiler`, `cache`, `env`."""
    prelude = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "import tests.jit_template as t\nfrom pyinfer.jit import cache, compiler, env\ncompiler.read_source = t.reader()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """Wait for a process of `start` and give its output; fails with its traceback."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def wait_for(path: Path, timeout: float = 30) -> None:
    """Wait until a file is there: how a subprocess says where it is."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.005)
