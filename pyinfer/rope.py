"""Rotary position embedding of queries and keys, plain and as in Llama 3.1.

Pairs of the first `rotary_dim` elements of every head are rotated by ``position * f_i``, ``f_i = rope_theta^(-2 i / rotary_dim) / rope_scale``;
the rest is copied. All arithmetic is in float32, but for the angles: those are fractions of a turn in 64-bit integers, exact at any
position (see `pyinfer.jit.rope.frequency_table`).
"""

from __future__ import annotations

from typing import Any

from pyinfer._rope import rope_cached, rope_indptr, rope_pos_ids
from pyinfer.torch_ops import attach

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "mla_rope_quantize_fp8",
    "rope_append_paged_kv_cache",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
]


def apply_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """Rotate q and k of a batch of requests.

    Parameters
    ----------
    q, k
        [nnz, num_qo_heads, head_dim] and [nnz, num_kv_heads, head_dim], float16, bfloat16 or float32; any strides but a contiguous last axis.
    indptr
        int32 or int64 [batch + 1]: request b owns rows indptr[b] to indptr[b+1] - 1. Rows of no request are copied.
    offsets
        [batch], dtype of indptr: the position of each request's first row.
    rotary_dim
        Elements of a head that are rotated, even, at most 512; head_dim if None.
    interleave
        False: pairs are (i, i + rotary_dim / 2), as in Llama; True: (2i, 2i + 1), as in GPT-J.
    rope_scale, rope_theta
        Pair i turns by rope_theta^(-2i/rotary_dim) / rope_scale radians per position.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Returns
    -------
    Tensors of the shapes of q and k.

    Raises
    ------
    TypeError
        For a dtype not listed.
    ValueError
        For shapes, devices, rotary_dim or scales that do not fit.
    """
    return rope_indptr(
        "apply_rope", q, k, indptr, offsets, rotary_dim, interleave, (rope_scale, rope_theta), False, enable_pdl
    )


def apply_rope_inplace(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    enable_pdl: bool | None = None,
) -> None:
    """As `apply_rope`, overwriting q and k."""
    rope_indptr(
        "apply_rope_inplace", q, k, indptr, offsets, rotary_dim, interleave, (rope_scale, rope_theta), True, enable_pdl
    )


def apply_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """As `apply_rope`, with the position of every row given: `pos_ids`, int32 or int64 [nnz]."""
    return rope_pos_ids(
        "apply_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, (rope_scale, rope_theta), False, enable_pdl
    )


def apply_rope_pos_ids_inplace(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
    enable_pdl: bool | None = None,
) -> None:
    """As `apply_rope_pos_ids`, overwriting q and k."""
    rope_pos_ids(
        "apply_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, (rope_scale, rope_theta), True, enable_pdl
    )


def apply_llama31_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """As `apply_rope`, with Llama 3.1's frequencies: f becomes (1 - s) f / rope_scale + s f.

    s = clamp((old_context_len f / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1): wave lengths short against the
    original context stay, long ones are stretched by rope_scale.
    """
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return rope_indptr("apply_llama31_rope", q, k, indptr, offsets, rotary_dim, interleave, key, False, enable_pdl)


def apply_llama31_rope_inplace(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    enable_pdl: bool | None = None,
) -> None:
    """As `apply_llama31_rope`, overwriting q and k."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rope_indptr("apply_llama31_rope_inplace", q, k, indptr, offsets, rotary_dim, interleave, key, True, enable_pdl)


def apply_llama31_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """As `apply_llama31_rope`, with the position of every row given: `pos_ids`, int32 or int64 [nnz]."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return rope_pos_ids("apply_llama31_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, key, False, enable_pdl)


