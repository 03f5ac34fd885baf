"""Batch decode over a paged KV cache: head_dim 128, bf16, page 16 unless said otherwise. TB/s and limit: keys, values, queries and output, each once."""

from __future__ import annotations

from benchmarks import calls, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention

DEVICES = ("cuda", "cpu")
# (batch, KV length): BASELINES.md's decode table
SHAPES = ((1, 1024), (1, 32768), (1, 131072), (16, 1024), (16, 8192), (64, 1024), (64, 4096), (128, 2048), (256, 1024))
HEADS = ((32, 8), (64, 8), (32, 32))
TINY = ((1, 64), (3, 48))
SKEWED = [65536] + [512] * 63


def _name(length: int) -> str:
    return f"L{length // 1024}k" if length % 1024 == 0 else f"L{length}"


def run(ctx: Context) -> None:
    """All shapes for all head counts, then one batch with very uneven lengths, pages of one token, and 8-bit keys and values."""
    tiny = ctx.device == "cpu"
    for heads in ((4, 2),) if tiny else HEADS:
        for batch, length in TINY if tiny else SHAPES[::4] if ctx.quick else SHAPES:
            _measure(ctx, f"{heads[0]}/{heads[1]} b{batch} {_name(length)}", [length] * batch, heads)
    if not tiny:
        _measure(ctx, "32/8 b64 skewed 63×512+64k", SKEWED, (32, 8))
        for batch, length in ((64, 4096), (16, 1024)):
            _measure(ctx, f"32/8 b{batch} {_name(length)} page 1", [length] * batch, (32, 8), page_size=1)
            for kv_dtype in ("float8_e4m3fn", "float8_e5m2"):
                spec = f"32/8 b{batch} {_name(length)} {kv_dtype}"
                _measure(ctx, spec, [length] * batch, (32, 8), kv_dtype=kv_dtype)


def _measure(
    ctx: Context, spec: str, lengths: list[int], heads: tuple[int, int], page_size: int = 16, kv_dtype: str = ""
) -> None:
    case = Case("decode", spec)
    if not ctx.selected(case):
        return
    a = Attention(
        [1] * len(lengths),
        lengths,
        *heads,
        32 if ctx.device == "cpu" else 128,
        page_size,
        False,
        "float32" if ctx.device == "cpu" else "bfloat16",
        ctx.device,
        kv_dtype,
    )
    case = Case(
        "decode",
        spec,
        a.flops,
        a.bytes,
        info={
            "batch": len(lengths),
            "kv_tokens": sum(lengths),
            "heads": heads,
            "page_size": page_size,
            "head_dim": a.head_dim,
            "dtype": a.dtype,
            "kv_dtype": kv_dtype or a.dtype,
        },
    )

    def ours() -> calls.Run:
        import pyinfer

        return calls.decode(pyinfer, a)

    def gathered() -> calls.Run:
        raise peers.Missing("torch's attention reads no pages")

    if kv_dtype:  # of the peers, FlashInfer reads them, through modules of their own that take minutes to build: compared with our 16 bits
        ctx.measure(case, [("pyinfer", ours)])
        return

    ctx.measure(
        case,
        [
            ("pyinfer", ours),
            ("flashinfer cuda-core", lambda: calls.decode(peers.flashinfer("decode"), a, use_tensor_cores=False)),
            (
                "flashinfer fa2",
                lambda: calls.decode(peers.flashinfer("prefill_fa2"), a, use_tensor_cores=True, backend="fa2"),
            ),
            (
                "flashinfer fa3",
                lambda: calls.decode(peers.flashinfer("prefill_fa3"), a, use_tensor_cores=True, backend="fa3"),
            ),
            ("fa3", lambda: peers.fa3(a)),
            ("torch", gathered),
        ],
    )
