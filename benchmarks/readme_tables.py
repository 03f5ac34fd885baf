"""README's benchmark tables from benchmarks/results/*.json.

Between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` in README.md stands what `TABLES[NAME]` makes of the newest
full result that holds its suite, and of older ones for the cases that it lacks (a run of `--cases`; the line under the
table then names all files): the rows of SHOWN, to keep README short. `python -m benchmarks.readme_tables`
rewrites the blocks, `--check` only says (exit status 1) whether one is out of date, `--all` prints every table with
every row.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- bench:(?P<name>[a-z_0-9]+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
NOT_MEASURED = "*Not measured yet.*\n"
# suite → patterns of the 'op spec' that README shows; a suite that is not here shows everything
SHOWN: dict[str, tuple[str, ...]] = {
    "decode": ("decode 32/8 *",),
    "memory_bound": (
        "rmsnorm *",
        "fused_add_rmsnorm *",
        "silu_and_mul *",
        "*quant 16384*",
        "layernorm 1*",
        "apply_rope* 1 *32/8*",
        "apply_rope* 16384 *",
        "append_paged_kv_cache 1* page 16*",
        "rope_*append* 16384 *",
    ),
    "host_cost": (
        "host plan decode*",
        "host plan prefill*",
        "host run decode b64*",
        "host run prefill*",
        "host rmsnorm",
        "host silu_and_mul",
        "host top_p*",
        "host append*",
    ),
    "cold_start": ("cold import", "cold rmsnorm*", "cold *Wrapper*", "cold top_p*", "cold silu*"),
}


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The full benchmark results, newest first."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("kind") == "benchmark" and not document.get("quick"):
            document["file"] = path.name
            documents.append(document)
    return sorted(documents, key=lambda d: (d["date"], d["file"]), reverse=True)


def newest(documents: list[dict[str, Any]], suite: str, device: str) -> dict[str, Any] | None:
    """The newest document with that suite, run on that device, that has a result of ours; cases that only older ones have are added to it."""
    found = [
        d
        for d in documents
        if d["device"] == device and any(_ours(case) for case in d["suites"].get(suite, {}).get("cases", []))
    ]
    if not found:
        return None
    cases: dict[tuple[Any, Any], dict[str, Any]] = {}
    files = []
    for document in found:
        fresh = {_key(c): c for c in document["suites"][suite]["cases"] if _ours(c)}
        if not fresh.keys() <= cases.keys():
            files.append(document["file"])
        cases = {**fresh, **cases}
    every = [_key(c) for d in reversed(found) for c in d["suites"][suite]["cases"]]
    order = {key: place for place, key in reversed(list(enumerate(every)))}  # as the oldest run lists them
    merged = [cases[key] for key in sorted(cases, key=order.__getitem__)]
    first = found[0]
    return {**first, "files": files, "suites": {**first["suites"], suite: {**first["suites"][suite], "cases": merged}}}


def _key(case: dict[str, Any]) -> tuple[Any, Any]:
    return case.get("op"), case.get("spec")


def cases_of(document: dict[str, Any], suite: str) -> list[dict[str, Any]]:
    """The cases with a result of ours that the table shows."""
    patterns = ("*",) if document.get("all") else SHOWN.get(suite, ("*",))
    return [
        c
        for c in document["suites"][suite]["cases"]
        if _ours(c) and any(fnmatch.fnmatchcase(f"{c['op']} {c['spec']}", p) for p in patterns)
    ]


def _ours(case: dict[str, Any]) -> dict[str, Any] | None:
    return next((r for r in case["results"] if r["name"] == "pyinfer" and r["status"] == "ok"), None)


def _best(case: dict[str, Any], peer: str) -> dict[str, Any] | None:
    """The fastest of a peer's variants ("flashinfer": of all its backends)."""
    found = [r for r in case["results"] if r["name"].split()[0] == peer and r["status"] == "ok" and "us" in r]
    return min(found, key=lambda r: r["us"]) if found else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join([" --- ", *[" ---: "] * (len(head) - 1)]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _seconds(us: float) -> str:
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1e3:.0f} ms"


