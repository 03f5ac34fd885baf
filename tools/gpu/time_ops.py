"""Time the candidate configurations of the memory-bound operators beside FlashInfer's kernels, checked against float64.

`python3 tools/gpu/time_ops.py [rms|silu|add|append|rope|quant|fused …]` (in common.sh's environment, after warm_flashinfer.sh wait): one line per
candidate: median microseconds, TB/s, percent of this run's copy bandwidth, FlashInfer's time over ours. The first is the operator's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import calls, peers
from benchmarks.inputs import Attention, randn
from benchmarks.timing import CudaTimer, measure_limits

SHAPES = ((128, 4096), (4096, 4096), (16384, 8192))
TOKENS = (1, 128, 4096, 16384)
Variant = tuple[str, Callable[[], Any]]


class Bench:
    """Prints one table."""

    def __init__(self) -> None:
        self.timer = CudaTimer()
        self.timer.seconds = 0.5
        self.copy = measure_limits(self.timer, quick=False)["copy_tb_s"]
        print(f"copy {self.copy:.2f} TB/s")

    def table(self, title: str, moved: float, variants: list[Variant], peer: Callable[[], Callable[[], Any]]) -> None:
        """Time the variants and the peer in turns."""
        runs = list(variants)
        try:
            runs.append(("flashinfer", peer()))
        except peers.Missing as problem:
            print(f"  (no flashinfer: {problem})") if str(problem) != "not asked" else None
        samples = self.timer.measure([run for _, run in runs])
        reference = samples[-1].us if runs[-1][0] == "flashinfer" else float("nan")
        best = min(s.us for s in samples[: len(variants)])
        print(f"{title}")
        for (name, _), s in zip(runs, samples, strict=True):
            rate = moved / s.us / 1e6
            mark = "*" if s.us == best else " "
            ratio = f"  x{reference / s.us:.2f}" if reference == reference else ""
            print(f" {mark}{name:<56}{s.us:>8.2f} us {rate:>5.2f} TB/s {100 * rate / self.copy:>4.0f}%{ratio}")


def close(got: Any, want: Any, what: str) -> None:
    """One rounding to bfloat16, relative to the largest value of the row."""
    error = (got.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    worst = float(error.max())
    if not worst <= 1.1 * 2.0**-8:
        raise SystemExit(f"{what}: WRONG, relative error {worst:.3e}")


def stream() -> int:
    """torch's current stream."""
    import torch

    return torch.cuda.current_stream().cuda_stream


