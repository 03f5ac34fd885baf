"""Multi-head latent attention (512 + 64): decode with 16 and 128 heads, and prefill, causal. Latent rows count once, as keys and values.

Peers: FlashMLA (pages of 64, as many query tokens in every request) and FlashInfer's fa3 backend; on Hopper also our kernel of the sm80 family.
"""

from __future__ import annotations

from benchmarks import calls, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import randn

DEVICES = ("cuda", "cpu")
SCALE = (128 + 64) ** -0.5
# (heads, batch, query tokens, KV length, page size): DeepSeek-V3 on one GPU and on 8, from a single request to a full device; its speculative decode; a
# prefill chunk; small pages
SHAPES = (
    (128, 64, 1, 4096, 64),
    (128, 128, 1, 2048, 64),
    (128, 128, 1, 8192, 64),
    (128, 1, 1, 8192, 64),
    (128, 1, 1, 32768, 64),
    (128, 16, 1, 1024, 64),
    (128, 64, 2, 8192, 64),
    (128, 64, 1, 4096, 1),
    (128, 64, 1, 4096, 16),
    (16, 64, 1, 4096, 64),
    (16, 64, 4, 4096, 64),
    (16, 256, 1, 1024, 64),
    (16, 1, 1, 32768, 64),
    (128, 4, 1024, 1024, 64),
)
TINY = ((16, 2, 1, 64, 64), (16, 1, 8, 48, 64))


def run(ctx: Context) -> None:
    """All shapes."""
    tiny = ctx.device == "cpu"
    for shape in TINY if tiny else SHAPES[::4] if ctx.quick else SHAPES:
        _measure(ctx, *shape)


def _measure(ctx: Context, heads: int, batch: int, tokens: int, length: int, page_size: int) -> None:
    import torch

    spec = f"h{heads} b{batch} q{tokens} kv{length}" + (f" page{page_size}" if page_size != 64 else "")
    if not ctx.selected(Case("mla", spec)):
        return
    dtype = "float32" if ctx.device == "cpu" else "bfloat16"
    pages = -(-length // page_size)
    q = randn((batch * tokens, heads, 576), dtype, ctx.device)
    cache = randn((batch * pages, page_size, 576), dtype, ctx.device)
    pairs = batch * (tokens * length - tokens * (tokens - 1) // 2)
    nbytes = (batch * length * 576 + q.shape[0] * heads * (576 + 512)) * q.element_size()
    info = {"page_size": page_size, "dtype": dtype}
    case = Case("mla", spec, 2.0 * pairs * heads * (576 + 512), float(nbytes), info=info)
    rows = torch.arange(batch + 1, dtype=torch.int32)
    indices = torch.randperm(batch * pages, dtype=torch.int32).to(ctx.device)
    arguments = (q, cache, rows * tokens, rows * pages, indices, torch.full((batch,), length, dtype=torch.int32), SCALE)

    def ours(backend: str = "auto") -> calls.Run:
        import pyinfer

        return calls.mla(pyinfer, *arguments, backend=backend)

    variants = [
        ("pyinfer", ours),
        ("flashmla", lambda: peers.flashmla(*arguments)),
        ("flashinfer fa3", lambda: calls.mla(peers.flashinfer("mla_fa3"), *arguments, backend="fa3")),
    ]
    if _on_hopper(ctx):
        variants.insert(1, ("pyinfer sm80", lambda: ours("fa2")))
    ctx.measure(case, variants)


def _on_hopper(ctx: Context) -> bool:
    """Whether there is a second family of ours to time."""
    if ctx.device != "cuda":
        return False
    from pyinfer.core.device import arch_number_of

    return arch_number_of(0) == 90