def source(document: dict[str, Any], suite: str) -> str:
    """The line under a table: machine, date, limits of that run, file."""
    machine, limits, versions = document["machine"], document["suites"][suite]["limits"], document["versions"]
    gpu = document["device"] == "cuda"
    where = (
        f"{machine['gpu']}, driver {machine['driver']}, NVRTC {versions.get('NVRTC', '?')}"
        if gpu
        else f"{machine['cpu']}, {machine['cores']} cores"
    )
    peers = ", ".join(
        f"{name} {version}" for name, version in document["peers"].items() if not version.startswith("missing")
    )
    speed = (
        f"copy {limits['copy_tb_s']:.2f} TB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s"
        if gpu
        else f"matmul {limits['matmul_tflop_s'] * 1e3:.0f} GFLOP/s"
    )
    link = ", ".join(f"[{name}](benchmarks/results/{name})" for name in document.get("files", [document["file"]]))
    return (
        f"\n{where}, torch {versions.get('torch', '?')}; {speed} in the same run{'; peers: ' + peers if peers else ''}. "
        f"{document['date'][:10]}, {link}.\n"
    )


def _attention(document: dict[str, Any], suite: str, unit: str, digits: int, peers: list[tuple[str, str]]) -> str:
    """pyinfer's and the peers' rates, and ours over each peer's."""
    cases = cases_of(document, suite)
    present = [(peer, title) for peer, title in peers if any(_best(case, peer) for case in cases)]
    key = {"TB/s": "tb_s", "TFLOP/s": "tflop_s"}[unit]
    rows = []
    for case in cases:
        ours = _ours(case)
        assert ours is not None
        row = [case["spec"], _us(ours["us"]), f"{ours[key]:.{digits}f}", f"{ours['percent_of_limit']:.0f} %"]
        for peer, _ in present:
            best = _best(case, peer)
            row.append(
                f"{best['us'] / ours['us']:.2f}× ({_us(best['us'])} µs{', ' + best['name'].partition(' ')[2] if ' ' in best['name'] else ''})"
                if best
                else "–"
            )
        rows.append(row)
    return _table(
        ["case", "µs", unit, "of the limit", *[f"speed over {title}" for _, title in present]], rows
    ) + source(document, suite)


def decode(document: dict[str, Any]) -> str:
    """Decode: TB/s."""
    return _attention(document, "decode", "TB/s", 2, [("flashinfer", "FlashInfer"), ("fa3", "FlashAttention-3")])


def prefill(document: dict[str, Any]) -> str:
    """Prefill: TFLOP/s."""
    return _attention(
        document,
        "prefill",
        "TFLOP/s",
        0,
        [("flashinfer", "FlashInfer"), ("fa3", "FlashAttention-3"), ("torch", "torch SDPA")],
    )


def mla(document: dict[str, Any]) -> str:
    """Multi-head latent attention: TFLOP/s."""
    return _attention(document, "mla", "TFLOP/s", 0, [("flashmla", "FlashMLA"), ("flashinfer", "FlashInfer")])


def cascade(document: dict[str, Any]) -> str:
    """A shared prefix read once, over the same keys read by every request."""
    rows = []
    for case in cases_of(document, "cascade"):
        ours = _ours(case)
        flat = next((r for r in case["results"] if r["name"] == "pyinfer flat" and r["status"] == "ok"), None)
        if ours and flat:
            rows.append([case["spec"], _us(ours["us"]), _us(flat["us"]), f"{flat['us'] / ours['us']:.1f}×"])
    return _table(["heads, prefix + requests × own tokens", "µs", "flat, µs", "speed over flat"], rows) + source(
        document, "cascade"
    )


