"""Write the record of a compute-sanitizer run, fit for tests/gpu_results/: for each tool its errors, the tests it watched, and how long it took.

python tools/gpu/record_sanitizer.py --out DIR TOOL…     reads DIR/sanitizer_TOOL.{log,xml,status}, writes DIR/<gpu>_<date>_sanitizer.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from record import read_junit  # noqa: E402

from benchmarks import machine  # noqa: E402 - the checkout need not be installed

# "ERROR SUMMARY: 3 errors" (memcheck, synccheck, initcheck); "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)". One for each process.
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")  # fmt: skip
_KERNEL = re.compile(r"========= +(?:at|by|in) .*?(\w+_sm\d+\w*|\w+_kernel\w*)")


def read_tool(folder: Path, tool: str) -> dict[str, Any]:
    """What a tool found. `errors` is None if it never came to a summary: it did not run, or was cut off."""
    log, status = folder / f"sanitizer_{tool}.log", folder / f"sanitizer_{tool}.status"
    text = log.read_text(errors="replace") if log.exists() else ""
    found = _SUMMARY.findall(text)
    code, seconds = (int(x) for x in status.read_text().split()) if status.exists() else (None, None)
    tests = read_junit(folder / f"sanitizer_{tool}.xml")
    entry: dict[str, Any] = {
        "errors": sum(int(a or b) for a, b, _ in found) if found else None,
        "warnings": sum(int(c or 0) for _, _, c in found),
        "exit_code": code,
        "seconds": seconds,
        "complete": bool(found) and tests["complete"] and code not in (None, 124, 137),
        "tests": tests["totals"],
        "failures": tests["failures"],
    }
    kernels = sorted(set(_KERNEL.findall(text)))
    if kernels:
        entry["kernels"] = kernels
    if not found and text:
        entry["problem"] = text.strip().splitlines()[-1][:300]
    return entry


def main(argv: list[str] | None = None) -> int:
    """Write the record, print a line a tool; 0 if every tool finished and found nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--args", default="", help="pytest arguments: what the tools watched")
    args = parser.parse_args(argv)
    now = datetime.datetime.now(datetime.timezone.utc)
    tools = {tool: read_tool(args.out, tool) for tool in args.tools}
    record = {
        "schema": 1,
        "kind": "sanitizer",
        "name": "sanitizer",
        "date": now.isoformat(timespec="seconds"),
        "command": f"compute-sanitizer, pytest --device cuda {args.args}".strip(),
        "commit": machine.commit(),
        "sources_sha256": machine.sources_digest(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "tools": tools,
    }
    path = args.out / f"{machine.short_gpu_name()}_{now:%Y-%m-%d}_sanitizer.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for tool, found in tools.items():
        tests = ", ".join(f"{n} {k}" for k, n in sorted(found["tests"].items())) or "no tests"
        end = "" if found["complete"] else f"; INCOMPLETE {found.get('problem', '')}"
        print(
            f"{tool}: {found['errors']} errors, {found['warnings']} warnings; {tests}; exit {found['exit_code']} in {found['seconds']} s{end}"
        )
    return 0 if all(found["complete"] and not found["errors"] for found in tools.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
