"""List the kernel families, and how many of their specialisations are built for each architecture."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyinfer.jit.spec import JitSpec

HELP = "kernel families and what is built"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--arch", nargs="+", metavar="ARCH", help="look for these (default: the arch list, this GPU, or all five)"
    )
    parser.add_argument("--specs", action="store_true", help="one line for each specialisation")
    parser.add_argument("--match", metavar="GLOB", default="*", help="only kernels whose name matches")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from pyinfer._cli import select
    from pyinfer._cli.text import table
    from pyinfer.jit import cache, compiler, env

    archs = [env.parse_arch(a) for a in args.arch] if args.arch else env.default_archs()
    try:
        compiler.nvrtc_version()
        exact = True
    except compiler.JitError as error:  # the key holds NVRTC's version: without it only names can be compared
        exact = False
        print(f"{error}\nComparing names only: an entry may be of older source.\n")
    on_disk = {(e.name, e.arch) for e in cache.entries()}

    def built(spec: JitSpec, arch: str) -> bool:
        # The look-up by name is free and rules most out; the key costs a rendering.
        return (spec.name, arch) in on_disk and (not exact or spec.is_built(arch))

    def state(specs: list[JitSpec], arch: str) -> str:
        able = [s for s in specs if s.suits(env.arch_number(arch))]
        return f"{sum(built(s, arch) for s in able)}/{len(able)}" if able else "-"

    rows = []
    total = 0
    for family, specs in select.all_specs().items():
        specs = [s for s in specs if fnmatchcase(s.name, args.match)]
        total += len(specs)
        if args.specs:
            rows += [(s.name, s.template, *("built" if state([s], a) == "1/1" else "-" for a in archs)) for s in specs]
        elif specs:
            templates = sorted({s.template for s in specs})
            rows.append((family, ", ".join(templates), *(state(specs, a) for a in archs)))
    titles = ("kernel", "template") if args.specs else ("family", "templates")
    print(table(rows, (*titles, *archs), "ll" if args.specs else "ll" + "r" * len(archs)))
    print(
        f"\n{total} specialisations. `pyinfer build` compiles what is missing; otherwise a kernel is built when it is first called."
    )
    return 0