def _by_operator(document: dict[str, Any], suite: str) -> str:
    """µs per size, ours over FlashInfer and torch."""
    cases = cases_of(document, suite)
    peers = [
        p
        for p in (
            ("flashinfer", "FlashInfer"),
            ("torch", "torch"),
            ("torch-compile", "torch.compile"),
            ("triton", "Triton"),
        )
        if any(_best(c, p[0]) for c in cases)
    ]
    rows = []
    for case in cases:
        ours = _ours(case)
        assert ours is not None
        bests = [_best(case, peer) for peer, _ in peers]
        ratios = [f"{best['us'] / ours['us']:.2f}×" if best else "–" for best in bests]
        rows.append(
            [
                f"`{case['op']}` {case['spec']}",
                _us(ours["us"]),
                f"{ours['tb_s']:.2f}",
                f"{ours['percent_of_limit']:.0f} %",
                *ratios,
            ]
        )
    return _table(
        ["operator", "µs", "TB/s", "of the copy", *[f"speed over {title}" for _, title in peers]], rows
    ) + source(document, suite)


def sampling(document: dict[str, Any]) -> str:
    """Operators and kinds of rows downwards, batches across: µs, and ours over FlashInfer and torch."""
    cases = cases_of(document, "sampling")
    batches = sorted({case["info"]["batch"] for case in cases})
    rows: dict[str, dict[int, str]] = {}
    for case in cases:
        ours = _ours(case)
        assert ours is not None
        theirs = [_best(case, peer) for peer in ("flashinfer", "torch")]
        ratios = [f"{best['us'] / ours['us']:.2f}×" if best else "–" for best in theirs]
        name = f"`{case['op']}` {case['info']['options']}".strip()
        rows.setdefault(name, {})[case["info"]["batch"]] = f"{_us(ours['us'])} ({', '.join(ratios)})"
    return _table(
        ["µs (speed over FlashInfer, over torch)", *[f"batch {b}" for b in batches]],
        [[name, *[cells.get(b, "–") for b in batches]] for name, cells in rows.items()],
    ) + source(document, "sampling")


def cold_start(document: dict[str, Any]) -> str:
    """First calls: empty cache, disk cache, FlashInfer's build."""
    found: dict[str, dict[str, str]] = {}
    slowest = {"empty cache": 0.0, "disk cache": 0.0}
    for case in document["suites"]["cold_start"]["cases"]:
        ours, cache = _ours(case), case["spec"].rpartition(", ")[2]
        if ours and cache in slowest:
            slowest[cache] = max(slowest[cache], ours["us"])
    for case in cases_of(document, "cold_start"):
        name, _, cache = case["spec"].partition(", ")
        row = found.setdefault(name, {})
        for r in case["results"]:
            if r["status"] == "ok":
                row[f"{r['name']} {cache}".strip()] = _seconds(r["us"])
    with_peer = any(key.startswith("flashinfer") for row in found.values() for key in row)
    rows = []
    for name, row in found.items():
        first, disk = (
            (row.get("pyinfer", "–"), "")
            if name == "import"
            else (row.get("pyinfer empty cache", "–"), row.get("pyinfer disk cache", "–"))
        )
        theirs = [row.get("flashinfer empty cache", row.get("flashinfer", "–"))] if with_peer else []
        rows.append([f"`{name}`", first, disk, *theirs])
    operators = sum(c["spec"].endswith(", empty cache") for c in document["suites"]["cold_start"]["cases"])
    rows.append(
        [
            f"the slowest of {operators} operators",
            _seconds(slowest["empty cache"]),
            _seconds(slowest["disk cache"]),
            *(["–"] if with_peer else []),
        ]
    )
    return _table(
        ["first call of", "empty cache", "from the disk cache", *(["FlashInfer, empty cache"] if with_peer else [])],
        rows,
    ) + source(document, "cold_start")


