"""The package list in pyproject.toml equals the tree, and the wheel holds exactly what it should."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyinfer

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
# Folder in the repository -> package.
TREES = {"pyinfer": "pyinfer", "schedulers": "pyinfer.schedulers", "cuda_src": "pyinfer.cuda_src"}


def _config() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _packages_in_tree() -> set[str]:
    found = set()
    for folder, package in TREES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    return found


def _files_to_ship() -> set[str]:
    """Every file of the three trees, by its path in the wheel."""
    found = set()
    for folder, package in TREES.items():
        for pattern in ("*.py", "*.cuh", "*.cu.jinja", "py.typed"):
            for path in (ROOT / folder).rglob(pattern):
                if "__pycache__" not in path.parts:
                    found.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_package_list_equals_the_tree():
    assert set(_config()["tool"]["setuptools"]["packages"]) == _packages_in_tree()


def test_every_python_file_is_in_a_package():
    """A folder without __init__.py would be left out of the wheel without a word."""
    for folder in ("pyinfer", "schedulers"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_version_is_the_package_s():
    assert _config()["project"]["version"] == pyinfer.__version__


def test_console_script_points_at_a_function():
    module, _, function = _config()["project"]["scripts"]["pyinfer"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_wheel(tmp_path):
    """Builds the wheel from a copy of the tracked sources (setuptools leaves a build folder behind) and looks into it."""
    import shutil

    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for folder in TREES:
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"pyinfer_kernels-{pyinfer.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 5_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    assert package == _files_to_ship()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not any(n.endswith((".so", ".cubin", ".fatbin", ".o")) for n in names)
