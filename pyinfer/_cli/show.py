"""Print the CUDA source of a kernel as the compiler gets it.

pyinfer show rmsnorm                     by template, public function, family, kernel name or pattern
pyinfer show rmsnorm --arch 90a --resources
pyinfer show 'rmsnorm_*' --list          every specialisation that matches
pyinfer show rmsnorm --headers           with the included headers in front
"""

from __future__ import annotations

import argparse
import sys

HELP = "print a kernel's CUDA source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("op", metavar="OP", help="kernel, pattern, template, family or public function")
    parser.add_argument(
        "--arch",
        default=None,
        metavar="ARCH",
        help="render for this architecture (default: the first of the arch list, this GPU, or 8.0)",
    )
    parser.add_argument("--list", action="store_true", help="print the names that match and stop")
    parser.add_argument("--all", action="store_true", help="print every match instead of the first")
    parser.add_argument("--headers", action="store_true", help="print the included headers of cuda_src too")
    parser.add_argument(
        "--resources", action="store_true", help="compile, and print registers, shared memory and spills at the end"
    )


def run(args: argparse.Namespace) -> int:
    """Print the source."""
    from pyinfer._cli import select
    from pyinfer.jit import compiler, env

    specs = select.find(args.op)
    if not specs:
        raise ValueError(select.unknown(args.op))
    if args.list:
        for spec in specs:
            print(spec)
        return 0
    arch = env.parse_arch(args.arch) if args.arch else env.default_archs()[0]
    able = [s for s in specs if s.suits(env.arch_number(arch))]
    if not able:
        wanted = f"{min(s.min_arch for s in specs)} or newer"
        if env.arch_number(arch) > (most := max(s.max_arch for s in specs)):
            wanted = f"{most}"
        raise ValueError(f"--arch: {args.op} needs {wanted}, got {arch}.")
    if len(specs) > 1 and not args.all:
        print(
            f"{len(specs)} specialisations match; this is {able[0].name}. --list names them, --all prints them.",
            file=sys.stderr,
        )
    for spec in able if args.all else able[:1]:
        source = spec.source(arch)
        if args.headers:
            for name, text in compiler.included_headers(source).items():
                print(f"// ======== {name} ========\n{text}")
        print(source)
        if args.resources:
            r = spec.build(arch).resources
            print(
                f"// {arch}: {r.registers} registers, {r.smem + spec.smem} bytes of shared memory ({spec.smem} dynamic), "
                f"{r.stack} bytes of stack, {r.spill_stores} + {r.spill_loads} bytes spilled"
            )
    return 0
