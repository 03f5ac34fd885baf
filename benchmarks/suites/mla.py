"""Multi-head latent attention (512 + 64) over pages of 64: decode with 16 and 128 heads, and prefill. Latent rows count once, as keys and values."""

from __future__ import annotations

from benchmarks import calls
from benchmarks.harness import Case, Context
from benchmarks.inputs import randn

DEVICES = ("cuda", "cpu")
SCALE = (128 + 64) ** -0.5
# (heads, batch, query tokens, KV length): DeepSeek-V3 on 8 GPUs and on one, its speculative decode, and a prefill chunk
SHAPES = (
    (128, 64, 1, 4096),
    (128, 1, 1, 32768),
    (16, 64, 1, 4096),
    (16, 256, 1, 1024),
    (16, 1, 1, 32768),
    (128, 64, 2, 8192),
    (128, 4, 1024, 1024),
)
TINY = ((16, 2, 1, 64), (16, 1, 8, 48))


def run(ctx: Context) -> None:
    """All shapes."""
    tiny = ctx.device == "cpu"
    for heads, batch, tokens, length in TINY if tiny else SHAPES[::3] if ctx.quick else SHAPES:
        _measure(ctx, heads, batch, tokens, length)


def _measure(ctx: Context, heads: int, batch: int, tokens: int, length: int) -> None:
    import torch

    spec = f"h{heads} b{batch} q{tokens} kv{length}"
    if not ctx.selected(Case("mla", spec)):
        return
    dtype = "float32" if ctx.device == "cpu" else "bfloat16"
    page_size = 64
    pages = -(-length // page_size)
    q = randn((batch * tokens, heads, 576), dtype, ctx.device)
    cache = randn((batch * pages, page_size, 576), dtype, ctx.device)
    pairs = batch * (tokens * length - tokens * (tokens - 1) // 2)
    nbytes = (batch * length * 576 + q.shape[0] * heads * (576 + 512)) * q.element_size()
    case = Case("mla", spec, 2.0 * pairs * heads * (576 + 512), float(nbytes), info={"page_size": 64, "dtype": dtype})
    rows = torch.arange(batch + 1, dtype=torch.int32)
    kv_len = torch.full((batch,), length, dtype=torch.int32)
    indices = torch.randperm(batch * pages, dtype=torch.int32).to(ctx.device)

    def ours() -> calls.Run:
        import pyinfer

        wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
        kind = getattr(torch, dtype)
        wrapper.plan(rows * tokens, rows * pages, indices, kv_len, heads, 512, 64, page_size, True, SCALE, kind, kind)
        out = torch.empty((q.shape[0], heads, 512), dtype=kind, device=ctx.device)
        parts = (q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:])
        return lambda: wrapper.run(*parts, out=out)

    ctx.measure(case, [("pyinfer", ours)])
