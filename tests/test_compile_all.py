"""Every kernel of every family compiles for every architecture, without a GPU: soon enough, and without spilling.

The table of compile times, registers and shared memory is printed at the end of the run. What the cache holds is not compiled again, its compile time
is remembered with it: a second run takes seconds.

Every specialisation is compiled for every architecture that may launch it: some 2,000 compiles, a quarter of an hour of one CPU. With `PYINFER_COMPILE_ALL=0`
the specialisations take turns: every template for every architecture, every specialisation for at least one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyinfer.jit import FAMILIES, JitSpec, all_specs, compiler, env
from pyinfer.jit.compiler import Artifact
from pyinfer.jit.spec import _num_cpus, flatten

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1500)]

LIMIT = 2.0
"""Seconds of one CPU that a kernel's compile may take (the clock would count the other jobs of a busy machine)."""
TWO_KERNELS = frozenset({"pod"})
"""Families whose kernels hold two others: they may take twice as long."""
HOPPER = frozenset({"attention_sm90", "attention_fp8"})
"""Families for 9.0a alone; their kernels hold several roles, and may take half as long again."""
HOT = frozenset(FAMILIES)
"""Families whose kernels must neither spill nor use a stack frame."""
_ADVISORIES = (
    "C7508",
    "C7510",
    "C7512",
    "C7513",
    "C7515",
)  # setmaxnreg was ignored; wgmma was serialised, for four reasons

_artifacts: dict[tuple[str, str], tuple[JitSpec, Artifact]] = {}


class _Table:
    """A plugin of this run that prints what was compiled."""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        archs = [a for a in env.NATIVE_ARCHS if any(arch == a for _, arch in _artifacts)]
        rows: dict[str, dict[str, tuple[JitSpec, Artifact]]] = {}
        for (name, arch), pair in _artifacts.items():
            rows.setdefault(name, {})[arch] = pair
        width = max(map(len, rows), default=0)
        terminalreporter.section("compile times: CPU seconds / registers / bytes spilled")
        terminalreporter.write_line(f"{'kernel':<{width}} {'smem':>7} " + " ".join(f"{'sm_' + a:>12}" for a in archs))
        for name, row in rows.items():
            spec, first = next(iter(row.values()))
            cells = []
            for arch in archs:
                if arch in row:
                    artifact = row[arch][1]
                    r = artifact.resources
                    cells.append(f"{artifact.cpu_seconds:.2f}/{r.registers}/{r.spill_stores + r.spill_loads}")
                else:
                    cells.append("-")
            terminalreporter.write_line(
                f"{name:<{width}} {spec.smem + first.resources.smem:>7} " + " ".join(f"{c:>12}" for c in cells)
            )
        seconds = sum(a.cpu_seconds for _, a in _artifacts.values())
        terminalreporter.write_line(f"{len(_artifacts)} compiles, {seconds:.0f} s of one CPU")


@pytest.fixture(scope="module", autouse=True)
def table(pytestconfig):
    pytestconfig.pluginmanager.register(_Table())


@functools.cache
def specs_of(family: str, arch: str) -> tuple[JitSpec, ...]:
    """What the family may launch on an architecture: its own list, where configurations depend on it."""
    every = importlib.import_module(f"pyinfer.jit.{family}").all_specs
    number = env.arch_number(arch)
    listed = every((number,)) if "archs" in inspect.signature(every).parameters else every()
    return tuple(dict.fromkeys(s for s in flatten(listed) if s.suits(number)))


def turns(family: str, arch: str) -> list[JitSpec]:
    """What is compiled for an architecture: all, or the first and the last spec of every template, and of the others those whose turn it is."""
    able = specs_of(family, arch)
    if os.environ.get("PYINFER_COMPILE_ALL", "1") != "0":
        return list(able)
    ends = {s.template: s for s in reversed(able)} | {f"{s.template} last": s for s in able}

    def turn(i: int, spec: JitSpec) -> str:
        archs = [a for a in env.NATIVE_ARCHS if spec in specs_of(family, a)]
        return archs[i % len(archs)]

    every = dict.fromkeys(s for a in env.NATIVE_ARCHS for s in specs_of(family, a))
    return [s for i, s in enumerate(every) if s in able and (s in ends.values() or turn(i, s) == arch)]


def compile_seconds(spec: JitSpec, arch: str) -> float:
    """Seconds of one CPU that a compile takes now."""
    source = spec.source(arch)
    headers, options = compiler.included_headers(source), compiler.options_for(spec, arch)
    start = time.thread_time()
    compiler.compile_source(source, f"{spec.name}.cu", headers, options, spec, arch)
    return time.thread_time() - start


@pytest.mark.parametrize("arch", env.NATIVE_ARCHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_compiles(family, arch):
    specs = turns(family, arch)

    def build(spec: JitSpec) -> Artifact | str:
        try:
            artifact = spec.build(arch)
        except Exception as error:
            return str(error)
        _artifacts[spec.name, arch] = (spec, artifact)
        return artifact

    with ThreadPoolExecutor(_num_cpus()) as pool:
        results = list(pool.map(build, specs))
    complaints = [r for r in results if isinstance(r, str)]
    limit = LIMIT * (2 if family in TWO_KERNELS else 1.5 if family in HOPPER else 1)
    for spec, artifact in zip(specs, results, strict=True):
        if isinstance(artifact, str):
            continue
        seconds = artifact.cpu_seconds
        if seconds >= limit:  # other jobs share the caches of this CPU: a second, quieter look
            seconds = min(seconds, compile_seconds(spec, arch))
        if seconds >= limit:
            complaints.append(f"{spec.name}: {seconds:.2f} s to compile, wanted under {limit:g}")
        r = artifact.resources
        if family in HOT and (r.spill_stores or r.spill_loads or r.stack):
            complaints.append(
                f"{spec.name}: {r.spill_stores} + {r.spill_loads} bytes spilled, stack frame of {r.stack} bytes, {r.registers} registers"
            )
        complaints += [f"{spec.name}: ptxas reports {code}" for code in _ADVISORIES if code in artifact.log]
        x, y, z = spec.block
        if r.registers * x * y * z > 65536:
            complaints.append(
                f"{spec.name}: {r.registers} registers times {x * y * z} threads is more than a multiprocessor has"
            )
    assert (specs or family in HOPPER) and not complaints, f"{len(complaints)} complaints for sm_{arch}:\n" + "\n".join(
        complaints
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spec_has_a_turn(family, monkeypatch):
    monkeypatch.setenv("PYINFER_COMPILE_ALL", "0")
    compiled = {s for arch in env.NATIVE_ARCHS for s in turns(family, arch)}
    assert compiled == {s for arch in env.NATIVE_ARCHS for s in specs_of(family, arch)}
    for arch in env.NATIVE_ARCHS:
        templates = {s.template for s in specs_of(family, arch)}
        assert {s.template for s in turns(family, arch)} == templates
        assert bool(templates) == (arch == "90a" or family not in HOPPER)


def test_every_family_has_specs_with_names_of_their_own():
    """Two specs of one name would be one entry in a table and, for a user, one kernel."""
    specs = flatten(all_specs())
    assert len({s.name for s in specs}) == len(specs)


def test_modules_of_the_package_are_families():
    """A family that nobody listed would never be compiled here."""
    import pkgutil

    import pyinfer.jit

    with_specs = set()
    for module in pkgutil.iter_modules(pyinfer.jit.__path__):
        if hasattr(importlib.import_module(f"pyinfer.jit.{module.name}"), "all_specs"):
            with_specs.add(module.name)
    assert with_specs == set(FAMILIES)