def apply_llama31_rope_pos_ids_inplace(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
    enable_pdl: bool | None = None,
) -> None:
    """As `apply_llama31_rope_pos_ids`, overwriting q and k."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rope_pos_ids("apply_llama31_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, key, True, enable_pdl)


def apply_rope_with_cos_sin_cache(
    positions: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool = True,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """Rotate with precomputed cosines and sines.

    Parameters
    ----------
    positions
        int32 or int64 [nnz]. A position outside the cache is a ValueError on the CPU and makes its row NaN on a GPU.
    query, key
        [nnz, num_qo_heads * head_size] and [nnz, num_kv_heads * head_size], float16, bfloat16 or float32; rows may be strided.
    head_size
        Elements per head.
    cos_sin_cache
        float32 [max_position, rotary_dim]: rotary_dim / 2 cosines, then as many sines. Anything but float32 is a ValueError.
    is_neox
        True: pairs are (i, i + rotary_dim / 2); False: (2i, 2i + 1).
    enable_pdl
        As in `apply_rope`.

    Returns
    -------
    Tensors of the shapes of query and key.

    Raises
    ------
    TypeError, ValueError
        As `apply_rope`.
    """
    return rope_cached(
        "apply_rope_with_cos_sin_cache", positions, query, key, head_size, cos_sin_cache, is_neox, False, enable_pdl
    )


def apply_rope_with_cos_sin_cache_inplace(
    positions: Any,
    query: Any,
    key: Any,
    head_size: int,
    cos_sin_cache: Any,
    is_neox: bool = True,
    enable_pdl: bool | None = None,
) -> None:
    """As `apply_rope_with_cos_sin_cache`, overwriting query and key."""
    rope_cached(
        "apply_rope_with_cos_sin_cache_inplace",
        positions,
        query,
        key,
        head_size,
        cos_sin_cache,
        is_neox,
        True,
        enable_pdl,
    )


def rope_quantize_fp8(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Any = None,
    k_rope_out: Any = None,
    q_nope_out: Any = None,
    k_nope_out: Any = None,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Rotate queries and keys by a table of angles and round them to 8-bit floats, in one launch.

    A head comes in two parts, elements that are rotated and elements that are not (multi-head latent attention, partial rotation). Results are
    ``x * quant_scale``, computed in float32 and rounded once; beyond the largest value of the dtype they become that value, NaN stays NaN.

    Parameters
    ----------
    q_rope, k_rope
        [nnz, num_qo_heads, rope_dim] and [nnz, num_kv_heads, rope_dim] (or [nnz, rope_dim]: one latent head), float16 or bfloat16; any strides but a
        contiguous last
        axis.
    q_nope, k_nope
        [nnz, num_qo_heads, no_rope_dim] and [nnz, num_kv_heads, no_rope_dim] (or [nnz, no_rope_dim]), or both None: heads are rotated whole.
    cos_sin_cache
        float32 [max_position, rope_dim]: rope_dim / 2 cosines, then as many sines.
    pos_ids
        int32 or int64 [nnz]. A position outside the table is a ValueError on the CPU and makes its row NaN on a GPU.
    is_neox
        True: pairs are (i, i + rope_dim / 2); False: (2i, 2i + 1).
    quantize_dtype
        float8_e4m3fn or float8_e5m2; None: that of the outputs given, else float8_e4m3fn.
    quant_scale_q, quant_scale_kv
        What queries and keys are multiplied by, positive. (A factor, where `rmsnorm_quant` and the cache append divide.)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out
        Where to write, shapes of the inputs. Allocated if None.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Returns
    -------
    (q_rope_out, k_rope_out, q_nope_out, k_nope_out); without q_nope and k_nope the last two have no elements.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes, devices or scales that do not fit.
    """
    from pyinfer._rope_quant import rope_quantize

    inputs, outputs = (q_rope, k_rope, q_nope, k_nope), (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    scales = (float(quant_scale_q), float(quant_scale_kv))
    return rope_quantize(
        "rope_quantize_fp8", inputs, cos_sin_cache, pos_ids, is_neox, quantize_dtype, scales, outputs, enable_pdl
    )


def mla_rope_quantize_fp8(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Any = None,
    k_rope_out: Any = None,
    q_nope_out: Any = None,
    k_nope_out: Any = None,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any, Any, Any]:
    """`rope_quantize_fp8` for multi-head latent attention: k_rope [nnz, rope_dim] and k_nope [nnz, no_rope_dim] have no axis of heads."""
    from pyinfer._rope_quant import rope_quantize

    inputs, outputs = (q_rope, k_rope, q_nope, k_nope), (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    scales = (float(quant_scale_q), float(quant_scale_kv))
    return rope_quantize(
        "mla_rope_quantize_fp8", inputs, cos_sin_cache, pos_ids, is_neox, quantize_dtype, scales, outputs, enable_pdl
    )


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    v: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: tuple[Any, Any],
    kv_indices: Any,
    kv_indptr: Any,
    batch_indices: Any,
    positions: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: Any = None,
    q_nope_out: Any = None,
    enable_pdl: bool | None = None,
) -> tuple[Any, Any]:
    """`rope_quantize_fp8`, with keys and values put into a paged cache of 8-bit floats: rotation, rounding and append in one launch.

    Parameters
    ----------
    q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, quant_scale_q, quant_scale_kv, enable_pdl
        As in `rope_quantize_fp8`; values are multiplied by quant_scale_kv, too. pos_ids are the angles' positions, `positions` those in the cache.
    v
        [nnz, num_kv_heads, head_dim], dtype of q_rope; None for latent attention.
    paged_kv_cache
        (k_cache, v_cache): [pages, page_size, num_kv_heads, dim] (NHD) or [pages, num_kv_heads, page_size, dim] (HND); a key lies there as its
        rotated elements, then the others.
        For latent attention (ckv_cache, kpe_cache): [pages, page_size, no_rope_dim] and [pages, page_size, rope_dim].
    kv_indices, kv_indptr, batch_indices, positions
        Where tokens go, as in `append_paged_kv_cache`; tokens without a place are treated as there.
    quantize_dtype
        float8_e4m3fn or float8_e5m2, the caches' dtype; None: that of the outputs given, else the caches'.
    page_size
        The caches'.
    kv_layout
        "NHD" or "HND"; not looked at for latent attention.
    q_rope_out, q_nope_out
        As in `rope_quantize_fp8`.

    Returns
    -------
    (q_rope_out, q_nope_out)

    Raises
    ------
    TypeError, ValueError
        As `rope_quantize_fp8` and `append_paged_kv_cache`.
    """
    from pyinfer._rope_quant import rope_quantize_append

    return rope_quantize_append(
        "rope_quantize_fp8_append_paged_kv_cache",
        (q_rope, k_rope, q_nope, k_nope, v),
        cos_sin_cache,
        pos_ids,
        paged_kv_cache,
        (kv_indices, kv_indptr, batch_indices, positions),
        is_neox,
        quantize_dtype,
        (float(quant_scale_q), float(quant_scale_kv)),
        page_size,
        kv_layout,
        (q_rope_out, q_nope_out),
        enable_pdl,
    )


def rope_append_paged_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    batch_indices: Any,
    positions: Any,
    is_neox: bool = True,
    kv_layout: str = "NHD",
    q_out: Any = None,
    enable_pdl: bool | None = None,
) -> Any:
    """Rotate queries and keys by a table of angles and put keys and values into a paged KV cache of their own dtype, in one launch.

    The same as `apply_rope_with_cos_sin_cache` and `append_paged_kv_cache`, without writing the rotated keys twice.

    Parameters
    ----------
    q, k, v
        [nnz, num_qo_heads, head_dim], [nnz, num_kv_heads, head_dim] and [nnz, num_kv_heads, head_dim_v], float16, bfloat16 or float32; any strides
        but a contiguous last axis.
        The first rotary_dim elements of queries and keys are rotated. k and v stay as they are.
    cos_sin_cache
        float32 [max_position, rotary_dim].
    pos_ids, is_neox, enable_pdl
        As in `rope_quantize_fp8`.
    paged_kv_cache, kv_indices, kv_indptr, batch_indices, positions, kv_layout
        As in `append_paged_kv_cache`.
    q_out
        Where the rotated queries go; may be q. Allocated if None.

    Returns
    -------
    The rotated queries (q_out if given).

    Raises
    ------
    TypeError, ValueError
        As `rope_quantize_fp8` and `append_paged_kv_cache`.
    """
    from pyinfer._rope_quant import rope_append

    indices = (kv_indices, kv_indptr, batch_indices, positions)
    op = "rope_append_paged_kv_cache"
    return rope_append(
        op, q, k, v, cos_sin_cache, pos_ids, paged_kv_cache, indices, is_neox, kv_layout, q_out, enable_pdl
    )


attach(__name__)  # what torch.compile traces in the place of these functions
