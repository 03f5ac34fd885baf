"""`import pyinfer` is cheap and does nothing; every public name resolves."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyinfer

pytestmark = [pytest.mark.smoke, pytest.mark.cpu]

# Run in a fresh interpreter. Audit hooks see what Python does on our behalf: files opened for writing, libraries loaded through
# ctypes (a CUDA context needs libcuda), sockets, processes.
_PROBE = """
import json, os, sys, time
events = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def hook(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        events.append(f"open {args[0]} for writing")
    elif event.startswith(("ctypes.dlopen", "socket.", "subprocess.", "os.system", "os.mkdir", "os.fork", "os.exec")):
        events.append(f"{event} {args}")
before = set(sys.modules)
sys.addaudithook(hook)
start = time.perf_counter()
import pyinfer
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "events": events, "modules": sorted(set(sys.modules) - before)}))
"""


def _import_in_subprocess(folder: Path) -> dict:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYINFER_")}
    env.update(HOME=str(folder), XDG_CACHE_HOME=str(folder / "xdg"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_is_fast(tmp_path):
    assert min(_import_in_subprocess(tmp_path)["seconds"] for _ in range(3)) < 0.3


def test_import_does_nothing(tmp_path):
    seen = _import_in_subprocess(tmp_path)
    assert seen["events"] == []
    assert list(tmp_path.iterdir()) == []
    roots = {name.split(".")[0] for name in seen["modules"]}
    assert not roots & {"torch", "cupy", "cupy_backends", "numba", "llvmlite", "numpy", "ml_dtypes", "jinja2", "cuda"}
    # Not even the parts of the package itself: they are loaded when a name is first used.
    assert [name for name in seen["modules"] if name.startswith("pyinfer")] == ["pyinfer"]


@pytest.mark.parametrize("name", sorted(pyinfer._MODULE_OF))
def test_name_resolves(name):
    value = getattr(pyinfer, name)
    assert callable(value)
    assert value is getattr(importlib.import_module(f"pyinfer.{pyinfer._MODULE_OF[name]}"), name)
    assert value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", pyinfer._SUBMODULES)
def test_submodule_resolves(name):
    assert getattr(pyinfer, name).__name__ == f"pyinfer.{name}"


@pytest.mark.parametrize("family", sorted(pyinfer._FAMILIES))
def test_family_exports_what_it_defines(family):
    """A public function or class that a family module defines is a top-level name, and the other way round."""
    module = importlib.import_module(f"pyinfer.{family}")
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    exported = set(getattr(module, "__all__", defined))
    assert exported == set(pyinfer._FAMILIES[family])


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(pyinfer.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == {name: f"pyinfer.{family}" for name, family in pyinfer._MODULE_OF.items()}


def test_unknown_name():
    with pytest.raises(AttributeError, match="no_such_kernel"):
        pyinfer.no_such_kernel  # noqa: B018 - the look-up is the test
    assert not hasattr(pyinfer, "flash_attention_9000")


def test_dir_lists_names_not_yet_loaded():
    assert {"rmsnorm", "BatchDecodeWithPagedKVCacheWrapper", "jit", "__version__"} <= set(dir(pyinfer))
