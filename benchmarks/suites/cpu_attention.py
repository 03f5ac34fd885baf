"""The CPU backend against torch's scaled_dot_product_attention, two threads each, float32, 32/8 heads, head_dim 128.

torch reads no pages, so its time of paged decode counts the gather that it needs. It is called in each of three ways,
the best one counts: grouped heads by enable_gqa, KV heads repeated, and the group folded into the query axis (decode
only, where no mask is needed).
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks import calls
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention

DEVICES = ("cpu",)
THREADS = 2


def run(ctx: Context) -> None:
    """Paged decode and causal prefill, on two threads, whatever the machine has."""
    import torch

    before, ours = torch.get_num_threads(), _set_pyinfer_threads(THREADS)
    torch.set_num_threads(THREADS)
    try:
        heads, dim = ((4, 2), 32) if ctx.quick else ((32, 8), 128)
        batch, length = (2, 64) if ctx.quick else (16, 2048)
        _decode(ctx, Attention([1] * batch, [length] * batch, *heads, dim, 16, False, "float32", "cpu"))
        length = 64 if ctx.quick else 2048
        _prefill(ctx, Attention([length], [length], *heads, dim, 0, True, "float32", "cpu"))
    finally:
        torch.set_num_threads(before)
        _set_pyinfer_threads(ours)


def _set_pyinfer_threads(n: int) -> int:
    """Set the backend's number of threads and return what it was."""
    try:
        from pyinfer.cpu import threads
    except ImportError:
        os.environ["PYINFER_NUM_THREADS"] = str(n)
        return n
    before = threads.get_num_threads()
    threads.set_num_threads(n)
    return before


def _ours(call: Any, a: Attention) -> Any:
    import pyinfer

    return call(pyinfer, a)


def _decode(ctx: Context, a: Attention) -> None:
    import torch
    import torch.nn.functional as F

    batch, group = len(a.kv_lens), a.num_qo_heads // a.num_kv_heads
    q = a.q.view(batch, a.num_qo_heads, 1, a.head_dim)
    folded = a.q.view(batch, a.num_kv_heads, group, a.head_dim)

    def by_gqa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, *a.dense_kv(), enable_gqa=True).view(a.q.shape)

    def by_repeating() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, *a.dense_kv(expand_heads=True)).view(a.q.shape)

    def by_folding() -> torch.Tensor:
        return F.scaled_dot_product_attention(folded, *a.dense_kv()).view(a.q.shape)

    spec = f"paged decode {a.num_qo_heads}/{a.num_kv_heads} b{batch} L{a.kv_lens[0]} page 16 float32, {THREADS} threads"
    ctx.measure(
        Case("cpu", spec, a.flops, a.bytes, tolerance=1e-4),
        [
            ("pyinfer", lambda: _ours(calls.decode, a)),
            ("torch enable_gqa", lambda: by_gqa),
            ("torch repeated heads", lambda: by_repeating),
            ("torch folded group", lambda: by_folding),
        ],
    )


def _prefill(ctx: Context, a: Attention) -> None:
    import torch.nn.functional as F

    q, (k, v), (wide_k, wide_v) = a.q.transpose(0, 1)[None], a.dense_kv(), a.dense_kv(expand_heads=True)

    def by_gqa() -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def by_repeating() -> Any:
        return F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)

    def in_our_layout(run: Any) -> Any:
        return run, lambda: run()[0].transpose(0, 1)

    spec = f"prefill {a.num_qo_heads}/{a.num_kv_heads} {a.qo_lens[0]} causal float32, {THREADS} threads"
    ctx.measure(
        Case("cpu", spec, a.flops, a.bytes, tolerance=1e-4),
        [
            ("pyinfer", lambda: _ours(calls.prefill, a)),
            ("torch enable_gqa", lambda: in_our_layout(by_gqa)),
            ("torch repeated heads", lambda: in_our_layout(by_repeating)),
        ],
    )
