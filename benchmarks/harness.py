"""Cases, variants, checks, the line format and the result file."""

from __future__ import annotations

import datetime
import fnmatch
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, peers
from benchmarks.timing import CpuTimer, CudaTimer, Samples, measure_limits

SCHEMA = 1
OURS = "pyinfer"
Factory = Callable[[], Any]
METHOD = {
    "cuda": "CUDA events; L2 flushed by reading before each call; launches enqueued ahead of a spinning GPU; variants take turns; "
    "medians; random data",
    "cpu": "wall time of each call; variants take turns; medians; random data",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    op, spec
        What is printed in front: the operator and its shape.
    flops, bytes
        Useful operations, and the fewest bytes read plus written; 0 where it makes no sense.
    tolerance
        Largest relative error (Frobenius norm) of a peer against ours.
    compare
        Instead of the relative error: takes (ours, theirs), returns the error, inf if wrong.
    info
        Anything else worth keeping (batch, lengths, ...).
    """

    op: str
    spec: str
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = 1e-2
    compare: Callable[[Any, Any], float] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.op} {self.spec}"


def relative_error(ours: Any, theirs: Any) -> float:
    """||theirs - ours|| / ||ours||; inf for another shape, NaN or infinity."""
    if isinstance(ours, tuple):
        ours, theirs = ours[0], theirs[0] if isinstance(theirs, tuple) else theirs
    if tuple(ours.shape) != tuple(theirs.shape):
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    error = float((theirs - ours).norm() / ours.norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def floor_us(case: Case, limits: dict[str, float]) -> float:
    """The time below which this machine cannot do the case's operations and bytes."""
    return max(case.flops / (limits["matmul_tflop_s"] * 1e6), case.bytes / (limits["copy_tb_s"] * 1e6))


class Context:
    """What a suite gets: device, peers asked for, the timer, and `measure`, which checks, times, prints and keeps a case."""

    def __init__(
        self,
        device: str,
        wanted: Sequence[str] = (),
        glob: str = "*",
        quick: bool = False,
        out: Path | None = None,
        command: str = "",
        suites: Sequence[str] = (),
    ) -> None:
        self.device, self.wanted, self.glob, self.quick, self.out = device, tuple(wanted), glob, quick, out
        self.timer: CpuTimer | CudaTimer = CudaTimer(quick) if device == "cuda" else CpuTimer(quick)
        self.limits: dict[str, float] = {}
        self.suites: dict[str, dict[str, Any]] = {}
        self._suite = ""
        self._planned = tuple(suites)
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._command = command

    def begin(self, suite: str) -> None:
        """Start a suite: limits are measured anew (clocks and neighbours change), the header printed."""
        self._suite = suite
        self.limits = measure_limits(self.timer, self.quick)
        self.suites[suite] = {"limits": self.limits, "cases": []}
        where = machine.describe()["gpu" if self.device == "cuda" else "cpu"]
        limits = f"copy {self.limits['copy_tb_s']:.3g} TB/s, matmul {self.limits['matmul_tflop_s']:.4g} TFLOP/s"
        print(f"\n{suite}: {limits}, {where}")
        print(header())

    def selected(self, case: Case) -> bool:
        """Whether `--cases` takes this case."""
        return fnmatch.fnmatch(case.id, self.glob)

    def measure(self, case: Case, variants: Iterable[tuple[str, Factory]]) -> dict[str, Any] | None:
        """Build, check against ours, time in turns, print, keep. Variants of peers that were not asked for are left out.

        Parameters
        ----------
        variants
            (name, factory); the first word of a name is the peer. A factory returns a call, or (call, result) where the result to compare is not what the call
            returns. It may raise peers.Missing.
        """
        if not self.selected(case):
            return None
        variants = [(name, factory) for name, factory in variants if _peer(name) in (OURS, *self.wanted)]
        results: list[dict[str, Any]] = []
        ready: list[tuple[dict[str, Any], Callable[[], Any]]] = []
        reference: Any = None
        for name, factory in sorted(variants, key=lambda v: _peer(v[0]) != OURS):
            entry: dict[str, Any] = {"name": name}
            results.append(entry)
            try:
                made = factory()
                run, result = made if isinstance(made, tuple) else (made, made)
                output = result()
                self.timer.synchronize()
                if _peer(name) == OURS:
                    reference = output if reference is None else reference
                if output is not None and reference is not None:
                    error = (case.compare or relative_error)(reference, output)
                    entry["relative_error"] = error if math.isfinite(error) else None
                    if not error <= case.tolerance:
                        entry["status"] = (
                            f"differs: relative error {error:.2e} against {OURS}, allowed {case.tolerance:.0e}; not timed"
                        )
                        continue
                entry["status"] = "ok"
                ready.append((entry, run))
            except peers.Missing as problem:
                entry["status"] = f"missing: {problem}"
            except Exception as problem:  # one variant's failure must not end the run; the record names it
                entry["status"] = (
                    f"error: {type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
                )
                if os.environ.get("PYINFER_BENCH_DEBUG"):
                    traceback.print_exc()
        for peer in self.wanted:
            if all(_peer(r["name"]) != peer for r in results):
                results.append({"name": peer, "status": "missing: has no such operation, or none is written here"})
        if ready:
            for (entry, _), samples in zip(ready, self.timer.measure([run for _, run in ready]), strict=True):
                entry.update(self.figures(case, samples))
        return self.keep(case, results)

    def figures(self, case: Case, samples: Samples) -> dict[str, Any]:
        """A variant's numbers."""
        us = samples.us
        return {
            **asdict(samples),
            "tflop_s": case.flops / us / 1e6 if case.flops else None,
            "tb_s": case.bytes / us / 1e6 if case.bytes else None,
            "percent_of_limit": 100.0 * floor_us(case, self.limits) / us if case.flops or case.bytes else None,
        }

    def keep(self, case: Case, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Work out ratios, print the lines, add to the result file (written after every case: a run that is cut short keeps what it has)."""
        ours = next((r.get("us") for r in results if _peer(r["name"]) == OURS and r["status"] == "ok"), None)
        theirs = {r["name"]: r["us"] for r in results if _peer(r["name"]) != OURS and r["status"] == "ok" and "us" in r}
        for r in results:
            if r["status"] != "ok" or "us" not in r or ours is None:
                continue
            if r["name"] in theirs:
                r["times_peer"] = r["us"] / ours
            elif theirs:
                best = min(theirs, key=theirs.__getitem__)
                r["best_peer"], r["times_peer"] = best, theirs[best] / r["us"]
        for r in results:
            if not r["status"].startswith("missing"):  # those are listed once, at the end of the run
                print(line(case, r), flush=True)
        record = {
            "op": case.op,
            "spec": case.spec,
            "flops": case.flops,
            "bytes": case.bytes,
            **({"info": case.info} if case.info else {}),
            "results": results,
        }
        self.suites[self._suite]["cases"].append(record)
        if self.out is not None:
            self.write()
        return record

    def document(self) -> dict[str, Any]:
        """The result file's content (benchmarks/results/README.md says what is what)."""
        return {
            "schema": SCHEMA,
            "kind": "benchmark",
            "date": self._started.isoformat(timespec="seconds"),
            "command": self._command,
            "device": self.device,
            "quick": self.quick,
            "commit": machine.commit(),
            "sources_sha256": machine.sources_digest(),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "peers": {name: peers.version(name) for name in self.wanted},
            "method": METHOD[self.device],
            "suites": self.suites,
        }

    def write(self) -> Path | None:
        """Write the result file, whole or not at all."""
        if self.out is None:
            return None
        path = self.out
        if path.suffix != ".json":
            name = machine.short_gpu_name() if self.device == "cuda" else "cpu"
            path = path / f"{name}_{self._started:%Y-%m-%d}_{'-'.join(self._planned or self.suites)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        os.replace(temporary, path)
        return path

    def problems(self) -> dict[str, list[str]]:
        """Every result that is not ok: "name: status" → the cases."""
        found: dict[str, list[str]] = {}
        for suite, content in self.suites.items():
            for case in content["cases"]:
                for r in case["results"]:
                    if r["status"] != "ok":
                        found.setdefault(f"{r['name']}: {r['status']}", []).append(
                            f"{suite}: {case['op']} {case['spec']}"
                        )
        return found


def _peer(name: str) -> str:
    return name.split()[0]


_WIDTHS = (62, 10, 8, 7, 6)


def header() -> str:
    """The columns of `line`."""
    return (
        " | ".join(
            f"{text:<{w}}" if i == 0 else f"{text:>{w}}"
            for i, (text, w) in enumerate(zip(("op spec", "µs", "TFLOP/s", "TB/s", "% lim"), _WIDTHS, strict=True))
        )
        + " | × peer"
    )


def line(case: Case, result: dict[str, Any]) -> str:
    """`op spec · who | µs | TFLOP/s | TB/s | % of limit | × peer`; on our line the best peer's time over ours, on a peer's line that peer's time over ours."""
    name = f"{case.id} · {result['name']}"
    if result["status"] != "ok":
        return f"{name:<{_WIDTHS[0]}} | {result['status']}"

    def number(key: str) -> str:
        """About three digits: 1337, 48.2, 2.84, 0.0123."""
        value = result.get(key)
        return "–" if value is None else f"{value:.{0 if value >= 100 else 1}f}" if value >= 10 else f"{value:.3g}"

    ratio = result.get("times_peer")
    last = "–" if ratio is None else f"{ratio:.2f}" + (f" {result['best_peer']}" if "best_peer" in result else "")
    late = f"  ({result['late']} late)" if result.get("late", 0) > result["samples"] else ""
    columns = (f"{result['us']:.1f}", number("tflop_s"), number("tb_s"), number("percent_of_limit"))
    return (
        f"{name:<{_WIDTHS[0]}} | "
        + " | ".join(f"{text:>{w}}" for text, w in zip(columns, _WIDTHS[1:], strict=True))
        + f" | {last}{late}"
    )


def fail_early(text: str) -> None:
    """Say what is wrong and leave."""
    sys.exit(f"benchmarks: {text}")
