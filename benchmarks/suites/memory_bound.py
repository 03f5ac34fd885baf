"""Operators that only move bytes: norms, gated activations, rope, append, their forms with 8-bit results, the fused ones, page
moves. bf16. TB/s count what must be read plus what must be written.

The limit is a copy of 1 GiB; `copy` lines are copies of as many bytes as an operator moves: what a launch, its beginning and its end leave of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import calls, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention, randn

DEVICES = ("cuda", "cpu")
ROWS = ((1, 4096), (128, 4096), (4096, 4096), (16384, 8192))
TOKENS = (1, 128, 4096, 16384)
HEADS = (*((n, 32, 8) for n in TOKENS), (16384, 32, 32))
"""Tokens, heads of queries and of keys: Llama 3 8B's, and Llama 2 7B's, whose queries and keys, and keys and values, are 16384 x 8192 elements."""


def run(ctx: Context) -> None:
    """All operators at all sizes."""
    tiny = ctx.device == "cpu"
    dtype = "float32" if tiny else "bfloat16"
    size = 4 if tiny else 2
    for moved in (1e5,) if tiny else (4 * 4096 * 4096, *(4 * 16384 * columns for columns in (2048, 5120, 8192))):
        _copy(ctx, moved)
    for rows, columns in ((3, 64), (8, 128)) if tiny else ROWS:
        spec = f"{rows}×{columns} {dtype}"
        n = rows * columns * size
        _norms(ctx, spec, rows, columns, dtype, n)
        _quantized(ctx, spec, rows, columns, dtype, size)
        case = Case("silu_and_mul", spec, bytes=3.0 * n)
        if ctx.selected(case):
            x = randn((rows, 2 * columns), dtype, ctx.device)
            _measure(
                ctx,
                case,
                "activation",
                lambda m, x=x: calls.silu_and_mul(m, x),
                lambda style, x=x: _elementwise(style).silu_and_mul(x),
            )
    for tokens, q_heads, kv_heads in ((3, 4, 2), (8, 4, 4)) if tiny else HEADS:
        dim = 32 if tiny else 128
        _rope(ctx, tokens, dtype, size, (q_heads, kv_heads, dim))
        _append(ctx, tokens, dtype, size, (kv_heads, dim))
    for tokens in (3, 8) if tiny else TOKENS:
        _fused(ctx, tokens, "float16" if tiny else dtype, (4, 2, 32) if tiny else (32, 8, 128))


def _copy(ctx: Context, moved: float) -> None:
    """A copy of half as many bytes."""
    import torch

    case = Case("copy", f"{moved / 1e6:.0f} MB read and written", bytes=moved)
    if not ctx.selected(case):
        return
    source = torch.randint(0, 255, (int(moved) // 2,), dtype=torch.uint8, device=ctx.device)
    target = torch.empty_like(source)
    (samples,) = ctx.timer.measure([lambda: target.copy_(source)])
    ctx.keep(case, [{"name": "torch copy_", "status": "ok", **ctx.figures(case, samples)}])


def _elementwise(style: str) -> Any:
    from benchmarks import elementwise

    return elementwise.STYLES[style]


def _measure(
    ctx: Context, case: Case, module: str, call: Callable[[Any], Any], other: Callable[[str], Any] | None = None
) -> None:
    """Ours and FlashInfer's by the same call; torch, torch.compile and Triton where they are written."""

    def ours() -> Any:
        import pyinfer

        return call(pyinfer)

    variants = [("pyinfer", ours), ("flashinfer", lambda: call(peers.flashinfer(module)))]
    if other is not None:
        variants += [(style, lambda style=style: other(style)) for style in ("torch", "torch-compile", "triton")]
    ctx.measure(case, variants)


def _norms(ctx: Context, spec: str, rows: int, columns: int, dtype: str, n: int) -> None:
    plain, fused = Case("rmsnorm", spec, bytes=2.0 * n), Case("fused_add_rmsnorm", spec, bytes=4.0 * n)
    if not (ctx.selected(plain) or ctx.selected(fused)):
        return
    x, residual, weight = (randn(shape, dtype, ctx.device) for shape in ((rows, columns), (rows, columns), (columns,)))
    _measure(
        ctx, plain, "norm", lambda m: calls.rmsnorm(m, x, weight), lambda style: _elementwise(style).rmsnorm(x, weight)
    )
    _measure(
        ctx,
        fused,
        "norm",
        lambda m: calls.fused_add_rmsnorm(m, x, residual, weight),
        lambda style: _elementwise(style).fused_add_rmsnorm(x, residual, weight),
    )


def _quantized(ctx: Context, spec: str, rows: int, columns: int, dtype: str, size: int) -> None:
    """8-bit results; layernorm. What ours makes is checked by the peers only where they have the operator: the tests check the rest."""
    n = float(rows * columns)
    read, residual_too, pair = n * (size + 1), n * (3 * size + 1), n * (2 * size + 1)
    cases = {
        name: Case(name, spec, bytes=moved, tolerance=0.05)
        for name, moved in (
            ("rmsnorm_quant", read),
            ("fused_add_rmsnorm_quant", residual_too),
            ("rmsnorm_dynamic_quant", read),
            ("silu_and_mul_quant", pair),
            ("silu_and_mul_dynamic_quant", pair),
            ("layernorm", 2 * n * size),
        )
    }
    if not any(map(ctx.selected, cases.values())):
        return
    x, residual, weight = (randn(shape, dtype, ctx.device) for shape in ((rows, columns), (rows, columns), (columns,)))
    wide = randn((rows, 2 * columns), dtype, ctx.device)
    scale = x.new_full((1,), 0.02).float()
    for name, module, call in (
        ("rmsnorm_quant", "norm", lambda m: calls.rmsnorm_quant(m, x, weight, scale)),
        ("fused_add_rmsnorm_quant", "norm", lambda m: calls.fused_add_rmsnorm_quant(m, x, residual, weight, scale)),
        ("rmsnorm_dynamic_quant", "norm", lambda m: calls.rmsnorm_dynamic_quant(m, x, weight)),
        ("silu_and_mul_quant", "activation", lambda m: calls.silu_and_mul_quant(m, wide, False)),
        ("silu_and_mul_dynamic_quant", "activation", lambda m: calls.silu_and_mul_quant(m, wide, True)),
        ("layernorm", "norm", lambda m: calls.layernorm(m, x, weight)),
    ):
        _measure(ctx, cases[name], module, call)


