"""Prefill, 32/8 heads, head_dim 128, bf16 and fp8: ragged and over pages of 16. TFLOP/s count the visible pairs only (half of them under causality)."""

from __future__ import annotations

from benchmarks import calls, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention

DEVICES = ("cuda", "cpu")
# (batch, length, causal, page size; 0: ragged)
SHAPES = (
    (1, 4096, True, 0),
    (1, 16384, True, 0),
    (1, 16384, False, 0),
    (8, 2048, True, 0),
    (32, 512, True, 0),
    (1, 16384, True, 16),
    (8, 2048, True, 16),
)
FP8_SHAPES = ((1, 16384, True, 0), (1, 16384, False, 0), (8, 2048, True, 0), (1, 16384, True, 16))
"""With queries, keys and values in float8_e4m3fn."""
TINY = ((1, 64, True, 0), (2, 48, False, 0), (2, 48, True, 16))


def run(ctx: Context) -> None:
    """All shapes."""
    tiny = ctx.device == "cpu"
    shapes = TINY if tiny else SHAPES[::3] if ctx.quick else SHAPES
    dtype = "float32" if tiny else "bfloat16"
    fp8 = TINY[-1:] if tiny else FP8_SHAPES[:2] if ctx.quick else FP8_SHAPES
    for (batch, length, causal, page), kind in [(x, dtype) for x in shapes] + [(x, "float8_e4m3fn") for x in fp8]:
        name = f"{length // 1024}k" if length % 1024 == 0 else str(length)
        heads = (4, 2) if tiny else (32, 8)
        spec = (
            f"{heads[0]}/{heads[1]} b{batch} {name} {'causal' if causal else 'full'}"
            + (f" page {page}" if page else "")
            + (" fp8" if kind != dtype else "")
        )
        if ctx.selected(Case("prefill", spec)):
            _measure(
                ctx,
                spec,
                Attention(
                    [length] * batch,
                    [length] * batch,
                    *heads,
                    32 if tiny else 128,
                    page,
                    causal,
                    kind,
                    ctx.device,
                ),
            )


def _measure(ctx: Context, spec: str, a: Attention) -> None:
    def ours() -> calls.Run:
        import pyinfer

        return calls.prefill(pyinfer, a)

    others = [
        ("flashinfer fa2", lambda: calls.prefill(peers.flashinfer("prefill_fa2"), a, backend="fa2")),
        ("flashinfer fa3", lambda: calls.prefill(peers.flashinfer("prefill_fa3"), a, backend="fa3")),
        ("torch cudnn", lambda: peers.torch_sdpa(a, "cudnn")),
        ("torch flash", lambda: peers.torch_sdpa(a, "flash")),
    ]
    ctx.measure(
        Case(
            "prefill",
            spec,
            a.flops,
            a.bytes,
            info={
                "batch": len(a.qo_lens),
                "length": a.qo_lens[0],
                "causal": a.causal,
                "page_size": a.page_size,
                "dtype": a.dtype,
            },
            tolerance=1e-2 if a.out_dtype == a.dtype else 6e-2,  # weights of 8 bits: 2.6% each way
        ),
        [
            ("pyinfer", ours),
            ("fa3", lambda: peers.fa3(a)),
            *(
                others if a.out_dtype == a.dtype else []
            ),  # of 8 bits, FlashAttention-3 alone has a kernel to measure here
        ],
    )
