"""Specs of fused_qk_rmsnorm_rope."""

from __future__ import annotations

import functools

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, u32, u64_array
from pyinfer.jit.spec import JitSpec


@functools.cache
def qk_norm_rope_params(pairs: int) -> ParamStruct:
    """The parameter struct for heads of `pairs` pairs, pointers first. The table of frequencies travels by value."""
    return ParamStruct(
        "QkNormRopeParams",
        ptr("qkv", "const scalar_t", "[tokens, heads of q, k and v, head_dim], tokens as rows of the norms"),
        ptr("q_weight", "const scalar_t", "[num_q_heads * head_dim]"),
        ptr("k_weight", "const scalar_t", "[num_k_heads * head_dim]"),
        *(ptr(f"{x}_out", "out_t", f"[tokens, num_{x}_heads, head_dim], contiguous") for x in ("q", "k", "v")),
        u64_array("frequency", pairs, "turns per step of the pair's coordinate, times 2^64"),
        i64("x_outer", "elements"),
        i64("x_inner", "elements"),
        u32("inner", ">= 1"),
        u32("seq_len", "frames * frame"),
        u32("frame", "places in a frame: height * width"),
        u32("width", "of a frame"),
        i32("num_q_heads"),
        i32("num_k_heads"),
        i32("num_v_heads"),
        i32("height_pairs", "the first pair that turns with the height"),
        i32("width_pairs", "the first pair that turns with the width"),
        f32("eps"),
        f32("attention_factor", "what cosines and sines are multiplied by"),
        f32("qk_factor", "what 8-bit queries and keys are multiplied by"),
        f32("v_factor"),
    )


@functools.cache
def gen_qk_norm_rope(
    dtype: str, out: str, head_dim: int, max_heads: int, interleave: bool, norm: bool, vec: int | None = None
) -> JitSpec:
    """The kernel for heads of `head_dim` elements.

    Parameters
    ----------
    dtype, out
        Of the input ("float16", "bfloat16" or "float32"), of the results (float8_e4m3fn, or dtype).
    max_heads
        Heads of q, k or v, whichever has most (decides the block's shape).
    interleave
        Pairs are neighbours.
    norm
        Normalise, before the rotation.
    vec
        Elements per access; default: what head_dim allows if pointers and strides are multiples of 16 bytes.
    """
    d, o = canonical_dtype(dtype), canonical_dtype(out)
    pairs = head_dim // 2
    v = vec or min(16 // d.itemsize, pairs & -pairs)
    slots = pairs // v
    unroll = -(-max_heads * slots // 512)
    heads = -(-max_heads // unroll)
    threads = 32 * -(-slots * heads // 32)
    constants = (
        ("scalar_t", d.ctype), ("out_t", o.ctype), ("VEC", v), ("PAIRS", pairs), ("HEADS", heads), ("UNROLL", unroll), ("THREADS", threads),
        ("INTERLEAVE", interleave), ("NORM", norm), ("SCALED", d is not o),
    )  # fmt: skip
    tags = f"{'' if norm else '_plain'}{'_interleave' if interleave else ''}"
    name = f"qk_norm_rope_{d.short}_{o.short}_d{head_dim}_v{v}_h{heads}_u{unroll}{tags}"
    params = qk_norm_rope_params(pairs)
    return JitSpec(name, "norm/qk_norm_rope.cu.jinja", params, constants, block=(threads, 1, 1))


def specs() -> list[JitSpec]:
    """What is worth building ahead (Wan's 12, 24 and 40 heads), and what is compiled for every architecture by the tests."""
    wan = [gen_qk_norm_rope("bfloat16", "bfloat16", 128, heads, True, True) for heads in (12, 24, 40)]
    return [
        *wan,
        gen_qk_norm_rope("bfloat16", "float8_e4m3fn", 128, 24, True, True),
        gen_qk_norm_rope("bfloat16", "bfloat16", 128, 24, False, True),
        gen_qk_norm_rope("float16", "float8_e4m3fn", 64, 3, False, False),
        gen_qk_norm_rope("float32", "float32", 256, 32, True, True),
        gen_qk_norm_rope("float16", "float16", 30, 7, False, True),
        gen_qk_norm_rope("bfloat16", "float8_e4m3fn", 256, 40, True, True, 1),
    ]