def silu(bench: Bench) -> None:
    """silu_and_mul."""
    import torch

    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.activation import act_candidates, gen_act_and_mul

    for rows, width in SHAPES:
        x = randn((rows, 2 * width), "bfloat16", "cuda")
        out = torch.empty((rows, width), dtype=x.dtype, device="cuda")
        gate, up = x[:, :width].double(), x[:, width:].double()
        want = gate / (1 + (-gate).exp()) * up
        del gate, up
        variants: list[Variant] = []
        for c in act_candidates(width // 8):
            kernel = gen_act_and_mul("silu", "bfloat16", width, config=c).build_and_load(0)
            values = (x.data_ptr(), out.data_ptr(), 0, 2 * width, 0, width, rows, rows, c.chunks, width)
            grid = -(-rows // c.rows) * c.chunks

            def run(kernel: Any = kernel, grid: int = grid, values: Any = values) -> None:
                kernel(stream(), grid, values, pdl_supported(0))

            out.fill_(float("nan"))
            run()
            close(out, want, kernel.spec.name)
            variants.append((kernel.spec.name, run))
        bench.table(
            f"silu_and_mul {rows}x{width}",
            6.0 * rows * width,
            variants,
            lambda x=x: calls.silu_and_mul(peers.flashinfer("activation"), x),
        )


def add(bench: Bench) -> None:
    """fused_add_rmsnorm."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import fused_add_candidates, gen_fused_add_rmsnorm

    for rows, hidden in SHAPES:
        x, residual, weight = (randn(s, "bfloat16", "cuda") for s in ((rows, hidden), (rows, hidden), (hidden,)))
        total = x.double() + residual.double()
        want = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        variants: list[Variant] = []
        for c in fused_add_candidates(hidden // 8):
            kernel = gen_fused_add_rmsnorm("bfloat16", hidden, config=c).build_and_load(0)

            def launch(a: Any, b: Any, kernel: Any = kernel, c: Any = c, weight: Any = weight) -> None:
                pointers = (a.data_ptr(), b.data_ptr(), weight.data_ptr())
                n, h = a.shape
                values = (*pointers, 0, h, 0, h, n, n, h, 1.0 / h, 1e-6)
                kernel(stream(), -(-n // c.rows), values, pdl_supported(0))

            own_x, own_residual = x.clone(), residual.clone()
            launch(own_x, own_residual)
            close(own_x, want, kernel.spec.name)
            close(own_residual, total, kernel.spec.name + " (residual)")
            variants.append((kernel.spec.name, lambda launch=launch, a=own_x, b=own_residual: launch(a, b)))
        del total, want
        bench.table(
            f"fused_add_rmsnorm {rows}x{hidden}",
            8.0 * rows * hidden,
            variants,
            lambda x=x, r=residual, w=weight: calls.fused_add_rmsnorm(peers.flashinfer("norm"), x, r, w)[0],
        )


def append(bench: Bench) -> None:
    """append_paged_kv_cache: every candidate in the operator's own place."""
    import torch

    import pyinfer
    from pyinfer import _page
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import append_candidates, gen_append

    heads, dim = 8, 128
    original = _page._append_kernel
    for tokens in TOKENS:
        batch = min(tokens, 64)
        new = [tokens // batch + (i < tokens % batch) for i in range(batch)]
        a = Attention(new, [n + 37 for n in new], heads, heads, dim, 16, True, "bfloat16", "cuda")
        ints = lambda v: torch.tensor(v, dtype=torch.int32, device="cuda")  # noqa: E731
        where = ints([i for i, n in enumerate(new) for _ in range(n)])
        positions = ints([37 + j for n in new for j in range(n)])
        key, value = randn((tokens, heads, dim), "bfloat16", "cuda"), randn((tokens, heads, dim), "bfloat16", "cuda")
        arguments = (a, key, value, where, positions)
        # What must come out, by indexing on the host.
        wanted = [torch.full_like(c, 7.0).cpu() for c in (a.k, a.v)]
        indptr, indices = a.kv_indptr.cpu().tolist(), a.kv_indices.cpu().tolist()
        pages = [indices[indptr[i] + (37 + j) // 16] for i, n in enumerate(new) for j in range(n)]
        slots = [(37 + j) % 16 for n in new for j in range(n)]
        for target, source in zip(wanted, (key, value), strict=True):
            target[pages, slots] = source.cpu()
        want = torch.stack(wanted).cuda()
        variants: list[Variant] = []
        candidates = [(c, "load_once") for c in append_candidates(heads * dim * 2 // 16)]
        for config, load in (*candidates, *((candidates[i][0], "load") for i in (0, -2))):
            kernel = gen_append(16, heads, dim * 2 // 16, config=config, load=load).build_and_load(0)
            _page._append_kernel = lambda *_, k=kernel, c=config: (k, pdl_supported(0), c)  # type: ignore[assignment]
            _page.append_calls.clear()
            run, result = calls.append(pyinfer, *arguments)
            if not result().equal(want):
                raise SystemExit(f"{kernel.spec.name}: WRONG")
            _page.append_calls.clear()

            def timed(run: Any = run, config: Any = config, kernel: Any = kernel, store: dict[Any, Any] = {}) -> None:  # noqa: B006
                """The candidate's own remembered calls, not another's."""
                _page._append_kernel = lambda *_: (kernel, pdl_supported(0), config)  # type: ignore[assignment]
                _page.append_calls._found, _page.append_calls._recent = store.setdefault(kernel.spec.name, ({}, {}))
                run()

            variants.append((kernel.spec.name, timed))
        bench.table(
            f"append_paged_kv_cache {tokens} tokens",
            4.0 * tokens * heads * dim * 2,
            variants,
            lambda arguments=arguments: calls.append(peers.flashinfer("page"), *arguments)[0],
        )
    _page._append_kernel = original
    _page.append_calls.clear()


def rope(bench: Bench) -> None:
    """apply_rope_pos_ids_inplace and apply_rope_with_cos_sin_cache_inplace: every candidate in the operator's own place."""
    import torch

    from pyinfer import _rope
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.rope import gen_rope

    original = _rope._rope_kernel
    for tokens, shape in (*((t, (32, 8)) for t in TOKENS), (16384, (32, 32))):
        q, k = (randn((tokens, heads, 128), "bfloat16", "cuda") for heads in shape)
        positions = torch.randperm(32768, device="cuda")[:tokens].to(torch.int32)
        angle = torch.arange(32768, device="cuda").double()[:, None] * 10000.0 ** (
            -torch.arange(64, device="cuda").double() / 64
        )
        table = torch.cat([angle.cos(), angle.sin()], 1).float()
        angle = angle[positions.long()][:, None]
        x = torch.cat([q, k], dim=1).double()
        a, b = x[..., :64], x[..., 64:]
        want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
        for mode in ("pos_ids", "cache"):
            _rope_mode(bench, mode, q, k, positions, table, want, gen_rope, pdl_supported(0))
    _rope._rope_kernel = original
    _rope._calls.clear()


def _rope_mode(
    bench: Bench, mode: str, q: Any, k: Any, positions: Any, table: Any, want: Any, gen: Any, pdl: bool
) -> None:
    import pyinfer
    from pyinfer import _rope

    def call(module: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        if mode == "pos_ids":
            return calls.rope(module, q, k, positions)
        return calls.rope_cached(module, q, k, positions, table)

    from pyinfer.jit.rope import rope_candidates

    heads, dim = q.shape[1] + k.shape[1], q.shape[2]
    variants: list[Variant] = []
    for config in rope_candidates(dim // 16, heads):
        kernel = gen(mode, "bfloat16", dim, False, heads, config=config).build_and_load(0)
        store: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})

        def choose(kernel: Any = kernel, config: Any = config, store: Any = store) -> None:
            """The candidate's own kernel and remembered calls, not another's."""
            _rope._rope_kernel = lambda *_: (kernel, config.heads * config.unroll, pdl)  # type: ignore[assignment]
            _rope._calls._found, _rope._calls._recent = store

        choose()
        run, result = call(pyinfer)
        close(result().view(want.shape), want, kernel.spec.name)
        variants.append((kernel.spec.name, lambda run=run, choose=choose: (choose(), run())))
    tokens = len(q)
    name = "apply_rope_pos_ids_inplace" if mode == "pos_ids" else "apply_rope_with_cos_sin_cache_inplace"
    moved = 4.0 * tokens * heads * dim + (4.0 * tokens * dim if mode == "cache" else 0)
    bench.table(
        f"{name} {tokens} tokens {q.shape[1]}/{k.shape[1]}x{dim}",
        moved,
        variants,
        lambda: call(peers.flashinfer("rope"))[0],
    )


def rms(bench: Bench, quantize: str = "") -> None:
    """rmsnorm, plain or with 8-bit results."""
    import torch

    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import gen_rmsnorm, rmsnorm_candidates

    for rows, hidden in ((1, 4096), *SHAPES):
        x, weight = randn((rows, hidden), "bfloat16", "cuda"), randn((hidden,), "bfloat16", "cuda")
        out = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn if quantize else torch.bfloat16, device="cuda")
        scales = torch.full((rows, 1), 0.05, device="cuda")  # of which one counts, or all are written
        wide = x.double()
        want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        del wide
        variants: list[Variant] = []
        for c in rmsnorm_candidates(hidden // 8):
            kernel = gen_rmsnorm("bfloat16", hidden, quantize=quantize, config=c).build_and_load(0)
            pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), *((scales.data_ptr(),) if quantize else ()))
            last = (1.0,) if quantize == "tensor" else ()
            values = (*pointers, 0, hidden, 0, hidden, rows, rows, hidden, 1.0 / hidden, 1e-6, *last)
            grid = c.grid(rows)

            def run(kernel: Any = kernel, grid: int = grid, values: Any = values) -> None:
                kernel(stream(), grid, values, pdl_supported(0))

            out.view(torch.uint8).fill_(0x7F)
            run()
            if quantize:
                error = ((out.double() * scales.double() - want).abs() / (want.abs() + scales.double() / 64)).max()
                if not float(error) <= 1.01 / 16:  # half of e4m3's last place
                    raise SystemExit(f"{kernel.spec.name}: WRONG, error {float(error):.3e}")
            else:
                close(out, want, kernel.spec.name)
            registers = kernel.resources.registers
            name = kernel.spec.name.removeprefix("rmsnorm_bf16_")
            variants.append((f"{name} ({registers} regs, {kernel.blocks_per_sm()}/SM)", run))
        del want
        bench.table(
            f"rmsnorm {quantize} {rows}x{hidden}",
            (3.0 if quantize else 4.0) * rows * hidden,
            variants,
            lambda x=x, w=weight: calls.rmsnorm(peers.flashinfer("norm"), x, w),
        )


def quant(bench: Bench) -> None:
    """Operators with 8-bit results, as their callers call them."""
    rms(bench, "row")
    rms(bench, "tensor")
    bench.timer.seconds = 0.2  # one variant a table
    for rows, hidden in SHAPES[1:]:
        _quant(bench, rows, hidden)


def _quant(bench: Bench, rows: int, hidden: int) -> None:
    import torch

    import pyinfer

    x, residual, weight = (randn(s, "bfloat16", "cuda") for s in ((rows, hidden), (rows, hidden), (hidden,)))
    wide = randn((rows, 2 * hidden), "bfloat16", "cuda")
    out = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn, device="cuda")
    scale, scales = torch.full((1,), 0.01, device="cuda"), torch.empty((rows, 1), device="cuda")
    beta = randn((hidden,), "float32", "cuda")
    plain = torch.empty_like(x)
    n = float(rows * hidden)
    p = pyinfer
    for name, moved, run in (
        ("rmsnorm_quant", 3 * n, lambda: p.rmsnorm_quant(out, x, weight, scale)),
        ("fused_add_rmsnorm_quant", 7 * n, lambda: p.fused_add_rmsnorm_quant(out, x, residual, weight, scale)),
        ("fused_add_rmsnorm_dynamic_quant", 7 * n, lambda: p.fused_add_rmsnorm_dynamic_quant(x, residual, weight, 1e-6, out, scales)),
        ("silu_and_mul_quant", 5 * n, lambda: p.silu_and_mul_quant(out, wide, scale)),
        ("silu_and_mul_dynamic_quant", 5 * n, lambda: p.silu_and_mul_dynamic_quant(wide, out, scales)),
        ("layernorm", 4 * n, lambda: p.layernorm(x, beta, beta, out=plain)),
    ):  # fmt: skip
        bench.table(f"{name} {rows}x{hidden}", moved, [("pyinfer", run)], _no_peer)


def _no_peer() -> Callable[[], Any]:
    raise peers.Missing("not asked")


def fused(bench: Bench) -> None:
    """Rotation with rounding, with the append, page moves: as their callers call them."""
    bench.timer.seconds = 0.2  # one variant a table
    for tokens in TOKENS[1:]:
        _fused(bench, tokens)


def _fused(bench: Bench, tokens: int) -> None:
    import torch

    import pyinfer

    def ints(v: Any) -> Any:
        return torch.as_tensor(v, dtype=torch.int32, device="cuda")

    def zeros(*shape: int) -> Any:
        return torch.zeros(shape, device="cuda").to(fp8)

    def empty(*shape: int) -> Any:
        return torch.empty(shape, dtype=fp8, device="cuda")

    p, fp8 = pyinfer, torch.float8_e4m3fn
    append8 = p.rope_quantize_fp8_append_paged_kv_cache
    pages = -(-tokens // 16) + 1
    where, last = (
        (torch.zeros(tokens, dtype=torch.int32, device="cuda"), torch.arange(tokens, device="cuda").int()),
        ints([1]),
    )
    table = (torch.randperm(pages, device="cuda").int(), ints([0, pages]))
    index = (*table, *where)
    angles = torch.randn((32768, 64), device="cuda")
    angles, half = (torch.cat([a.cos(), a.sin()], 1) for a in (angles, angles[:, :32]))
    pos = torch.randperm(32768, device="cuda")[:tokens].int()
    q, k, v = (randn((tokens, h, 128), "bfloat16", "cuda") for h in (32, 8, 8))
    flat = (q.view(tokens, -1), k.view(tokens, -1))
    q_out, gathered = torch.empty_like(q), (torch.empty_like(k), torch.empty_like(v))
    cache = torch.zeros((pages, 2, 16, 8, 128), dtype=torch.bfloat16, device="cuda")
    small, outs = (
        (zeros(pages, 16, 8, 128), zeros(pages, 16, 8, 128)),
        {"q_rope_out": empty(tokens, 32, 128), "q_nope_out": empty(tokens, 32, 0)},
    )
    lq, lk = randn((tokens, 128, 576), "bfloat16", "cuda"), randn((tokens, 576), "bfloat16", "cuda")
    parts = (lq[..., 512:], lk[:, 512:], lq[..., :512], lk[:, :512])
    latent, latent_outs = (
        (zeros(pages, 16, 512), zeros(pages, 16, 64)),
        {"q_rope_out": empty(tokens, 128, 64), "q_nope_out": empty(tokens, 128, 512)},
    )
    pairs = (table[0][: pages // 2], table[0][pages // 2 : pages // 2 * 2])

    def apart() -> None:
        p.apply_rope_with_cos_sin_cache_inplace(pos, *flat, 128, angles)
        p.append_paged_kv_cache(k, v, *where, cache, *table, last)

    moved, kv = 48 * 128.0 * tokens, 16 * 128.0 * tokens
    for name, heads, slots, bytes_moved, run in (
        ("rope_append", 40, 8, 4 * moved, lambda: p.rope_append_paged_kv_cache(q, k, v, angles, pos, cache, *index, q_out=q_out)),
        ("rope_quantize_fp8_append", 40, 8, 3 * moved, lambda: append8(q, k, None, None, v, angles, pos, small, *index, **outs)),
        ("the same, latent", 129, 4, 3 * 129 * 576.0 * tokens, lambda: append8(*parts, None, half, pos, latent, *index, **latent_outs)),
    ):  # fmt: skip
        bench.table(f"{name} {tokens} tokens", bytes_moved, _fused_variants(heads, slots, run), _no_peer)
    for name, bytes_moved, run in (
        ("  rope in place, then append", 4 * moved, apart),
        ("append_paged_kv_cache to 8 bits", 3 * kv, lambda: p.append_paged_kv_cache(k, v, *where, small, *table, last, "NHD", 0.5, 0.5)),
        ("gather_paged_kv_cache", 4 * kv, lambda: p.gather_paged_kv_cache(*where, cache, *table, "NHD", *gathered)),
        ("copy_pages", 4 * 16 * 128.0 * (pages // 2 * 16), lambda: p.copy_pages(cache, *pairs)),
    ):  # fmt: skip
        bench.table(f"{name} {tokens} tokens", bytes_moved, [("pyinfer", run)], _no_peer)


def _fused_variants(heads: int, slots: int, run: Callable[[], Any]) -> list[Variant]:
    """Every candidate in the operator's own place."""
    from pyinfer import _rope_launch
    from pyinfer.jit import rope as jit

    variants: list[Variant] = []
    for config in jit.rope_candidates(slots, heads):
        store: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})

        def timed(config: Any = config, store: Any = store) -> None:
            """The candidate's own remembered calls, not another's."""
            jit.rope_config, original = lambda *_: config, jit.rope_config  # type: ignore[assignment]
            _rope_launch.calls._found, _rope_launch.calls._recent = store
            run()
            jit.rope_config = original

        variants.append((config.short, timed))
    return variants


def main() -> None:
    """Run what was named, everything by default."""
    operators = {"rms": rms, "silu": silu, "add": add, "append": append, "rope": rope, "quant": quant, "fused": fused}
    bench = Bench()
    for name in sys.argv[1:] or operators:
        operators[name](bench)


if __name__ == "__main__":
    main()
