"""The sm90 prefill kernel on a Hopper GPU: correctness in stages that say which part is wrong, then times of its configurations beside the peers.

usage: python tools/gpu/time_sm90.py [check] [time] [trace] [--quick] [--no-peers] [--all | --first]      (neither word: both)
--all: every configuration in every case, --first: the preferred one alone

A kernel that does not end within 10 s (a barrier nobody arrives at) is reported with its case, and the process ends with code 3.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("PYINFER_SM90", "1")
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import numpy as np
import torch

from benchmarks import inputs
from pyinfer.core.device import num_sms
from pyinfer.core.tensor import view
from pyinfer.jit import attention_sm90
from pyinfer.jit.attention_config import candidate_configs
from pyinfer.jit.attention_launch import launch_attention, launch_single
from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES
from pyinfer.schedulers.prefill import prefill_plan

failures = 0
workspaces: list[Any] = []  # of traced runs
wrong: set[str] = set()  # configurations that failed


DIMS = ((128, 128), (64, 64), (256, 256), (192, 128), (96, 96))


def chosen(dim: tuple[int, int], rows: int = 1024) -> list[Any]:
    """The configurations asked for."""
    found = attention_sm90.candidates(*dim, rows)
    count = 1 if "--first" in sys.argv else len(found) if "--all" in sys.argv else 6
    return [c for c in found[:count] if name_of(c) not in wrong]


def name_of(config: Any) -> str:
    """How a configuration is called here."""
    return f"d{config.head_dim_qk}x{config.head_dim_vo} {config.tag}"


def synchronize(what: str, seconds: float = 10.0) -> None:
    """Wait for the device, but not for ever."""
    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            print(f"HANG  {what}: not ended after {seconds:.0f} s", flush=True)
            os._exit(3)
        time.sleep(0.001)


# ---- correctness -----------------------------------------------------------------------------------------------------------------
def single(
    q: Any,
    k: Any,
    v: Any,
    config: Any,
    what: str,
    causal: bool = False,
    window: int = -1,
    cap: float = 0.0,
    chunk: int = 0,
) -> tuple[Any, Any]:
    """(out, lse) of one request by a configuration; with `chunk` in splits of that many keys."""
    out = torch.full((*q.shape[:2], v.shape[-1]), math.nan, dtype=q.dtype, device="cuda")
    lse = torch.full(q.shape[:2], math.nan, dtype=torch.float32, device="cuda")
    splits = -(-k.shape[0] // chunk) if chunk else 1
    tiles = -(-q.shape[0] * (q.shape[1] // k.shape[1]) // config.tile_q)
    size = SINGLE_SEMAPHORE_BYTES + tiles * splits * k.shape[1] * config.tile_q * (v.shape[-1] + 1) * 4 + 256
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    launch_single(
        0, torch.cuda.current_stream().cuda_stream, view(q), view(k), view(v), "NHD", view(out), view(lse), workspace.data_ptr(), causal=causal,
        window_left=window, sm_scale=q.shape[-1] ** -0.5, logits_soft_cap=cap, kv_chunk=chunk, num_splits=splits, config=config,
    )  # fmt: skip
    synchronize(what)
    return out, lse


def reference(q: Any, k: Any, v: Any, causal: bool, window: int, cap: float) -> tuple[Any, Any]:
    """Output and base-2 LSE in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if cap:
        s = cap * torch.tanh(s / cap)
    i = torch.arange(q.shape[0], device="cuda")[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0], device="cuda")[None]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device="cuda")
    if causal:
        seen &= j <= i
    if window >= 0:
        seen &= j >= i - window
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.where(seen, torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), 0.0)
    return torch.einsum("hqk,khd->qhd", p, v), lse.T * math.log2(math.e)


def report(what: str, ok: bool, text: str, detail: Callable[[], str] = str) -> None:
    """One line; more if it is wrong."""
    global failures
    failures += not ok
    if not ok or "-v" in sys.argv:
        print(f"{'ok   ' if ok else 'WRONG'} {what}: {text}{'' if ok else ' ' + detail()}", flush=True)


