"""Samplers over 128,256 tokens: right first, then timed beside FlashInfer and plain torch.

usage: python3 tools/gpu/time_sampling.py [--vocab N] [--batches 1,64,512] [--quick] [--check-only] [--no-peers]

Needs setup.sh, and FlashInfer's sampling module (warm_flashinfer.sh start sampling); without it the table has no FlashInfer column. FlashInfer's top-k
module takes minutes to build and is not used: its top-k+top-p is the joint order, ours is timed in both. torch is sort (or topk) and multinomial.
Times are medians with a cold cache and without launch time (benchmarks/timing.py), variants taking turns. `block` is our kernel of one block a row.
$OUT/sampling.json holds all numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import peers
from benchmarks.timing import CudaTimer
from pyinfer import _sampling, sampling

K, P, M = 40, 0.9, 0.1


def rows(kind: str, batch: int, vocab: int) -> torch.Tensor:
    """float32 probabilities: "peaked" (one token holds most), "natural" (Zipf-Mandelbrot over shuffled ids, as text has it), "flat"."""
    generator = torch.Generator("cuda").manual_seed(batch)
    noise = torch.randn(batch, vocab, device="cuda", generator=generator)
    if kind == "peaked":
        x = 6.0 * noise
    elif kind == "flat":
        x = 0.1 * noise
    else:
        rank = torch.argsort(torch.argsort(noise, dim=-1), dim=-1).float()
        x = -1.1 * torch.log(rank + 2.7) + 0.3 * torch.randn(batch, vocab, device="cuda", generator=generator)
    return torch.softmax(x, -1)


@contextmanager
def cluster(choice: bool | None):
    """All of pyinfer's calls in here take this cluster; None: one block a row."""
    before = _sampling._cluster_of
    _sampling._cluster_of = lambda *_: choice
    try:
        yield
    finally:
        _sampling._cluster_of = before


def fitting(vocab: int) -> tuple[bool, ...]:
    """The cluster kernels that can hold a row."""
    one = _sampling._cluster_of(torch.cuda.current_device(), vocab, 4, 1)
    return () if one is None else (True,) if one else (False, True)


