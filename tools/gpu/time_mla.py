"""The sm90 MLA kernel on a Hopper GPU: correctness in stages that say which part is wrong, then times beside the peers.

usage: python tools/gpu/time_mla.py [check] [time] [--quick] [--no-peers] [-v]      (neither word: both)

A kernel that does not end within 10 s (a barrier nobody arrives at) is reported with its case, and the process ends with code 3.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import numpy as np
import torch

from pyinfer.core.device import num_sms
from pyinfer.core.tensor import view
from pyinfer.jit.mla import MlaConfig, candidate_configs, launch_mla, mla_config
from pyinfer.jit.mla_sm90 import MlaSm90Config
from pyinfer.schedulers.plan import build_plan
from pyinfer.schedulers.prefill import EXTRA_SLOTS

SCALE = (128 + 64) ** -0.5
failures = 0


def synchronize(what: str, seconds: float = 10.0) -> None:
    """Wait for the device, but not for ever."""
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            print(f"HANG  {what}: not ended after {seconds:.0f} s", flush=True)
            os._exit(3)
        time.sleep(0.0005)


class Batch:
    """A batch on the GPU: q [tokens, heads, 576], cache [pages, page_size, 576] with NaN behind every request's keys."""

    def __init__(
        self, heads: int, qo: list[int], kv: list[int], page: int, dtype: Any, causal: bool = True, fill: Any = None
    ) -> None:
        self.heads, self.page, self.causal, self.dtype = heads, page, causal, dtype
        pages = [-(-n // page) for n in kv]
        self.qo_indptr = np.concatenate([[0], np.cumsum(qo)]).astype(np.int32)
        self.kv_indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        self.kv_len = np.asarray(kv, np.int32)
        total = int(self.kv_indptr[-1])
        self.indices = torch.randperm(total + 1, device="cuda").int()[:total].contiguous()
        self.q = torch.randn(int(self.qo_indptr[-1]), heads, 576, device="cuda").to(dtype)
        self.cache = torch.randn(total + 1, page, 576, device="cuda", dtype=dtype if fill is None else None).to(dtype)
        if fill is not None:
            self.cache = torch.full((total + 1, page, 576), fill, device="cuda", dtype=dtype)
        if len(kv) < 20:
            for b, n in enumerate(kv):
                if n % page:
                    self.cache[int(self.indices[self.kv_indptr[b + 1] - 1]), n % page :] = math.nan
            unused = set(range(total + 1)) - set(self.indices.tolist())
            for u in unused:
                self.cache[u] = math.nan

    def keys(self, b: int) -> Any:
        """A request's latent rows [kv, 576]."""
        rows = self.cache[self.indices[self.kv_indptr[b] : self.kv_indptr[b + 1]].long()]
        return rows.reshape(-1, 576)[: int(self.kv_len[b])]

    def planned(self, config: Any, slots: int = 0) -> tuple[Callable[[], None], Any, Any, Any]:
        """(run, out, lse, plan). slots: as if the device ran so many work items at a time."""
        plan = build_plan(
            "mla", self.qo_indptr, np.diff(self.qo_indptr).astype(np.int32), self.kv_indptr, self.kv_len, self.indices.cpu().numpy(),
            num_qo_heads=self.heads, num_kv_heads=1, head_dim_qk=576, head_dim_vo=512, page_size=self.page, tile_q=config.tile_q,
            tile_kv=config.tile_kv, num_sms=slots or num_sms(0), ctas_per_sm=config.ctas_per_sm, causal=self.causal, window_left=-1,
            fixed_split_size=None, disable_split_kv=slots < 0, extra_slots=EXTRA_SLOTS, capacity=None, max_page=0,
        )  # fmt: skip
        buffer = torch.from_numpy(plan.pack().copy()).cuda()
        workspace = torch.full((plan.workspace_bytes // 4 + 4,), math.nan, device="cuda")
        out = torch.full((self.q.shape[0], self.heads, 512), math.nan, dtype=self.dtype, device="cuda")
        lse = torch.full((self.q.shape[0], self.heads), math.nan, device="cuda")
        parts = [view(x) for x in (self.q[..., :512], self.q[..., 512:], self.cache[..., :512], self.cache[..., 512:])]
        stream, at = torch.cuda.current_stream().cuda_stream, buffer.data_ptr()
        results = view(out), view(lse)

        def run(_kept: Any = (buffer, workspace)) -> None:
            launch_mla(
                0,
                stream,
                at,
                plan,
                *parts,
                at + 4 * plan.offsets.kv_indices,
                *results,
                workspace.data_ptr(),
                sm_scale=SCALE,
                config=config,
                pdl=True,
            )

        return run, out, lse, plan

    def reference(self) -> tuple[Any, Any]:
        """Output and base-2 LSE in float64."""
        outs, lses = [], []
        for b, n in enumerate(self.kv_len.tolist()):
            q = self.q[self.qo_indptr[b] : self.qo_indptr[b + 1]].double()
            k = self.keys(b).double()
            s = torch.einsum("qhd,kd->qhk", q, k) * SCALE
            if self.causal:
                i = torch.arange(q.shape[0], device="cuda")[:, None, None] + n - q.shape[0]
                s = s.masked_fill(torch.arange(n, device="cuda")[None, None] > i, -math.inf)
            lse = torch.logsumexp(s, -1)
            p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
            outs.append(torch.einsum("qhk,kd->qhd", p, k[:, :512]))
            lses.append(lse * math.log2(math.e))
        return torch.cat(outs), torch.cat(lses)


def report(what: str, ok: bool, text: str, detail: Callable[[], str] = str) -> None:
    """One line; more if it is wrong."""
    global failures
    failures += not ok
    if not ok or "-v" in sys.argv:
        print(f"{'ok   ' if ok else 'WRONG'} {what}: {text}{'' if ok else ' ' + detail()}", flush=True)


def difference(found: Any, wanted: Any) -> float:
    """Largest difference; infinite if not the same elements are finite."""
    finite = torch.isfinite(wanted)
    if not bool((torch.isfinite(found) == finite).all()):
        return math.inf
    return (found[finite].double() - wanted[finite]).abs().max().item() if bool(finite.any()) else 0.0


def bad(found: Any, wanted: Any, limit: float) -> str:
    """Where (token, head[, column]) values differ."""
    wrong = ~((found.double() - wanted).abs() <= limit)
    places = wrong.nonzero()
    if not len(places):
        return "all within the limit"
    at = tuple(places[0].tolist())
    text = f"{len(places)} of {wrong.numel()} wrong, first {places[:4].tolist()}, last {places[-1].tolist()}"
    text += f"; there {found[at].item():.5f} for {wanted[at].item():.5f}"
    if found.ndim == 3:
        columns = wrong.flatten(0, 1).any(0).nonzero().flatten().tolist()
        text += f"; columns {columns[:6]}..{columns[-3:]} ({len(columns)})"
    return text


def compare(what: str, batch: Batch, config: Any, slots: int = 0, again: int = 1) -> None:
    """One batch against float64; `again` further runs must give the same bits."""
    run, out, lse, plan = batch.planned(config, slots)
    run()
    synchronize(what)
    wanted, wanted_lse = batch.reference()
    limit = 6e-3 if batch.dtype == torch.bfloat16 else 1.5e-3
    error = ((out.double() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()
    what += f" [{plan.n_work} items, {plan.num_partials} partials]"
    report(what, error < limit, f"error {error:.2e}", lambda: bad(out, wanted, 0.05))
    worst = difference(lse, wanted_lse)
    report(what, worst < 1e-2, f"lse {worst:.2e}", lambda: bad(lse, wanted_lse, 1e-2))
    first, first_lse = out.clone(), lse.clone()
    for n in range(again):
        out.fill_(math.nan)
        lse.fill_(math.nan)
        run()
        synchronize(what + " again")
        same = bool((out.view(torch.int16) == first.view(torch.int16)).all()) and bool(
            (lse.view(torch.int32) == first_lse.view(torch.int32)).all()
        )
        if not same:
            report(what, False, f"run {n + 2} gives other bits", lambda: bad(out, first.double(), 0.0))
            break


def stages(config: Any, dtype: Any) -> None:
    """One work item; each stage adds one part of the kernel to those that are known to work."""
    name = f"{dtype} {config.tag}".removeprefix("torch.")
    heads = config.tile_q
    # 1 barriers and stores: all scores 0, all values 1
    a = Batch(heads, [1], [64], 64, dtype, fill=1.0)
    a.q.zero_()
    run, out, lse, _ = a.planned(config, 1)
    run()
    synchronize(name + " 1 flow")
    got = f"out 1, got {out.float().min().item()} to {out.float().max().item()}"
    report(name + " 1 flow", bool((out == 1).all()), got, lambda: bad(out, torch.ones_like(out).double(), 1e-3))
    report(
        name + " 1 flow",
        difference(lse, torch.full_like(lse, 6.0).double()) < 1e-3,
        f"lse 6, got {lse.flatten()[:4].tolist()}",
    )
    # 2 scores alone: the LSE of random queries and keys; if it is wrong, dimension by dimension
    a = Batch(heads, [1], [64], 64, dtype)
    run, out, lse, _ = a.planned(config, 1)
    run()
    synchronize(name + " 2 scores")
    _, wanted_lse = a.reference()
    ok = difference(lse, wanted_lse) < 1e-2
    report(name + " 2 scores", ok, f"lse error {difference(lse, wanted_lse):.2e}", lambda: bad(lse, wanted_lse, 1e-2))
    if not ok:
        q = a.q.clone()
        for block in range(0, 576, 16):
            a.q.zero_()
            a.q[..., block : block + 16] = q[..., block : block + 16] * 4
            run()
            synchronize(name + " 2 dims")
            error = difference(lse, a.reference()[1])
            if error > 1e-2:
                print(f"      dims {block:3d}..{block + 15}: lse error {error:.2e}")
    # 3 output alone: uniform weights, a value names its column; then one key takes all the weight, a value names its key
    a = Batch(heads, [1], [64], 64, torch.float16 if dtype == torch.float16 else dtype)
    a.q.zero_()
    columns = (torch.arange(512, device="cuda") % 256).to(dtype)
    a.cache[..., :512] = columns
    a.cache[..., 512:] = 0
    run, out, lse, _ = a.planned(config, 1)
    run()
    synchronize(name + " 3 columns")
    report(
        name + " 3 columns",
        bool((out == columns).all()),
        "",
        lambda: f"row 0: {out[0, 0, :20].tolist()} .. {out[0, 0, 250:262].tolist()}",
    )
    wrong = []
    a.q[..., 512] = 60.0
    for key in range(0, 64, 5):
        a.cache[..., :512] = torch.arange(64, device="cuda").to(dtype)[None, :, None]
        a.cache[..., 512:] = 0
        a.cache[:, key, 512] = 30.0
        run()
        synchronize(name + " 3 keys")
        if not bool(((out.float() - key).abs() < 0.5).all()):
            wrong.append((key, out[0, 0, 0].item(), out[0, heads // 2, 300].item()))
    report(name + " 3 keys", not wrong, f"(key, got in row 0, in the middle row's column 300): {wrong[:8]}")
    # 4 one tile; 5 the ring: several tiles; 6 parts of a tile
    for n in (64, 1, 40, 63):
        compare(f"{name} 4 one tile, {n} keys", Batch(heads, [1], [n], 64, dtype), config, 1)
    for n in (2, 3, 4, 5, 6, 7, 12, 31):
        compare(f"{name} 5 {n} tiles", Batch(heads, [1], [64 * n], 64, dtype), config, 1)
    for n in (65, 127, 130, 333, 1000):
        compare(f"{name} 6 {n} keys", Batch(heads, [1], [n], 64, dtype), config, 1)


def batches(config: Any, dtype: Any) -> None:
    """Plans: pages, rows, masks, splits."""
    name = f"{dtype} {config.tag}".removeprefix("torch.")
    per = config.tile_q
    for page in (8, 16, 24, 32, 64, 128):
        compare(f"{name} 7 page {page}", Batch(per // 4, [4, 1, 3], [300, 77, 5], page, dtype), config, 1)
    compare(f"{name} 8 rows", Batch(128, [1, 2, 4], [200, 300, 517], 64, dtype), config, 4)
    compare(f"{name} 8 odd heads", Batch(33, [4, 1, 7, 2], [200, 64, 517, 1], 64, dtype), config, 4)
    compare(f"{name} 8 few rows", Batch(3, [1, 0, 2], [200, 300, 40], 16, dtype), config, 4)
    compare(f"{name} 8 full", Batch(16, [3, 5], [129, 70], 64, dtype, causal=False), config, 4)
    compare(f"{name} 8 kv shorter than q", Batch(16, [30, 9], [7, 0], 16, dtype), config, 4)
    compare(f"{name} 8 prefill", Batch(16, [200, 37], [700, 37], 64, dtype), config)
    for kv in (130, 640, 5000):
        compare(f"{name} 9 splits {kv}", Batch(per, [1], [kv], 64, dtype), config, again=20)
    compare(f"{name} 9 splits, few slots", Batch(per, [2, 1, 1], [3000, 129, 900], 64, dtype), config, 6, again=20)
    compare(
        f"{name} 9 batch",
        Batch(128, [1] * 16, [1024] * 8 + [900, 1, 700, 1024, 64, 65, 128, 999], 64, dtype),
        config,
        again=5,
    )
    compare(f"{name} 9 batch, 16 heads", Batch(16, [1, 2, 3, 4], [1024, 5000, 3, 900], 64, dtype), config, again=5)


def check() -> None:
    """All stages of all configurations."""
    for config in (MlaSm90Config(),):
        for dtype in (torch.bfloat16, torch.float16):
            before = failures
            stages(config, dtype)
            if failures == before:
                batches(config, dtype)
            print(f"{'ok   ' if failures == before else 'WRONG'} {dtype} {config.tag}", flush=True)


# ---- times -----------------------------------------------------------------------------------------------------------------------
CASES = (  # heads, batch, q length, kv length, page size
    (128, 64, 1, 4096, 64),
    (128, 128, 1, 2048, 64),
    (128, 128, 1, 8192, 64),
    (128, 1, 1, 8192, 64),
    (128, 16, 1, 1024, 64),
    (128, 64, 2, 4096, 64),
    (16, 64, 1, 4096, 64),
    (16, 64, 4, 4096, 64),
    (16, 1, 1, 8192, 64),
    (128, 64, 1, 4096, 16),
)


def variants(heads: int, rows: int) -> list[Any]:
    """What is worth timing."""
    sm90 = [MlaSm90Config()]
    sm80 = [mla_config(90, rows)] if rows > 16 else list(candidate_configs(90, rows)[:2])
    return sm90 + sm80


def times(quick: bool, peers: bool) -> None:
    """A table for each case."""
    from benchmarks.timing import CudaTimer, measure_limits

    timer = CudaTimer(quick)
    limits = measure_limits(timer, quick)
    print(f"copy {limits['copy_tb_s']:.2f} TB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s", flush=True)
    for heads, n, qo, kv, page in CASES:
        a = Batch(heads, [qo] * n, [kv] * n, page, torch.bfloat16)
        flops = 2.0 * heads * n * (qo * kv - qo * (qo - 1) / 2) * (576 + 512)
        nbytes = n * kv * 1152 + n * qo * heads * (576 + 512) * 2
        runs, labels = [], []
        for config in variants(heads, qo * heads):
            run, _, _, plan = a.planned(config)
            runs.append(run)
            family = "sm80" if isinstance(config, MlaConfig) else "sm90"
            labels.append(f"{family} {config.tag}: {plan.n_work} items, {plan.num_partials} partials")
        reference = None
        if peers:
            from benchmarks import calls
            from benchmarks import peers as others

            arguments = (
                a.q,
                a.cache,
                *(torch.from_numpy(x) for x in (a.qo_indptr, a.kv_indptr)),
                a.indices,
                torch.from_numpy(a.kv_len),
                SCALE,
            )
            for label, make in (
                ("flashmla", lambda a=arguments: others.flashmla(*a)),
                ("flashinfer fa3", lambda a=arguments: calls.mla(others.flashinfer("mla_fa3"), *a, backend="fa3")),
            ):
                try:
                    run = make()
                    found = run()
                    runs[0]()
                    first = a.planned(MlaSm90Config())
                    first[0]()
                    synchronize(label)
                    error = (
                        (found.reshape(first[1].shape).double() - first[1].double()).norm() / first[1].double().norm()
                    ).item()
                    if error > 1e-2:
                        print(f"  {label} differs by {error:.1e}")
                except Exception as problem:
                    print(f"  {label}: {type(problem).__name__}: {str(problem)[:150]}")
                    continue
                runs.append(run)
                labels.append(label)
        for run in runs:
            run()
        synchronize("warm-up")
        print(f"h{heads} b{n} q{qo} kv{kv} page {page}", flush=True)
        for label, sample in zip(labels, timer.measure(runs), strict=True):
            print(
                f"  {label:52s} {sample.us:8.1f} us {flops / sample.us / 1e6:6.1f} TFLOP/s {nbytes / sample.us / 1e6:5.2f} TB/s",
                flush=True,
            )
        del a, runs, reference
        torch.cuda.empty_cache()


if __name__ == "__main__":
    wanted = [w for w in sys.argv[1:] if not w.startswith("-")] or ["check", "time"]
    print(torch.cuda.get_device_name(0))
    if "check" in wanted:
        began = time.monotonic()
        check()
        print(f"{failures} failures, {time.monotonic() - began:.0f} s", flush=True)
    if "time" in wanted and not failures:
        times("--quick" in sys.argv, "--no-peers" not in sys.argv)
    sys.exit(1 if failures else 0)