def lse_error(found: Any, wanted: Any) -> float:
    """Largest difference; infinite if not the same rows are −inf."""
    finite = torch.isfinite(wanted)
    if not bool((torch.isfinite(found) == finite).all()):
        return math.inf
    return (found[finite].double() - wanted[finite]).abs().max().item() if bool(finite.any()) else 0.0


def bad_rows(found: Any, wanted: Any, limit: float) -> str:
    """The first (token, head) whose values differ."""
    wrong = ~((found.double() - wanted).abs() <= limit)
    places = wrong.nonzero()
    text = f"{len(places)} of {wrong.numel()} wrong, first {places[:6].tolist()}, last {places[-1].tolist()}; "
    at = tuple(places[0].tolist())
    return text + f"there {found[at].item():.5f} for {wanted[at].item():.5f}"


def stages(config: Any, dtype: Any) -> None:
    """One block; each stage adds one part of the kernel to those that are known to work."""
    dim, dim_v, rows = config.head_dim_qk, config.head_dim_vo, config.tile_q
    name = f"{dtype} {name_of(config)}".removeprefix("torch.")

    def normal(*shape: int) -> Any:
        return torch.randn(shape, device="cuda").to(dtype)

    # 1 barriers and stores: all scores 0, all values 1
    q, k = (
        torch.zeros(rows, 1, dim, dtype=dtype, device="cuda"),
        torch.zeros(config.tile_kv, 1, dim, dtype=dtype, device="cuda"),
    )
    ones = torch.ones(config.tile_kv, 1, dim_v, dtype=dtype, device="cuda")
    out, lse = single(q, k, ones, config, name + " 1 flow")
    report(
        name + " 1 flow", bool((out == 1).all()), f"out 1, got {out.float().min().item()} to {out.float().max().item()}"
    )
    report(
        name + " 1 flow",
        lse_error(lse, torch.full_like(lse, math.log2(config.tile_kv)).double()) < 1e-3,
        f"lse {lse[0, 0].item()}",
    )
    # 2 Q K^T alone: the LSE of random scores, values 1; then column by column
    q, k = normal(rows, 1, dim), normal(config.tile_kv, 1, dim)
    out, lse = single(q, k, ones, config, name + " 2 QK")
    want = reference(q, k, ones, False, -1, 0.0)[1]
    report(
        name + " 2 QK",
        lse_error(lse, want) < 1e-2,
        f"lse error {lse_error(lse, want):.2e}",
        lambda: bad_rows(lse, want, 1e-2),
    )
    if not lse_error(lse, want) < 1e-2:
        for block in range(0, dim, 16):  # which dims of the contraction count?
            one = torch.zeros_like(q)
            one[..., block : block + 16] = q[..., block : block + 16]
            got, expected = single(one, k, ones, config, name)[1], reference(one, k, ones, False, -1, 0.0)[1]
            print(f"      dims {block:3d}..{block + 15}: lse error {lse_error(got, expected):.2e}")
    # 3 P V alone: uniform weights, value = a number that names its column, then its key
    zero = torch.zeros_like(q)
    columns = torch.arange(dim_v, device="cuda", dtype=torch.float32).to(dtype)
    v = columns.expand(config.tile_kv, 1, dim_v).contiguous()
    out = single(zero, k, v, config, name + " 3 PV columns")[0]
    report(name + " 3 PV columns", bool((out == columns).all()), "", lambda: f"row 0: {out[0, 0, :24].tolist()} ...")
    q1 = torch.zeros_like(q)
    q1[..., 0] = 64.0
    k1 = torch.zeros_like(k)
    bad = []
    for key in range(0, config.tile_kv, 7):  # one key takes all the weight
        k1.zero_()
        k1[key, 0, 0] = 16.0
        v = (
            torch.arange(config.tile_kv, device="cuda", dtype=torch.float32)[:, None, None]
            .expand(-1, 1, dim_v)
            .to(dtype)
            .contiguous()
        )
        got = single(q1, k1, v, config, name + " 3 PV keys")[0]
        if not bool(((got.float() - key).abs() < 0.5).all()):
            bad.append((key, got[0, 0, 0].item(), got[rows // 2, 0, 0].item()))
    report(name + " 3 PV keys", not bad, f"(key, got in row 0, in row {rows // 2}): {bad[:8]}")
    # 4 all together, one tile; 5 the pipeline: several tiles; 6 masks and edges
    cases = [("4 one tile", rows, config.tile_kv, 1, 1, {}), ("4 part of a tile", rows, 40, 1, 1, {})]
    cases += [(f"5 {n} tiles", rows, n * config.tile_kv, 1, 1, {}) for n in (2, 3, 4, 7, 12)]
    cases += [
        ("6 short q", 70, 333, 2, 1, {}),
        ("6 gqa", 257, 300, 6, 2, {}),
        ("6 causal", 513, 700, 8, 2, dict(causal=True)),
        ("6 causal mha", 300, 300, 3, 3, dict(causal=True)),
        ("6 kv shorter than q", 300, 130, 4, 1, dict(causal=True)),
        ("6 window", 500, 900, 6, 2, dict(causal=True, window=77)),
        ("6 window full", 200, 900, 4, 2, dict(window=300)),
        ("6 cap", 200, 500, 4, 2, dict(cap=3.0)),
        ("7 splits", 200, 1500, 4, 2, dict(chunk=256)),
        ("7 splits causal", 300, 1501, 4, 2, dict(causal=True, chunk=512)),
        ("8 many items", 2100, 2100, 16, 4, dict(causal=True)),
        ("8 many items, full", 1300, 300, 16, 2, {}),
        ("8 many splits", 600, 3000, 16, 4, dict(chunk=512)),
    ]
    for label, m, n, heads, kv_heads, options in cases:
        q, k, v = normal(m, heads, dim), normal(n, kv_heads, dim), normal(n, kv_heads, dim_v)
        out, lse = single(q, k, v, config, f"{name} {label}", **options)
        wanted, wanted_lse = reference(
            q, k, v, options.get("causal", False), options.get("window", -1), options.get("cap", 0.0)
        )
        error = ((out.double() - wanted).norm() / wanted.norm()).item()
        limit = 6e-3 if dtype == torch.bfloat16 else 1e-3
        report(f"{name} {label}", error < limit, f"error {error:.2e}", lambda o=out, w=wanted: bad_rows(o, w, 0.05))
        report(
            f"{name} {label}",
            lse_error(lse, wanted_lse) < 1e-2,
            f"lse {lse_error(lse, wanted_lse):.2e}",
            lambda a=lse, b=wanted_lse: bad_rows(a, b, 1e-2),
        )


def case(dim_v: int, *arguments: Any) -> inputs.Attention:
    """Inputs whose values have another head dimension than keys."""
    a = inputs.Attention(*arguments)
    a.v = a.v[..., :dim_v].contiguous()
    return a


def planned(a: inputs.Attention, config: Any) -> tuple[Callable[[], None], Any]:
    """A batch by a plan: (run, out)."""
    plan = prefill_plan(
        a.qo_indptr.numpy().astype(np.int32), a.kv_indptr.numpy().astype(np.int32),
        kv_indices=a.kv_indices.cpu().numpy().astype(np.int32) if a.page_size else None,
        last_page_len=np.array([(n - 1) % a.page_size + 1 for n in a.kv_lens], np.int32) if a.page_size else None,
        num_qo_heads=a.num_qo_heads, num_kv_heads=a.num_kv_heads, head_dim_qk=a.head_dim, head_dim_vo=a.v.shape[-1], page_size=a.page_size,
        tile_q=config.tile_q,
        tile_kv=config.tile_kv, num_sms=num_sms(0), ctas_per_sm=config.ctas_per_sm, causal=a.causal,
    )  # fmt: skip
    buffer = torch.from_numpy(plan.pack().copy()).cuda()
    traced = getattr(config, "trace", False)
    workspace = torch.zeros(plan.workspace_bytes + (8 * 4096 * 8 if traced else 16), dtype=torch.uint8, device="cuda")
    if traced:
        workspaces.append(workspace)
    out = torch.full((*a.q.shape[:2], a.v.shape[-1]), math.nan, dtype=a.q.dtype, device="cuda")
    q, k, v, o = view(a.q), view(a.k), view(a.v), view(out)
    stream, at = torch.cuda.current_stream().cuda_stream, buffer.data_ptr()
    indices = at + 4 * plan.offsets.kv_indices if a.page_size else 0

    def run(_kept: Any = (buffer, workspace)) -> None:
        launch_attention(
            0,
            stream,
            at,
            plan,
            q,
            k,
            v,
            indices,
            "NHD",
            o,
            None,
            workspace.data_ptr(),
            sm_scale=a.head_dim**-0.5,
            config=config,
        )

    return run, out


def batches(config: Any, everything: bool) -> None:
    """Plans: ragged and paged, against the sm80 kernel (which the tests hold to float64)."""
    dim, dim_v = config.head_dim_qk, config.head_dim_vo
    sm80 = candidate_configs(90, dim, dim_v, 128)[0]
    boxes = config
    for page, causal in itertools.product((0, 1, 5, 8, 16, 24, 64, 256) if everything else (16,), (False, True)):
        config = attention_sm90.for_pages(boxes, page)
        a = case(dim_v, [100, 1, 0, 777, 128], [100, 300, 50, 901, 5000], 8, 2, dim, page, causal, "bfloat16", "cuda")
        what = f"batch {name_of(config)} page {page} causal {causal}"
        run, out = planned(a, config)
        run()
        synchronize(what)
        other, wanted = planned(a, sm80)
        other()
        synchronize(what + " sm80")
        error = ((out.double() - wanted.double()).norm() / wanted.double().norm()).item()
        report(
            what,
            error < 8e-3,
            f"differs from sm80 by {error:.2e}",
            lambda o=out, w=wanted: bad_rows(o, w.double(), 0.05),
        )
    # More items than blocks, and what a second launch finds (counters, semaphores).
    for page, causal in itertools.product((0, 16, 1) if everything else (0, 16), (False, True)):
        config = attention_sm90.for_pages(boxes, page)
        a = case(
            dim_v,
            [2000, 1, 0, 777, 3000, 513],
            [2100, 300, 50, 901, 3000, 600],
            16,
            4,
            dim,
            page,
            causal,
            "bfloat16",
            "cuda",
        )
        what = f"many items {name_of(config)} page {page} causal {causal}"
        run, out = planned(a, config)
        for _ in range(3):
            out.fill_(math.nan)
            run()
            synchronize(what)
        other, wanted = planned(a, sm80)
        other()
        synchronize(what + " sm80")
        error = ((out.double() - wanted.double()).norm() / wanted.double().norm()).item()
        report(
            what,
            error < 8e-3,
            f"differs from sm80 by {error:.2e}",
            lambda o=out, w=wanted: bad_rows(o, w.double(), 0.05),
        )
    config = boxes
    # What lies behind a request's keys belongs to others and must not matter.
    a = case(dim_v, [200, 50], [333, 400], 4, 2, dim, 0, False, "bfloat16", "cuda")
    a.k[333:], a.v[333:] = math.nan, math.nan
    run, out = planned(a, config)
    run()
    synchronize("NaN behind")
    report(f"{name_of(config)} NaN behind the keys", bool(torch.isfinite(out[:200]).all()), "not finite")


def check() -> None:
    """All stages of the configurations; those that fail are not timed."""
    for dim in DIMS:
        for rows in (1024, 128, 64):
            for i, config in enumerate(chosen(dim, rows)):
                before = failures
                for dtype in (torch.bfloat16, torch.float16)[: 2 if i < 1 else 1]:
                    stages(config, dtype)
                batches(config, everything=i < 2)
                if failures != before:
                    wrong.add(name_of(config))
                print(f"{'ok   ' if failures == before else 'WRONG'} {name_of(config)}", flush=True)


# ---- times -----------------------------------------------------------------------------------------------------------------------
CASES = (
    # requests, q, kv, heads, kv heads, head_dim (of q and k, and of v), page size, causal
    (1, 4096, 4096, 32, 8, (128, 128), 0, True),
    (1, 16384, 16384, 32, 8, (128, 128), 0, True),
    (1, 16384, 16384, 32, 8, (128, 128), 0, False),
    (8, 2048, 2048, 32, 8, (128, 128), 0, True),
    (32, 512, 512, 32, 8, (128, 128), 0, True),
    (1, 16384, 16384, 32, 8, (128, 128), 16, True),
    (8, 2048, 2048, 32, 8, (128, 128), 16, True),
    (8, 2048, 2048, 32, 8, (128, 128), 1, True),
    (16, 512, 8192, 32, 8, (128, 128), 16, True),
    (1, 16384, 16384, 32, 32, (64, 64), 0, True),
    (1, 16384, 16384, 32, 32, (64, 64), 0, False),
    (8, 2048, 2048, 32, 32, (64, 64), 0, True),
    (1, 16384, 16384, 16, 16, (256, 256), 0, True),
    (1, 16384, 16384, 16, 16, (256, 256), 0, False),
    (8, 2048, 2048, 16, 16, (256, 256), 0, True),
    (8, 2048, 2048, 128, 128, (192, 128), 0, True),
    (64, 16, 8192, 32, 8, (128, 128), 16, True),
    (1, 64, 32768, 32, 8, (128, 128), 16, False),
)


def times(quick: bool, peers: bool) -> None:
    """A table for each case."""
    from benchmarks.timing import CudaTimer

    timer = CudaTimer(quick)
    for n, qo, kv, heads, kv_heads, dim, page, causal in CASES:
        a = case(dim[1], [qo] * n, [kv] * n, heads, kv_heads, dim[0], page, causal, "bfloat16", "cuda")
        flops = a.flops * sum(dim) / (2 * dim[0])
        rows = min(1024, qo * heads // kv_heads)
        print(
            f"\nb{n} q{qo} kv{kv} {heads}/{kv_heads} d{dim[0]}x{dim[1]} page {page} {'causal' if causal else 'full'}",
            flush=True,
        )
        runs, labels = [], []
        for config in (
            *dict.fromkeys(attention_sm90.for_pages(c, page) for c in chosen(dim, rows)),
            candidate_configs(90, *dim, rows)[0],
        ):
            run, _ = planned(a, config)
            runs.append(run)
            labels.append(f"{config.kind} {config.tag}")
        if peers:
            from benchmarks import peers as others

            for label, make in (
                ("fa3", lambda a=a: others.fa3(a)),
                ("cudnn", lambda a=a: others.torch_sdpa(a, "cudnn")[0]),
            ):
                try:
                    run = make()
                    run()
                except Exception as error:
                    print(f"  {label}: {type(error).__name__}: {str(error)[:150]}")
                    continue
                runs.append(run)
                labels.append(label)
        for run in runs:
            run()
        synchronize("warm-up")
        for label, sample in zip(labels, timer.measure(runs), strict=True):
            print(f"  {label:48s} {sample.us:9.1f} us {flops / sample.us / 1e6:7.1f} TFLOP/s", flush=True)
        del a, runs
        torch.cuda.empty_cache()


# ---- a look into block 0 ---------------------------------------------------------------------------------------------------------
EVENTS = {
    1: "first scores there", 2: "first weights", 3: "values cleared", 4: "K there, QK issued", 5: "V there, PV issued", 6: "scores there", 7: "weights made",
    8: "PV there", 9: "last PV issued", 10: "next item's QK issued", 11: "last PV there", 12: "output written", 20: "load", 30: "queries begin",
    31: "queries there", 40: "item found",
}  # fmt: skip


def trace() -> None:
    """Clocks between the events of block 0's roles (the kernel's `trace`): means over the launch, and two items in full."""
    import dataclasses

    for n, length, tag in ((32, 512, "b32 512"), (8, 2048, "b8 2k"), (1, 4096, "b1 4k")):
        config = dataclasses.replace(attention_sm90.candidates(128)[0], trace=True)
        a = inputs.Attention([length] * n, [length] * n, 32, 8, 128, 0, True, "bfloat16", "cuda")
        run, _ = planned(a, config)
        for _ in range(2):
            run()
        synchronize("trace")
        record = workspaces[-1][: 8 * 4096 * 8].view(torch.int32).view(8, 4096, 2).cpu().numpy()
        print(f"trace {tag}: clocks from event to event, block 0")
        lines = []
        names = [f"consumer {i}" for i in range(config.consumers)] + ["K", "V", "queries", "items"]
        for role, name in enumerate(names):
            events = record[role][: max(1, int(np.argmax(record[role, :, 0] == 0)))]
            steps: dict[tuple[int, int], list[int]] = {}
            for (e, t), (f, u) in itertools.pairwise(events.tolist()):
                steps.setdefault((e, f), []).append((u - t) & 0xFFFFFFFF)
            spent = sum(sum(x) for x in steps.values())
            print(f" {name}: {len(events)} events in {spent} clocks")
            for (e, f), x in sorted(steps.items()):
                print(
                    f"   {e:2d} -> {f:2d} {EVENTS.get(f, '?'):24s} {len(x):4d} x median {int(np.median(x)):6d} max {max(x):6d} = {100 * sum(x) / spent:4.1f}%"
                )
            begin = int(np.argmax(events[:, 0] == 12)) if role < config.consumers else 0
            lines += [
                (int(t) & 0xFFFFFFFF, name, int(e))
                for e, t in events[begin : begin + (40 if role < config.consumers else 24)]
            ]
        lines.sort()
        if tag != "b1 4k":
            print(" in order: " + "; ".join(f"{t - lines[0][0]} {who[0]}{who[-1]} {e}" for t, who, e in lines[:130]))


def build(spec: Any) -> str:
    """Compile in a process of its own; the disk cache has it then."""
    spec.build("90a")
    return spec.name


def warm() -> None:
    """Compile all that is run here, in parallel."""
    import concurrent.futures
    import multiprocessing

    specs = {}
    for dim, rows in itertools.product(DIMS, (1024, 128, 64)):
        for i, config in enumerate(chosen(dim, rows)):
            for dtype in ("bfloat16", "float16")[: 2 if i < 1 else 1]:
                for source, variant in (("single", "plain"), ("single", "softcap"), ("plan", "plain")):
                    specs[attention_sm90.gen_prefill_sm90(config, dtype, source, variant)] = None
            specs[attention_sm90.gen_prefill_sm90(attention_sm90.gathering(*dim), "bfloat16")] = None
    with concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(build, specs))


if __name__ == "__main__":
    wanted = [w for w in sys.argv[1:] if not w.startswith("-")] or ["check", "time"]
    print(torch.cuda.get_device_name(0))
    if wanted != ["trace"]:
        warm()
    if "check" in wanted:
        check()
        print(f"{failures} failures", flush=True)
    if "trace" in wanted:
        trace()
    if "time" in wanted:
        times("--quick" in sys.argv, "--no-peers" not in sys.argv)
    sys.exit(1 if failures else 0)
