"""Attention with shared prefixes against the flat wrapper, and prefill with decode in one launch against the two apart. Page 16, head_dim 128, bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention

if TYPE_CHECKING:
    from benchmarks.calls import Run

DEVICES = ("cuda", "cpu")
# (prefix, requests, own tokens)
PREFIXES = ((32768, 64, 256), (8192, 64, 256), (2048, 16, 128), (32768, 256, 64))
# (tokens that prefill, decoding requests, their length)
MIXTURES = ((2048, 64, 4096), (4096, 128, 2048), (1024, 16, 8192), (512, 256, 1024))
HEADS = (32, 8)


def run(ctx: Context) -> None:
    """Cascade, then POD and BatchAttention."""
    tiny = ctx.device == "cpu"
    heads = (4, 2) if tiny else HEADS
    for prefix, batch, own in ((256, 3, 32),) if tiny else PREFIXES[:1] if ctx.quick else PREFIXES:
        _cascade(ctx, f"{heads[0]}/{heads[1]} {prefix}+{batch}×{own}", prefix, batch, own, heads)
    for prefill, batch, length in ((64, 3, 48),) if tiny else MIXTURES[:1] if ctx.quick else MIXTURES:
        _mixed(ctx, f"{heads[0]}/{heads[1]} p{prefill} d{batch}×{length}", prefill, batch, length, heads)


def _kind(ctx: Context) -> tuple[int, str]:
    return (32, "float32") if ctx.device == "cpu" else (128, "bfloat16")


def _cascade(ctx: Context, spec: str, prefix: int, batch: int, own: int, heads: tuple[int, int]) -> None:
    """The cache holds the prefix's pages once, then each request's own. Bytes and operations are those of the cascade: every key once."""
    if not ctx.selected(Case("cascade", spec)):
        return
    import numpy as np

    dim, dtype = _kind(ctx)
    a = Attention([1] * (1 + batch), [prefix] + [own] * batch, *heads, dim, 16, False, dtype, ctx.device)
    q = a.q[1:].contiguous()
    indptr, indices = a.kv_indptr.numpy(), a.kv_indices.cpu().numpy()
    shared, unique = indices[: indptr[1]], indices[indptr[1] :]
    pages = np.diff(indptr)[1:]
    case = Case(
        "cascade",
        spec,
        4.0 * batch * (prefix + own) * heads[0] * dim,
        a.kv_bytes + 2.0 * q.numel() * q.element_size(),
        info={"prefix": prefix, "batch": batch, "own": own, "heads": heads, "page_size": 16, "head_dim": dim, "dtype": dtype},
    )  # fmt: skip
    last = np.full(batch, own - (pages[0] - 1) * 16, np.int32)

    def ours() -> Run:
        import pyinfer

        wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(2)
        wrapper.plan(
            [[0, batch], np.arange(batch + 1)], [[0, len(shared)], indptr[1:] - indptr[1]], [shared, unique], [[(prefix - 1) % 16 + 1], last], *heads, dim,
            16, q_data_type=dtype,
        )  # fmt: skip
        return lambda: wrapper.run(q, (a.k, a.v))

    def flat() -> Run:
        import pyinfer

        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
        rows = [np.concatenate([shared, unique[i * pages[0] : (i + 1) * pages[0]]]) for i in range(batch)]
        at = np.arange(batch + 1) * (len(shared) + pages[0])
        wrapper.plan(at, np.concatenate(rows), last, *heads, dim, 16, q_data_type=dtype)
        return lambda: wrapper.run(q, (a.k, a.v))

    ctx.measure(case, [("pyinfer", ours), ("pyinfer flat", flat)])


def _mixed(ctx: Context, spec: str, prefill: int, batch: int, length: int, heads: tuple[int, int]) -> None:
    """A causal prefill of one request beside a decode batch; outputs are compared as one tensor, prefill first."""
    if not ctx.selected(Case("mixed", spec)):
        return
    import numpy as np
    import torch

    dim, dtype = _kind(ctx)
    lens = [prefill] + [length] * batch
    a = Attention([prefill] + [1] * batch, lens, *heads, dim, 16, True, dtype, ctx.device)
    case = Case(
        "mixed",
        spec,
        a.flops,
        a.bytes,
        info={"prefill": prefill, "batch": batch, "length": length, "heads": heads, "page_size": 16, "head_dim": dim, "dtype": dtype},
    )  # fmt: skip
    indptr, last = a.kv_indptr.numpy(), a.last_page_len.numpy()
    first = int(indptr[1])
    order = a.kv_indices[:first].long()
    k_p, v_p = (x[order].reshape(-1, heads[1], dim)[:prefill].contiguous() for x in (a.k, a.v))

    table = (indptr[1:] - indptr[1], a.kv_indices[first:].cpu().numpy(), last[1:])

    def batch_attention() -> Run:
        import pyinfer

        wrapper = pyinfer.BatchAttention()
        wrapper.plan(
            a.qo_indptr,
            indptr,
            a.kv_indices.cpu().numpy(),
            np.array(lens),
            *heads,
            dim,
            dim,
            16,
            causal=True,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return lambda: wrapper.run(a.q, (a.k, a.v))[0]

    def pod() -> tuple[Run, Run]:
        import pyinfer

        wrapper = pyinfer.PODWithPagedKVCacheWrapper()
        wrapper.plan(*table, *heads, dim, 16, q_data_type=dtype)

        def call() -> Any:
            return wrapper.run(a.q[:prefill], k_p, v_p, a.q[prefill:], (a.k, a.v), causal_p=True)

        return call, lambda: torch.cat(call())

    def apart() -> tuple[Run, Run]:
        import pyinfer

        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
        wrapper.plan(*table, *heads, dim, 16, q_data_type=dtype)

        def call() -> Any:
            out_p = pyinfer.single_prefill_with_kv_cache(a.q[:prefill], k_p, v_p, causal=True)
            return out_p, wrapper.run(a.q[prefill:], (a.k, a.v))

        return call, lambda: torch.cat(call())

    def one_prefill() -> Run:
        import pyinfer

        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
        wrapper.plan(
            a.qo_indptr, indptr, a.kv_indices.cpu().numpy(), last, *heads, dim, 16, causal=True, q_data_type=dtype
        )
        return lambda: wrapper.run(a.q, (a.k, a.v))

    ctx.measure(
        case,
        [("pyinfer BatchAttention", batch_attention), ("pyinfer POD", pod), ("pyinfer apart", apart), ("pyinfer batch prefill", one_prefill)],
    )  # fmt: skip