def pick(kept: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """One token by weights."""
    return order.gather(-1, torch.multinomial(kept, 1)).squeeze(-1).int()


def torch_top_p(p: torch.Tensor) -> torch.Tensor:
    """Top-p with sort, as serving code without a kernel library has it."""
    values, order = p.sort(-1, descending=True)
    return pick(torch.where(values.cumsum(-1) - values < P, values, 0.0), order)


def torch_top_k(p: torch.Tensor) -> torch.Tensor:
    """Top-k."""
    return pick(*torch.topk(p, K, dim=-1))


def torch_top_k_top_p(p: torch.Tensor) -> torch.Tensor:
    """Top-k, then top-p on what is left, renormalised."""
    values, order = torch.topk(p, K, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    return pick(torch.where(values.cumsum(-1) - values < P, values, 0.0), order)


def torch_joint(p: torch.Tensor) -> torch.Tensor:
    """Both on the given probabilities."""
    values, order = torch.topk(p, K, dim=-1)
    return pick(torch.where(values.cumsum(-1) - values < P, values, 0.0), order)


def torch_min_p(p: torch.Tensor) -> torch.Tensor:
    """Min-p."""
    kept = torch.where(p >= M * p.amax(-1, keepdim=True), p, 0.0)
    return torch.multinomial(kept, 1).squeeze(-1).int()


Call = Callable[..., Any]
CASES: dict[str, tuple[Call, Call | None, Call]] = {  # ours, FlashInfer's, torch's
    "all": (
        lambda p, **kw: sampling.sampling_from_probs(p, **kw),
        lambda m, p: m.sampling_from_probs(p),
        lambda p: torch.multinomial(p, 1).squeeze(-1).int(),
    ),
    "top_k": (
        lambda p, **kw: sampling.top_k_sampling_from_probs(p, K, **kw),
        lambda m, p: m.top_k_sampling_from_probs(p, K),
        torch_top_k,
    ),
    "top_p": (
        lambda p, **kw: sampling.top_p_sampling_from_probs(p, P, **kw),
        lambda m, p: m.top_p_sampling_from_probs(p, P),
        torch_top_p,
    ),
    "min_p": (
        lambda p, **kw: sampling.min_p_sampling_from_probs(p, M, **kw),
        lambda m, p: m.min_p_sampling_from_probs(p, M),
        torch_min_p,
    ),
    "top_k+top_p joint": (
        lambda p, **kw: sampling.top_k_top_p_sampling_from_probs(p, K, P, filter_apply_order="joint", **kw),
        lambda m, p: m.top_k_top_p_sampling_from_probs(p, K, P, filter_apply_order="joint"),
        torch_joint,
    ),
    "top_k+top_p first": (
        lambda p, **kw: sampling.top_k_top_p_sampling_from_probs(p, K, P, **kw),
        None,
        torch_top_k_top_p,
    ),
}


def check(kind: str, vocab: int) -> int:
    """Every cluster draws what one block draws, from probabilities and logits, and what the CPU backend draws. Returns the number of failures."""
    failures = 0
    p = rows(kind, 24, vocab)
    p[3] = 0
    p[4, vocab // 2] = float("nan")
    p[5] *= 1e-9  # far from normalised
    logits = torch.log(p.clamp_min(1e-38)) * 0.9
    calls: dict[str, Call] = {name: ours for name, (ours, _, _) in CASES.items()}
    calls["logits"] = lambda _, **kw: sampling.sampling_from_logits(logits, **kw)
    calls["logits top_k+top_p"] = lambda _, **kw: sampling.top_k_top_p_sampling_from_logits(logits, 5000, P, **kw)
    calls["half the row"] = lambda p, **kw: sampling.top_k_sampling_from_probs(p[:, 1:-2], vocab // 2, **kw)
    calls["bf16"] = lambda p, **kw: sampling.top_k_top_p_sampling_from_probs(p.bfloat16(), 300, P, **kw)
    calls["greedy"] = lambda p, **kw: sampling.top_k_sampling_from_probs(p, 1, **kw)
    for name, call in calls.items():
        kw = {"seed": 1234567, "offset": 3, "return_valid": True}
        with cluster(None):
            want = [x.cpu() for x in call(p, **kw)]
        for choice in fitting(vocab):
            for attempt in range(3):
                with cluster(choice):
                    got = [x.cpu() for x in call(p, **kw)]
                if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                    failures += 1
                    differing = int((got[0] != want[0]).sum())
                    print(f"WRONG {kind} {name} cluster {choice} run {attempt}: {differing} of 24 ids differ")
    for name, (ours, _, _) in CASES.items():
        if not torch.equal(ours(p[:6], seed=9).cpu(), ours(p[:6].cpu(), seed=9)):
            failures += 1
            print(f"WRONG {kind} {name}: GPU and CPU draw differently")
    return failures


def times(timer: CudaTimer, module: Any, p: torch.Tensor, name: str) -> dict[str, float]:
    """Microseconds of every variant of a case."""
    ours, theirs, plain = CASES[name]

    def one_block() -> Any:
        with cluster(None):
            return ours(p, seed=1)

    runs: dict[str, Callable[[], Any]] = {
        "pyinfer": lambda: ours(p, seed=1),
        "block": one_block,
        "torch": lambda: plain(p),
    }
    if module is not None and theirs is not None:
        runs["flashinfer"] = lambda: theirs(module, p)
    return {key: samples.us for key, samples in zip(runs, timer.measure(list(runs.values())), strict=True)}


def print_result(result: dict[str, Any], vocab: int) -> None:
    """One line of the table."""
    us, batch = result["us"], result["batch"]
    ours = us["pyinfer"]
    cells = " ".join(
        f"{us.get(key, float('nan')):{width}.1f}" for key, width in (("block", 9), ("flashinfer", 10), ("torch", 9))
    )
    ratios = " ".join(f"{key} {us[key] / ours:.2f}x" for key in ("flashinfer", "torch") if key in us)
    print(
        f"{batch:5} {result['rows']:8} {result['filter']:18} {ours:9.1f} {4e-6 * batch * vocab / ours:5.2f} {cells}  {ratios}",
        flush=True,
    )


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--batches", default="1,64,512")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    failures = sum(check(kind, options.vocab) for kind in ("peaked", "natural", "flat"))
    print(f"check: {failures} failures")
    if options.check_only or failures:
        return failures
    module = None
    if not options.no_peers:
        try:
            module = peers.flashinfer("sampling").sampling
        except peers.Missing as error:
            print(f"no FlashInfer: {error}")
    timer = CudaTimer(quick=options.quick)
    timer.seconds = min(timer.seconds, 0.6)
    results = []
    print(
        f"{'batch':>5} {'rows':8} {'filter':18} {'pyinfer':>9} {'TB/s':>5} {'block':>9} {'flashinfer':>10} {'torch':>9}  ratios"
    )
    for batch in map(int, options.batches.split(",")):
        for kind in ("peaked", "natural", "flat"):
            p = rows(kind, batch, options.vocab)
            for name in CASES:
                us = times(timer, module, p, name)
                results.append({"batch": batch, "rows": kind, "filter": name, "us": us})
                print_result(results[-1], options.vocab)
    for peer in ("flashinfer", "torch"):
        ratios = [
            (r["us"][peer] / r["us"]["pyinfer"], r["batch"], r["rows"], r["filter"]) for r in results if peer in r["us"]
        ]
        if ratios:
            print(f"smallest ratio to {peer}:", min(ratios))
    out = Path(os.environ.get("OUT", ".")) / "sampling.json"
    out.write_text(
        json.dumps({"device": torch.cuda.get_device_name(), "vocab": options.vocab, "results": results}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
