"""The `pyinfer` command, one module per subcommand, each with `HELP`, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations
