"""Operators that only move bytes: rmsnorm, fused_add_rmsnorm, silu_and_mul, rope, append. bf16. TB/s count what must
be read plus what must be written.
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


def run(ctx: Context) -> None:
    """All operators at all sizes."""
    tiny = ctx.device == "cpu"
    dtype = "float32" if tiny else "bfloat16"
    size = 4 if tiny else 2
    for rows, columns in ((3, 64), (8, 128)) if tiny else ROWS:
        spec = f"{rows}×{columns} {dtype}"
        n = rows * columns * size
        _norms(ctx, spec, rows, columns, dtype, n)
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
    for tokens in (3, 8) if tiny else TOKENS:
        _rope(ctx, tokens, dtype, size, (4, 2, 32) if tiny else (32, 8, 128))
        _append(ctx, tokens, dtype, size, (2, 32) if tiny else (8, 128))


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
