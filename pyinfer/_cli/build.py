"""Compile kernels ahead of time, so that no call waits for the compiler. Needs NVRTC (extra cu12 or cu13), no GPU.

pyinfer build                                   everything, for this machine's GPUs (or, without one, for all supported)
pyinfer build --arch 90a --match 'rmsnorm_*'    one family for Hopper
pyinfer build norm rope                         two families

A container image built this way starts warm: set PYINFER_WORKSPACE_BASE to a folder of the image, when building it and
when running it.
"""

from __future__ import annotations

import argparse
import sys
import time
from fnmatch import fnmatchcase
from typing import Any

HELP = "compile kernels ahead, for any architecture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("what", nargs="*", metavar="WHAT", help="families, kernels or patterns (default: everything)")
    parser.add_argument(
        "--arch", nargs="+", metavar="ARCH", help="e.g. 8.0 90a 8.0+PTX (default: the arch list, this GPU, or all five)"
    )
    parser.add_argument("--match", action="append", metavar="GLOB", help="only kernels whose name matches one of these")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="compile N at a time (default: one per CPU, at most 8)"
    )
    parser.add_argument("--list", action="store_true", help="print what would be built and stop")
    parser.add_argument("--verbose", "-v", action="store_true", help="print time, registers and spills of each kernel")


def run(args: argparse.Namespace) -> int:
    """Build."""
    from pyinfer._cli import select
    from pyinfer._cli.text import Progress, plural, table
    from pyinfer.jit import compiler, env
    from pyinfer.jit.spec import build_jit_specs

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, wanted 1 or more.")
    archs = [env.parse_arch(a) for a in args.arch] if args.arch else env.default_archs()
    chosen: dict[Any, None] = {}
    for pattern in args.what or ["*"]:
        found = select.find(pattern)
        if not found:
            raise ValueError(select.unknown(pattern))
        chosen.update(dict.fromkeys(found))
    specs = [s for s in chosen if not args.match or any(fnmatchcase(s.name, g) for g in args.match)]
    if not specs:
        raise ValueError(
            f"no kernel matches {' or '.join(repr(g) for g in args.match)}. `pyinfer list-modules --specs` prints every name."
        )
    jobs = [(s, a) for s in specs for a in archs if s.suits(env.arch_number(a))]
    if args.list:
        for s, a in jobs:
            print(f"{a:<12}{s}")
        return 0

    bar = Progress(len(jobs), "building")
    done: list[compiler.Artifact] = []

    def progress(_count: int, _total: int, artifact: compiler.Artifact) -> None:
        done.append(artifact)
        bar.update(len(done), f"{artifact.name} ({artifact.arch})")

    start = time.perf_counter()
    failure: Exception | None = None
    try:
        build_jit_specs(specs, archs=archs, threads=args.threads, progress=progress)
    except compiler.JitError as error:
        failure = error
    seconds = time.perf_counter() - start
    compiled = [a for a in done if not a.cached]
    if args.verbose:
        rows = [
            (
                a.name,
                a.arch,
                "cached" if a.cached else f"{a.seconds:.2f} s",
                a.resources.registers,
                a.resources.spill_stores + a.resources.spill_loads,
            )
            for a in sorted(done, key=lambda a: -a.seconds)
        ]
        print(table(rows, ("kernel", "arch", "compile", "registers", "spilled bytes"), "llrrr"))
    spilling = sum(a.resources.spill_stores > 0 for a in done)
    print(
        f"{plural(len(compiled), 'kernel')} compiled, {len(done) - len(compiled)} already there, "
        f"{len(jobs) - len(done)} failed, {spilling} with register spills; {seconds:.1f} s, NVRTC {compiler.nvrtc_version()}"
    )
    if failure is not None:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    return 0
