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
    return rope_indptr("apply_rope", q, k, indptr, offsets, rotary_dim, interleave, (rope_scale, rope_theta), False)


def apply_rope_inplace(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """As `apply_rope`, overwriting q and k."""
    rope_indptr("apply_rope_inplace", q, k, indptr, offsets, rotary_dim, interleave, (rope_scale, rope_theta), True)


def apply_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Any, Any]:
    """As `apply_rope`, with the position of every row given: `pos_ids`, int32 or int64 [nnz]."""
    return rope_pos_ids("apply_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, (rope_scale, rope_theta), False)


def apply_rope_pos_ids_inplace(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """As `apply_rope_pos_ids`, overwriting q and k."""
    rope_pos_ids("apply_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, (rope_scale, rope_theta), True)


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
) -> tuple[Any, Any]:
    """As `apply_rope`, with Llama 3.1's frequencies: f becomes (1 - s) f / rope_scale + s f.

    s = clamp((old_context_len f / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1): wave lengths short against the
    original context stay, long ones are stretched by rope_scale.
    """
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return rope_indptr("apply_llama31_rope", q, k, indptr, offsets, rotary_dim, interleave, key, False)


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
) -> None:
    """As `apply_llama31_rope`, overwriting q and k."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rope_indptr("apply_llama31_rope_inplace", q, k, indptr, offsets, rotary_dim, interleave, key, True)


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
) -> tuple[Any, Any]:
    """As `apply_llama31_rope`, with the position of every row given: `pos_ids`, int32 or int64 [nnz]."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return rope_pos_ids("apply_llama31_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, key, False)


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
) -> None:
    """As `apply_llama31_rope_pos_ids`, overwriting q and k."""
    key = (rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    rope_pos_ids("apply_llama31_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, key, True)


def apply_rope_with_cos_sin_cache(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
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

    Returns
    -------
    Tensors of the shapes of query and key.

    Raises
    ------
    TypeError, ValueError
        As `apply_rope`.
    """
    return rope_cached("apply_rope_with_cos_sin_cache", positions, query, key, head_size, cos_sin_cache, is_neox, False)


def apply_rope_with_cos_sin_cache_inplace(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
) -> None:
    """As `apply_rope_with_cos_sin_cache`, overwriting query and key."""
    rope_cached("apply_rope_with_cos_sin_cache_inplace", positions, query, key, head_size, cos_sin_cache, is_neox, True)


attach(__name__)  # what torch.compile traces in the place of these functions
