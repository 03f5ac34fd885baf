"""What a call costs the CPU: plan(), run() and the plain operators.

run() and operators: the GPU is kept busy ahead of them by a spin, and few calls are in flight, so that no launch
waits for a place in the queue; each call is timed alone, medians are given. plan(): the GPU is idle when it starts,
as in BASELINES.md; `plan busy` starts it behind a spin of 3 ms, so that a plan that waits for the GPU shows. `plan
many` has a large page table and no cache: 256 requests, then 4096, share 65,536 pages, whose numbers are on the host
(and travel with the plan) or on the device (and stay there). Nothing here has TFLOP/s or a limit; × peer is the best
peer's time over ours.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks import calls, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention, probabilities, randn
from benchmarks.timing import Samples, host_times

DEVICES = ("cuda", "cpu")
IN_FLIGHT = 20
BUSY_US = 3000.0
Setup = Callable[[Any], Callable[[], Any]]


def run(ctx: Context) -> None:
    """plan() of decode and prefill, run(), operators; FlashInfer the same way."""
    from pyinfer.schedulers import lazy

    lazy.wait()  # a process's first plans run interpreted: a matter of cold_start
    tiny = ctx.device == "cpu"
    dtype, dim, heads = ("float32", 32, (4, 2)) if tiny else ("bfloat16", 128, (32, 8))

    def batch(n: int, qo: int, kv: int, page: int, causal: bool = False) -> Attention:
        return Attention([qo] * n, [kv] * n, *heads, dim, page, causal, dtype, ctx.device)

    scale = 16 if tiny else 1
    for n in (1, 2) if tiny else (1, 16, 64):
        a = batch(n, 1, 1024 // scale, 16)
        spec = f"decode b{n} L{1024 // scale}"
        decode = {
            "flashinfer cuda-core": ("decode", {"use_tensor_cores": False}),
            "flashinfer fa2": ("prefill_fa2", {"use_tensor_cores": True, "backend": "fa2"}),
        }
        _plans(ctx, spec, a, calls.plan_decode, decode)
        _runs(ctx, f"run {spec}", lambda m, o, a=a: calls.decode(m, a, **o), decode)
    for name, page, make in (("ragged", 0, calls.plan_ragged_prefill), ("paged", 16, calls.plan_paged_prefill)):
        a = batch(8, 2048 // scale // 4, 2048 // scale // 4, page, True)
        spec = f"prefill {name} b8 {2048 // scale // 4} causal"
        prefill = {f"flashinfer {b}": (f"prefill_{b}", {"backend": b}) for b in ("fa2", "fa3")}
        _plans(ctx, spec, a, make, prefill)
        _runs(ctx, f"run {spec}", lambda m, o, a=a: calls.prefill(m, a, **o), prefill)
    _mla(ctx, 2 if tiny else 64, 64 if tiny else 1024, dtype)
    for n in (4, 16) if tiny else (256, 4096):
        for where in ("host", "device"):
            table: Any = _page_table(n, 256 if tiny else 65536, ctx.device, where)
            table.num_qo_heads, table.num_kv_heads, table.head_dim, table.dtype = *heads, dim, dtype
            spec = f"b{n} {len(table.kv_indices)} pages on the {where}"
            peer = {"flashinfer fa2": ("prefill_fa2", {"use_tensor_cores": True, "backend": "fa2"})}
            _plans(ctx, f"many decode {spec}", table, calls.plan_decode, peer)
            peer = {"flashinfer fa2": ("prefill_fa2", {"backend": "fa2"})}
            _plans(ctx, f"many prefill {spec}", table, calls.plan_paged_prefill, peer)
    _operators(ctx, dtype, dim, heads)


def _mla(ctx: Context, batch: int, length: int, dtype: str) -> None:
    """Decode with 16 latent heads, a page of 64 tokens."""
    import torch

    pages = length // 64
    rows = torch.arange(batch + 1, dtype=torch.int32)
    q, cache = randn((batch, 16, 576), dtype, ctx.device), randn((batch * pages, 64, 576), dtype, ctx.device)
    indices = torch.randperm(batch * pages, dtype=torch.int32).to(ctx.device)
    arguments = (q, cache, rows, rows * pages, indices, torch.full((batch,), length, dtype=torch.int32), 0.07)
    peer = {"flashinfer fa3": ("mla_fa3", {"backend": "fa3"})}
    _plans(ctx, f"mla b{batch} L{length}", arguments, lambda m, a, **o: calls.plan_mla(m, *a, **o), peer)
    _runs(ctx, f"run mla b{batch} L{length}", lambda m, o: calls.mla(m, *arguments, **o), peer)


def _page_table(batch: int, pages: int, device: str, where: str) -> SimpleNamespace:
    """What plan() wants of an `Attention`: requests of random lengths that have all of the pages, in any order, one query each."""
    import torch

    cuts = torch.randperm(pages - 1)[: batch - 1].add(1).sort().values
    kv_indptr = torch.cat([torch.zeros(1, dtype=torch.long), cuts, torch.tensor([pages])]).int()
    indices = torch.randperm(pages, dtype=torch.int32)
    return SimpleNamespace(
        qo_indptr=torch.arange(batch + 1, dtype=torch.int32), kv_indptr=kv_indptr, kv_indices=indices.to(device) if where == "device" else indices,
        last_page_len=torch.randint(1, 17, (batch,), dtype=torch.int32), page_size=16, causal=True, kv_dtype="", device=device,
    )  # fmt: skip


def _operators(ctx: Context, dtype: str, dim: int, heads: tuple[int, int]) -> None:
    import torch

    x, wide, weight = (
        randn((4, 256), dtype, ctx.device),
        randn((4, 512), dtype, ctx.device),
        randn((256,), dtype, ctx.device),
    )
    q, k = randn((4, heads[0], dim), dtype, ctx.device), randn((4, heads[1], dim), dtype, ctx.device)
    positions, p = torch.arange(4, dtype=torch.int32, device=ctx.device), probabilities(4, 1024, ctx.device)
    a = Attention([1] * 4, [40] * 4, heads[1], heads[1], dim, 16, True, dtype, ctx.device)
    last = torch.full((4,), 39, dtype=torch.int32, device=ctx.device)
    operators: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("rmsnorm", "norm", lambda m: calls.rmsnorm(m, x, weight)),
        ("fused_add_rmsnorm", "norm", lambda m: calls.fused_add_rmsnorm(m, x, x, weight)[0]),
        ("silu_and_mul", "activation", lambda m: calls.silu_and_mul(m, wide)),
        ("apply_rope_pos_ids_inplace", "rope", lambda m: calls.rope(m, q, k, positions)[0]),
        ("append_paged_kv_cache", "page", lambda m: calls.append(m, a, k, k, positions, last)[0]),
        ("top_p_sampling_from_probs", "sampling", lambda m: lambda: m.sampling.top_p_sampling_from_probs(p, 0.9)),
    ]
    for name, module, make in operators:
        _runs(ctx, name, lambda m, o, make=make: make(m), {"flashinfer": (module, {})})
    scratch = x.clone()
    case = Case("host", "torch add_ (for scale)")
    if ctx.selected(case):
        _keep(ctx, case, [("torch", lambda: _run_times(ctx, lambda: scratch.add_(x)))], needs_ours=False)


def _variants(
    make: Callable[[Any, dict[str, Any]], Any], peer_options: dict[str, tuple[str, dict[str, Any]]]
) -> list[tuple[str, Callable[[], Any]]]:
    def ours() -> Any:
        import pyinfer

        return make(pyinfer, {})

    def theirs(module: str, options: dict[str, Any]) -> Any:
        return make(peers.flashinfer(module), options)

    return [("pyinfer", ours)] + [
        (name, lambda module=module, options=options: theirs(module, options))
        for name, (module, options) in peer_options.items()
    ]


def _plans(
    ctx: Context, spec: str, a: Any, make: Callable[..., Any], peer_options: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    made = _variants(lambda module, options: make(module, a, **options)[1], peer_options)
    for busy in (False, True) if ctx.device == "cuda" else (False,):
        case = Case("host", f"plan {'busy ' if busy else ''}{spec}")
        if ctx.selected(case):
            _keep(
                ctx,
                case,
                [
                    (name, lambda factory=factory, busy=busy: _plan_times(ctx, factory(), busy))
                    for name, factory in made
                ],
            )


def _runs(
    ctx: Context,
    spec: str,
    make: Callable[[Any, dict[str, Any]], Any],
    peer_options: dict[str, tuple[str, dict[str, Any]]],
) -> None:
    case = Case("host", spec)
    if ctx.selected(case):
        _keep(
            ctx,
            case,
            [
                (name, lambda factory=factory: _run_times(ctx, factory()))
                for name, factory in _variants(make, peer_options)
            ],
        )


def _plan_times(ctx: Context, plan: Callable[[], Any], busy: bool) -> Samples:
    for _ in range(3):
        plan()

    def prepare() -> None:
        ctx.timer.synchronize()
        if busy:
            ctx.timer.spin(BUSY_US)  # type: ignore[union-attr] - only on a GPU

    samples = host_times(plan, 5 if ctx.quick else 60, prepare)
    ctx.timer.synchronize()
    return samples


def _run_times(ctx: Context, call: Callable[[], Any]) -> Samples:
    for _ in range(5):
        call()
    count = [0]

    def prepare() -> None:
        if count[0] % IN_FLIGHT == 0:
            ctx.timer.synchronize()
            if ctx.device == "cuda":
                ctx.timer.spin(BUSY_US)  # type: ignore[union-attr] - only on a GPU
        count[0] += 1

    samples = host_times(call, 10 if ctx.quick else 400, prepare)
    ctx.timer.synchronize()
    return samples


def _keep(ctx: Context, case: Case, variants: list[tuple[str, Callable[[], Samples]]], needs_ours: bool = True) -> None:
    """Time each in turn, twice, and keep the better median: on a shared host the first pass of one can meet somebody else's work."""
    results = []
    for name, measure in variants:
        if name.split()[0] not in ("pyinfer", *ctx.wanted) and needs_ours:
            continue
        entry: dict[str, Any] = {"name": name}
        try:
            first = measure()
            second = measure()
            entry |= {"status": "ok", **ctx.figures(case, first if first.us <= second.us else second)}
        except peers.Missing as problem:
            entry["status"] = f"missing: {problem}"
        except Exception as problem:
            entry["status"] = (
                f"error: {type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
            )
        results.append(entry)
    ctx.keep(case, results)