def host_cost(document: dict[str, Any]) -> str:
    """CPU time per call."""
    rows = []
    for case in cases_of(document, "host_cost"):
        ours, theirs = _ours(case), _best(case, "flashinfer")
        if ours:
            rows.append(
                [
                    case["spec"],
                    _us(ours["us"]),
                    _us(theirs["us"]) if theirs else "–",
                    f"{ours['us'] / theirs['us']:.2f}" if theirs else "–",
                ]
            )
    return _table(["call", "pyinfer, µs", "FlashInfer's best, µs", "ours / theirs"], rows) + source(
        document, "host_cost"
    )


def cpu_attention(document: dict[str, Any]) -> str:
    """The CPU backend against torch."""
    rows = []
    for case in document["suites"]["cpu_attention"]["cases"]:
        ours, theirs = _ours(case), _best(case, "torch")
        if ours:
            rows.append(
                [
                    case["spec"],
                    f"{ours['us'] / 1e3:.1f}",
                    f"{theirs['us'] / 1e3:.1f}" if theirs else "–",
                    f"{theirs['us'] / ours['us']:.2f}×" if theirs else "–",
                ]
            )
    return _table(["case", "pyinfer, ms", "torch's best, ms", "speed over torch"], rows) + source(
        document, "cpu_attention"
    )


def llm(document: dict[str, Any]) -> str:
    """Tokens per second of the example."""
    cases = cases_of(document, "llm")
    rows = [
        [case["spec"], f"{case['info']['prefill_tokens_s']:,.0f}", f"{case['info']['decode_tokens_s']:,.0f}"]
        for case in cases
    ]
    return _table(["examples/llm", "prefill, tokens/s", "decode, tokens/s"], rows) + source(document, "llm")


# block name → (suite, device, table)
TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "decode": ("decode", "cuda", decode),
    "prefill": ("prefill", "cuda", prefill),
    "mla": ("mla", "cuda", mla),
    "cascade": ("cascade", "cuda", cascade),
    "memory_bound": ("memory_bound", "cuda", lambda d: _by_operator(d, "memory_bound")),
    "sampling": ("sampling", "cuda", sampling),
    "cold_start": ("cold_start", "cuda", cold_start),
    "host_cost": ("host_cost", "cuda", host_cost),
    "llm": ("llm", "cuda", llm),
    "cpu_attention": ("cpu_attention", "cpu", cpu_attention),
    "llm_cpu": ("llm", "cpu", llm),
}


def render(readme: str, documents: list[dict[str, Any]]) -> str:
    """README with every block made anew.

    Raises
    ------
    ValueError
        For a block of a name not in TABLES, or an opening marker without its closing one.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"README.md: no table {name!r}; there are {', '.join(TABLES)}")
        suite, device, make = TABLES[name]
        document = newest(documents, suite, device)
        return match[1] + (make(document) if document else NOT_MEASURED) + match[4]

    if len(re.findall(r"<!-- /?bench:", readme)) != 2 * len(_BLOCK.findall(readme)):
        raise ValueError(
            "README.md: a bench marker without its partner: '<!-- bench:NAME -->' on a line of its own, and '<!-- /bench:NAME -->'"
        )
    return _BLOCK.sub(block, readme)


def main(argv: list[str] | None = None) -> int:
    """Rewrite README, or check it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_tables", description="README's benchmark tables from benchmarks/results."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if README is out of date")
    parser.add_argument("--all", action="store_true", help="print every table with every row, change nothing")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.all:
        documents = [{**d, "all": True} for d in load(arguments.results)]
        for name, (suite, device, make) in TABLES.items():
            document = newest(documents, suite, device)
            print(f"## {name}\n\n{make(document) if document else NOT_MEASURED}")
        return 0
    before = arguments.readme.read_text(encoding="utf-8")
    after = render(before, load(arguments.results))
    if before == after:
        print(f"{arguments.readme.name}: {len(_BLOCK.findall(before))} tables, up to date")
        return 0
    if arguments.check:
        print(
            f"{arguments.readme.name}: tables are out of date; run python -m benchmarks.readme_tables", file=sys.stderr
        )
        return 1
    arguments.readme.write_text(after, encoding="utf-8")
    print(f"{arguments.readme.name}: tables written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
