"""`python -m benchmarks SUITE … [--peers …] [--out FILE.json|FOLDER]`: see benchmarks/results/README.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import Context, fail_early
from benchmarks.suites import NAMES


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pyinfer and its peers. One line a case and implementation; results as JSON.",
    )
    parser.add_argument(
        "suites",
        nargs="+",
        metavar="SUITE",
        choices=(*NAMES, "all"),
        help=", ".join(NAMES) + ", or all (those of the device)",
    )
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=peers.NAMES, metavar="PEER", help="of " + ", ".join(peers.NAMES)
    )
    parser.add_argument("--out", type=Path, help="result file (.json), or a folder to name it in")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="only cases whose 'op spec' matches, e.g. '*b64*'")
    parser.add_argument(
        "--quick", action="store_true", help="few samples, few cases: shows that everything runs, not how fast"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the suites; 1 if any of ours failed or was wrong."""
    arguments = parse(argv)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail_early("--device cuda: torch finds no GPU here")
    chosen = list(dict.fromkeys(NAMES if "all" in arguments.suites else arguments.suites))
    modules = {name: importlib.import_module(f"benchmarks.suites.{name}") for name in chosen}
    if "all" in arguments.suites:
        modules = {name: module for name, module in modules.items() if device in module.DEVICES}
    for name, module in modules.items():
        if device not in module.DEVICES:
            fail_early(f"suite {name} runs on {' and '.join(module.DEVICES)} only: give --device {module.DEVICES[0]}")
    command = "python -m benchmarks " + " ".join(sys.argv[1:] if argv is None else argv)
    ctx = Context(device, arguments.peers, arguments.cases, arguments.quick, arguments.out, command, list(modules))
    for name in arguments.peers:
        print(f"peer {name}: {peers.version(name)}")
    begin = time.perf_counter()
    for name, module in modules.items():
        ctx.begin(name)
        module.run(ctx)
    problems = ctx.problems()
    if problems:
        print("\nnot measured:")
        for text, cases in problems.items():
            print(f"  {text}  [{len(cases)} case{'s' if len(cases) > 1 else ''}, e.g. {cases[0]}]")
    path = ctx.write()
    print(
        f"\n{sum(len(s['cases']) for s in ctx.suites.values())} cases in {time.perf_counter() - begin:.0f} s"
        + (f", written to {path}" if path else "")
    )
    return int(any(text.startswith("pyinfer") for text in problems))


if __name__ == "__main__":
    sys.exit(main())
