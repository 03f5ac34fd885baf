"""Attention variants: a soft cap built in, in Python and as CUDA source, on one decode and one prefill; and sigmoid attention, which is not built in."""

from __future__ import annotations

import math
from typing import Any

from benchmarks import calls
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention

DEVICES = ("cuda", "cpu")
CAP = 30.0
SOURCE = """
PYINFER_DEVICE float user_logits_transform(const Params& p, float logit, const VariantPlace& at) {
    const float inverse = rcp_approx(1.0f + exp2_approx(logit * (2.0f * LOG2_E / p.cap)));
    return p.cap - 2.0f * p.cap * inverse;
}
"""


def capped(score, cap):
    """The soft cap as a user writes it."""
    return cap * math.tanh(score / cap)


def sigmoid(score, offset):
    """A weight for each key by itself (Ramapuram et al., arXiv 2409.04431)."""
    return 1 / (1 + math.exp(-(score + offset)))


def run(ctx: Context) -> None:
    """Decode of 64 requests over 4096 tokens each, prefill of 4096 tokens."""
    tiny = ctx.device == "cpu"
    dtype, dim, heads = ("float32", 32, (4, 2)) if tiny else ("bfloat16", 128, (32, 8))
    batch, length = (2, 48) if tiny else (64, 4096)
    decode = ([1] * batch, [length] * batch, *heads, dim, 16, False, dtype, ctx.device)
    prefill = ([length], [length], *heads, dim, 0, True, dtype, ctx.device)
    name = f"L{length // 1024}k" if length >= 1024 else f"L{length}"
    for op, spec, shape in (
        ("decode", f"{heads[0]}/{heads[1]} b{batch} {name}", decode),
        ("prefill", f"{heads[0]}/{heads[1]} b1 {name} causal", prefill),
    ):
        if ctx.selected(Case("variants", f"{op} soft cap {spec}")) or ctx.selected(
            Case("variants", f"{op} sigmoid {spec}")
        ):
            _measure(ctx, op, spec, Attention(*shape))


def _call(op: str, a: Attention, variant: Any = None, values: tuple[Any, ...] = (), cap: float = 0.0) -> calls.Run:
    import torch

    import pyinfer

    dtype = getattr(torch, a.dtype)
    out = torch.empty_like(a.q)
    options = dict(q_data_type=dtype, logits_soft_cap=cap)
    heads = (a.num_qo_heads, a.num_kv_heads, a.head_dim)
    if op == "decode":
        wrapper: Any = pyinfer.BatchDecodeWithPagedKVCacheWrapper(variant=variant)
        wrapper.plan(a.kv_indptr, a.kv_indices, a.last_page_len, *heads, a.page_size, **options)
        return lambda: wrapper.run(a.q, (a.k, a.v), *values, out=out)
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(variant=variant)
    wrapper.plan(a.qo_indptr, a.kv_indptr, *heads, causal=True, **options)
    return lambda: wrapper.run(a.q, a.k, a.v, *values, out=out)


def _measure(ctx: Context, op: str, spec: str, a: Attention) -> None:
    from pyinfer import AttentionVariant

    params = {"cap": "float32"}
    python = AttentionVariant("capped", logits=capped, params=params)
    cuda = AttentionVariant("capped_cuda", logits=capped, params=params, cuda_source=SOURCE)
    ours = [
        ("pyinfer built in", lambda: _call(op, a, cap=CAP)),
        ("pyinfer Python", lambda: _call(op, a, python, (CAP,))),
        ("pyinfer CUDA source", lambda: _call(op, a, cuda, (CAP,))),
    ]
    info = {"batch": len(a.kv_lens), "kv_tokens": sum(a.kv_lens), "dtype": a.dtype, "head_dim": a.head_dim}
    ctx.measure(Case("variants", f"{op} soft cap {spec}", a.flops, a.bytes, info=info), ours)
    weights = AttentionVariant("sigmoid", logits=sigmoid, params={"offset": "float32"}, use_softmax=False)
    offset = -math.log(a.kv_lens[0])
    one = [("pyinfer Python", lambda: _call(op, a, weights, (offset,)))]
    ctx.measure(Case("variants", f"{op} sigmoid {spec}", a.flops, a.bytes, info=info), one)
