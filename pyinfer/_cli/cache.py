"""Look after the cache of compiled CUDA kernels.

ls      list the entries of every cache folder
verify  check every entry's digest; set damaged ones aside (they are built again when next needed)
prune   delete entries: by default those of other pyinfer versions, and leftovers

The CPU kernels' machine code is Numba's and lies in NUMBA_CACHE_DIR, or beside the package.
"""

from __future__ import annotations

import argparse
import json
import time

HELP = "list, verify or prune the kernel cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="list entries")
    ls.add_argument("--match", metavar="GLOB", default="*", help="only kernels whose name matches")
    ls.add_argument("--json", action="store_true", help="machine-readable")
    verify = actions.add_parser("verify", help="check every entry's digest")
    verify.add_argument("--dry-run", action="store_true", help="leave damaged entries where they are")
    prune = actions.add_parser("prune", help="delete entries")
    prune.add_argument("--all", action="store_true", help="delete everything, this version's kernels too")
    prune.add_argument(
        "--older-than", type=float, metavar="DAYS", help="delete what was written longer ago, whatever its version"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    return {"ls": _ls, "verify": _verify, "prune": _prune}[args.action](args)


def _ls(args: argparse.Namespace) -> int:
    from fnmatch import fnmatchcase

    from pyinfer._cli.text import human_bytes, plural, table
    from pyinfer.jit import cache, env

    entries = [e for e in cache.entries() if fnmatchcase(e.name, args.match)]
    if args.json:
        fields = ("name", "arch", "key", "size", "modified")
        print(json.dumps([{"path": str(e.path), **{f: getattr(e, f) for f in fields}} for e in entries], indent=2))
        return 0
    if entries:
        rows = [
            (
                e.name,
                e.arch,
                e.path.parents[2].name,
                human_bytes(e.size),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(e.modified)),
                e.key[:12],
            )
            for e in entries
        ]
        print(table(rows, ("kernel", "arch", "version", "size", "written", "key"), "lllr"))
    where = ", ".join(str(b) for b in env.cache_bases() if b.is_dir()) or f"{env.cache_bases()[0]} (not there yet)"
    print(f"{plural(len(entries), 'kernel')}, {human_bytes(sum(e.size for e in entries))}, in {where}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pyinfer._cli.text import plural
    from pyinfer.jit import cache

    good, bad = cache.verify(quarantine=not args.dry_run)
    for entry in bad:
        print(f"damaged: {entry.path}{'' if args.dry_run else ' (set aside)'}")
    print(f"{plural(len(good), 'kernel')} intact, {len(bad)} damaged")
    return 1 if bad else 0


def _prune(args: argparse.Namespace) -> int:
    from pyinfer._cli.text import human_bytes, plural
    from pyinfer.jit import cache

    if args.older_than is not None:
        count, freed = cache.prune(older_than=86400 * args.older_than)
    else:
        count, freed = cache.prune(keep_current_version=not args.all)
    print(f"deleted {plural(count, 'file')}, {human_bytes(freed)} freed")
    return 0
