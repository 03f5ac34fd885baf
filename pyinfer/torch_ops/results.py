"""Shapes and dtypes of what the operators return: the fakes of torch.compile.

Each rule takes the public arguments by name (of a wrapper's method also ``planned``, the planned output's dtype, None for that of q) and returns the new
tensors, contiguous. Rules run under torch's fake tensors, and in traced code where a caller gives one of two outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[[dict[str, Any]], "list[Any]"]


def nothing(a: dict[str, Any]) -> list[Any]:
    """Work in place."""
    return []


def like(*names: str) -> Rule:
    """Tensors like the arguments named."""

    def rule(a: dict[str, Any]) -> list[Any]:
        return [a[name].new_empty(a[name].shape) for name in names]

    return rule


def gated(a: dict[str, Any]) -> list[Any]:
    """Half the last axis."""
    x = a["input"]
    return [x.new_empty((*x.shape[:-1], x.shape[-1] // 2))]


def rows_of_tokens(a: dict[str, Any]) -> list[Any]:
    """`get_batch_indices_positions`."""
    return [_int32(a["append_indptr"], (a["nnz"],)), _int32(a["append_indptr"], (a["nnz"],))]


def lengths(a: dict[str, Any]) -> list[Any]:
    """`get_seq_lens`."""
    return [_int32(a["kv_indptr"], (a["kv_indptr"].shape[0] - 1,))]


def state(v: str, s: str) -> Rule:
    """An attention state like another."""

    def rule(a: dict[str, Any]) -> list[Any]:
        return [a[v].new_empty(a[v].shape), _float32(a[s], a[s].shape)]

    return rule


def merged(a: dict[str, Any]) -> list[Any]:
    """`merge_states`: without the axis of states."""
    v, s = a["v"], a["s"]
    return [v.new_empty((v.shape[0], *v.shape[2:])), _float32(s, (s.shape[0], *s.shape[2:]))]


def float32_like(name: str) -> Rule:
    """A float32 tensor of an argument's shape."""

    def rule(a: dict[str, Any]) -> list[Any]:
        return [_float32(a[name], a[name].shape)]

    return rule


def ids(name: str) -> Rule:
    """Token ids of a sampler, and which of them are valid."""

    def rule(a: dict[str, Any]) -> list[Any]:
        x, index = a[name], a["indices"]
        n = x.shape[0] if index is None else index.shape[0]
        return [_int32(x, (n,)), _bool(x, (n,))] if a["return_valid"] else [_int32(x, (n,))]

    return rule


def chain(a: dict[str, Any]) -> list[Any]:
    """`chain_speculative_sampling`: ids, and which requests are valid."""
    x = a["target_probs"]
    made = [_int32(x, x.shape[:2])]
    return [*made, _bool(x, (x.shape[0],))] if a["return_valid"] else made


def bits(a: dict[str, Any]) -> list[Any]:
    """`packbits`."""
    return [_uint8(a["x"], ((a["x"].shape[0] + 7) // 8,))]


def segment_bits(a: dict[str, Any]) -> list[Any]:
    """`segment_packbits`: how many bytes, only the values of indptr say."""
    import torch

    size = torch.library.get_ctx().new_dynamic_size()
    x, indptr = a["x"], a["indptr"]
    return [_uint8(x, (size,)), _int32(x, (indptr.shape[0],))]


def flattened(a: dict[str, Any]) -> list[Any]:
    """`convert_bsr_mask_layout`."""
    return [a["mask"].new_empty((a["mask"].numel(),))]


def decode(a: dict[str, Any]) -> list[Any]:
    """`single_decode_with_kv_cache`."""
    q = a["q"]
    out = q.new_empty((q.shape[0], a["v"].shape[-1]))
    return [out, _float32(q, (q.shape[0],))] if a["return_lse"] else [out]


def prefill(a: dict[str, Any]) -> list[Any]:
    """`single_prefill_with_kv_cache`."""
    q, dtype = a["q"], a["o_dtype"]
    out = q.new_empty((*q.shape[:2], a["v"].shape[-1]), dtype=q.dtype if dtype is None else dtype)
    return [out, _float32(q, q.shape[:2])] if a["return_lse"] else [out]


def attention(q: str = "q", values: str = "paged_kv_cache") -> Rule:
    """Of a batch wrapper: [rows, heads, values' head_dim], and the LSE if asked for."""

    def rule(a: dict[str, Any]) -> list[Any]:
        x, v = a[q], a[values]
        v = v[1] if isinstance(v, tuple) else v
        out = x.new_empty((x.shape[0], x.shape[1], v.shape[-1]), dtype=a["planned"] or x.dtype)
        return [out, _float32(x, x.shape[:2])] if a.get("return_lse", True) else [out]

    return rule


def pod(a: dict[str, Any]) -> list[Any]:
    """`PODWithPagedKVCacheWrapper.run`: prefill's tensors, then decode's."""
    made = []
    v = a["paged_kv_cache_d"]
    v = v[1] if isinstance(v, tuple) else v
    for q, dim, dtype, lse in (
        (a["q_p"], a["v_p"].shape[-1], a["q_p"].dtype, a["return_lse_p"]),
        (a["q_d"], v.shape[-1], a["planned"] or a["q_d"].dtype, a["return_lse_d"]),
    ):
        made.append(q.new_empty((q.shape[0], q.shape[1], dim), dtype=dtype))
        if lse:
            made.append(_float32(q, q.shape[:2]))
    return made


def _of(name: str) -> Callable[[Any, Any], Any]:
    def make(x: Any, shape: Any) -> Any:
        import torch

        return x.new_empty(shape, dtype=getattr(torch, name))

    return make


_float32, _int32, _uint8, _bool = _of("float32"), _of("int32"), _of("uint8"), _of("bool")