def _fused(ctx: Context, tokens: int, dtype: str, shape: tuple[int, int, int]) -> None:
    """Rotation with append, with rounding; append with rounding; gather; copies of pages."""
    q_heads, kv_heads, dim = shape
    q, kv = float(tokens * q_heads * dim), float(2 * tokens * kv_heads * dim)
    spec, cache_spec = (
        f"{tokens} tokens {q_heads}/{kv_heads}×{dim} {dtype}",
        f"{tokens} tokens {kv_heads}×{dim} page 16 {dtype}",
    )
    angles = 4.0 * tokens * dim
    half_pages = (-(-tokens // 16) + 1) // 2 * 16 * kv_heads * dim * 2.0
    together, rounded = (
        Case("rope_append_paged_kv_cache", spec, bytes=4 * (q + kv) + angles),
        Case("rope_quantize_fp8_append_paged_kv_cache", spec, bytes=3 * (q + kv) + angles, tolerance=0.05),
    )
    small = Case("append_paged_kv_cache to 8 bits", cache_spec, bytes=3 * kv)
    out, moved = (
        Case("gather_paged_kv_cache", cache_spec, bytes=4 * kv),
        Case("copy_pages", cache_spec, bytes=4 * half_pages),
    )
    if not any(map(ctx.selected, (together, rounded, small, out, moved))):
        return
    a = calls.Fused(tokens, q_heads, kv_heads, dim, dtype, ctx.device)
    ctx.measure(
        together,
        [
            ("pyinfer", lambda: calls.rope_append(_ours(), a)),
            ("pyinfer apart", lambda: calls.rope_then_append(_ours(), a)),
            ("flashinfer apart", lambda: calls.rope_then_append(_both(), a)),
        ],
    )
    _measure(ctx, rounded, "rope", lambda m: calls.rope_quantize_append(m, a))
    for case, call in ((small, calls.append_quantized), (out, calls.gather), (moved, calls.copy_pages)):
        ctx.measure(case, [("pyinfer", lambda call=call: call(_ours(), a))])


def _ours() -> Any:
    import pyinfer

    return pyinfer


def _both() -> Any:
    """FlashInfer, if rope and page are built."""
    peers.flashinfer("page")
    return peers.flashinfer("rope")


def _rope(ctx: Context, tokens: int, dtype: str, size: int, shape: tuple[int, int, int]) -> None:
    import torch

    q_heads, kv_heads, dim = shape
    moved = 2.0 * tokens * (q_heads + kv_heads) * dim * size
    spec = f"{tokens} tokens {q_heads}/{kv_heads}×{dim} {dtype}"
    by_position = Case("apply_rope_pos_ids_inplace", spec, bytes=moved)
    by_cache = Case("apply_rope_with_cos_sin_cache_inplace", spec, bytes=moved + 4.0 * tokens * dim)
    if not (ctx.selected(by_position) or ctx.selected(by_cache)):
        return
    q, k = randn((tokens, q_heads, dim), dtype, ctx.device), randn((tokens, kv_heads, dim), dtype, ctx.device)
    positions = torch.randperm(max(tokens, 32768), device=ctx.device)[:tokens].to(torch.int32)
    angles = torch.arange(max(tokens, 32768), device=ctx.device)[:, None] * 10000.0 ** (
        -torch.arange(0, dim, 2, device=ctx.device) / dim
    )
    table = torch.cat([angles.cos(), angles.sin()], dim=1).float().contiguous()
    _measure(ctx, by_position, "rope", lambda m: calls.rope(m, q, k, positions))
    _measure(ctx, by_cache, "rope", lambda m: calls.rope_cached(m, q, k, positions, table))


def _append(ctx: Context, tokens: int, dtype: str, size: int, shape: tuple[int, int]) -> None:
    """`tokens` new tokens, spread over up to 64 requests, at the end of each request's pages."""
    import torch

    heads, dim = shape
    case = Case(
        "append_paged_kv_cache",
        f"{tokens} tokens {heads}×{dim} page 16 {dtype}",
        bytes=4.0 * tokens * heads * dim * size,
    )
    if not ctx.selected(case):
        return
    batch = min(tokens, 64)
    new = [tokens // batch + (i < tokens % batch) for i in range(batch)]
    a = Attention(new, [n + 37 for n in new], heads, heads, dim, 16, True, dtype, ctx.device)
    where = torch.tensor([i for i, n in enumerate(new) for _ in range(n)], dtype=torch.int32, device=ctx.device)
    positions = torch.tensor([37 + j for n in new for j in range(n)], dtype=torch.int32, device=ctx.device)
    key, value = randn((tokens, heads, dim), dtype, ctx.device), randn((tokens, heads, dim), dtype, ctx.device)
    _measure(ctx, case, "page", lambda m: calls.append(m, a, key, value, where, positions))
