"""Write the record of a GPU test run, fit for tests/gpu_results/: what ran where, counts per file and per wrapper, every failure and skip reason.

python tools/gpu/record.py --name native --junit junit_native.xml --out DIR [--arch-list 8.0+PTX] [--exit-code 0] [--seed 1]

Writes DIR/<gpu>_<date>_<name>.json and prints a short summary.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402 - the checkout need not be installed
from tests.oracle_grid import NAMES  # noqa: E402

# What a file tests, where that is one wrapper. The oracle grid's tests name theirs: test_grid[3-paged-float16-…].
WRAPPERS = {
    "tests/test_decode.py": "BatchDecodeWithPagedKVCacheWrapper",
    "tests/test_batch_attention.py": "BatchAttention",
    "tests/test_cascade_wrappers.py": "MultiLevelCascadeAttentionWrapper",
    "tests/test_pod.py": "PODWithPagedKVCacheWrapper",
}
OF_TESTS = {  # by the start of a test's parameters
    **NAMES,
    "prefill": "BatchPrefillWithPagedKVCacheWrapper",
    "variable": "VariableBlockSparseAttentionWrapper",
    "block": "BlockSparseAttentionWrapper",
}


def wrapper_of(file: str, test: str) -> str | None:
    """The operator or wrapper that a test is about, None if it says of none or of several."""
    _, bracket, parameters = test.partition("[")
    words = [word for word in parameters.rstrip("]").replace(" ", "-").split("-") if not word.isdecimal()]
    if bracket and words and words[0] in OF_TESTS and file.startswith("tests/test_"):
        return OF_TESTS[words[0]]
    return WRAPPERS.get(file)


def read_junit(path: Path) -> dict[str, Any]:
    """Counts per test file and wrapper, failures and skip reasons of a JUnit file. `complete` is False if there is none or it is cut off."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {
            "complete": False,
            "problem": f"{type(error).__name__}: {error}",
            "totals": {},
            "files": {},
            "wrappers": {},
            "failures": [],
            "skips": {},
        }
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    totals: collections.Counter[str] = collections.Counter()
    skips: collections.Counter[str] = collections.Counter()
    failures = []
    wrappers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in cases:
        # classname is the module path, with the class behind it if there is one: "tests.test_norm.TestX"
        parts = case.get("classname", "").split(".")
        stem = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
        file = "/".join(parts[: stem + 1]) + ".py"
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                outcome = "failed" if child.tag == "failure" else "errors"
                failures.append(
                    {"test": f"{file}::{case.get('name')}", "message": (child.get("message") or "").strip()[:500]}
                )
            elif child.tag == "skipped":
                outcome = "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
                skips[(child.get("message") or "").strip()[:200]] += 1
        files[file][outcome] += 1
        files[file]["seconds"] += float(case.get("time") or 0)  # type: ignore[assignment] - a Counter adds floats as well
        totals[outcome] += 1
        wrapper = wrapper_of(file, case.get("name", ""))
        if wrapper is not None:
            wrappers[wrapper][outcome] += 1
    return {
        "complete": True,
        "totals": dict(totals),
        "files": {
            name: {k: round(v, 1) if k == "seconds" else v for k, v in counts.items()}
            for name, counts in sorted(files.items())
        },
        "wrappers": {name: dict(counts) for name, counts in sorted(wrappers.items())},
        "failures": failures,
        "skips": dict(skips.most_common()),
    }


def main(argv: list[str] | None = None) -> int:
    """Write the record; returns 0 also for a run with failures (the record says so)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="native, ptx, …")
    parser.add_argument("--junit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch-list", default="", help="PYINFER_CUDA_ARCH_LIST of the run")
    parser.add_argument(
        "--args", default="", help="pytest arguments beyond the device: not empty means a part of the suite"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--exit-code", type=int, default=0)
    args = parser.parse_args(argv)
    result = read_junit(args.junit)
    if args.exit_code in (124, 137):
        result["complete"] = False
        result["problem"] = "timed out"
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "schema": 1,
        "kind": "tests",
        "name": args.name,
        "date": now.isoformat(timespec="seconds"),
        "command": f"{'PYINFER_CUDA_ARCH_LIST=' + args.arch_list + ' ' if args.arch_list else ''}pytest --device cuda {args.args}".strip(),
        "whole_suite": not args.args,
        "seed": args.seed,
        "exit_code": args.exit_code,
        "commit": machine.commit(),
        "sources_sha256": machine.sources_digest(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        **result,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{machine.short_gpu_name()}_{now:%Y-%m-%d}_{args.name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    totals = ", ".join(f"{n} {k}" for k, n in sorted(record["totals"].items())) or "nothing"
    print(
        f"record {path.name}: {totals}, exit code {args.exit_code}{'' if record['complete'] else ', INCOMPLETE: ' + record['problem']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
