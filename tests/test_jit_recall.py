"""A kernel on disk is found without rendering its template; what the note says is never believed over the sources."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from pyinfer.jit import cache, compiler, env
from pyinfer.jit.norm import gen_norm_module

pytestmark = pytest.mark.compile
ARCH = "90a"


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A shipped kernel, built once into a cache of the test's own; this process has forgotten it."""
    monkeypatch.setattr(env, "cache_bases", lambda: [tmp_path])
    compiler.forget()
    spec = gen_norm_module().specs[0]
    assert not spec.build(ARCH).cached
    compiler.forget()
    yield spec
    compiler.forget()


def notes(tmp_path):
    return list(tmp_path.glob("*/*/recall/*.key"))


def refuse(*_):
    raise AssertionError("rendered")


def test_found_without_rendering(spec, tmp_path, monkeypatch):
    assert len(notes(tmp_path)) == 1
    monkeypatch.setattr(compiler, "render", refuse)
    assert spec.build(ARCH).cached
    assert spec.build(ARCH) is spec.build(ARCH)


def test_a_process_that_hits_needs_no_jinja(spec, tmp_path):
    code = (
        "import sys\nfrom pyinfer.jit.norm import gen_norm_module\n"
        f"print(gen_norm_module().specs[0].build({ARCH!r}).cached, 'jinja2' in sys.modules)"
    )
    environment = {**os.environ, "PYINFER_WORKSPACE_BASE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=60)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_an_edit_of_any_source_renders_again(spec, monkeypatch):
    names, digest = compiler._shipped_sources()
    monkeypatch.setattr(compiler, "_shipped_sources", functools.cache(lambda: (names, digest[::-1])))
    compiler._quick_key.cache_clear()
    rendered = []
    original = compiler.render
    monkeypatch.setattr(compiler, "render", lambda *a: rendered.append(a) or original(*a))
    assert spec.build(ARCH).cached and rendered  # the same kernel after all: the full key decides
    compiler._quick_key.cache_clear()


@pytest.mark.parametrize("damage", ["note", "entry", "entry gone", "note of another kernel"])
def test_damage_costs_a_build_at_most(spec, tmp_path, damage):
    (note,) = notes(tmp_path)
    (entry,) = tmp_path.glob("*/*/cached_ops/*.kernel")
    if damage == "note":
        note.write_text("x" * 64)
    elif damage == "note of another kernel":
        note.write_text(cache.digest("something else"))
    elif damage == "entry":
        entry.write_bytes(entry.read_bytes()[:-5])
    else:
        entry.unlink()
    artifact = spec.build(ARCH)
    assert artifact.key == compiler.cache_key(spec, ARCH) and artifact.cached == damage.startswith("note")


def test_every_source_counts():
    names, _ = compiler._shipped_sources()
    assert {"norm/rmsnorm.cu.jinja", "common/types.cuh"} <= names
    folder = compiler.files("pyinfer.cuda_src")
    there = {
        p.relative_to(str(folder)).as_posix()
        for p in __import__("pathlib").Path(str(folder)).rglob("*")
        if p.suffix in (".cuh", ".jinja")
    }
    assert names == there


def test_prune_removes_notes(spec, tmp_path):
    cache.prune()
    assert not notes(tmp_path)
