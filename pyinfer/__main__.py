"""The `pyinfer` command, also `python -m pyinfer`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "show-config": "config",
    "doctor": "doctor",
    "list-modules": "modules",
    "build": "build",
    "cache": "cache",
    "show": "show",
}


def make_parser() -> argparse.ArgumentParser:
    """The argument parser with every subcommand. Importing the subcommands imports nothing heavy."""
    import pyinfer

    parser = argparse.ArgumentParser(prog="pyinfer", description="LLM-serving kernels that need no compiler.")
    parser.add_argument("--version", action="version", version=f"pyinfer {pyinfer.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, stem in _COMMANDS.items():
        module = importlib.import_module(f"pyinfer._cli.{stem}")
        child = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(child)
        child.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit code: 0 success, 1 something is wrong (a check or a build failed), 2 bad arguments.
    """
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # `pyinfer show rmsnorm | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (
        ValueError,
        RuntimeError,
    ) as error:  # bad arch, no NVRTC, a kernel that does not compile: the message says it all
        print(f"pyinfer {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
