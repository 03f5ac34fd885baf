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


def _fp8(a: dict[str, Any], *others: str) -> Any:
    """The 8-bit dtype asked for, or that of the first tensor there is among others, or e4m3."""
    import torch

    given = (a.get(name) for name in others)  # outputs are there only where a caller gave some
    found = (x[0] if isinstance(x, tuple) else x for x in given if x is not None)
    return a["quantize_dtype"] or next((x.dtype for x in found), torch.float8_e4m3fn)


def quantized(gate: bool = False) -> Rule:
    """8-bit floats and a scale for each row."""

    def rule(a: dict[str, Any]) -> list[Any]:
        x = a["input"]
        rows, width = x.shape[:-1], x.shape[-1] // 2 if gate else x.shape[-1]
        return [x.new_empty((*rows, width), dtype=_fp8(a, "out")), _float32(x, (*rows, 1))]

    return rule


def split_heads(a: dict[str, Any]) -> list[Any]:
    """`fused_qk_rmsnorm_rope`: queries, keys and values by heads."""
    import torch

    x, dtype = a["qkv"], torch.float8_e4m3fn if a["output_fp8"] else a["qkv"].dtype
    heads = (a["num_heads_q"], a["num_heads_k"], a["num_heads_v"])
    return [x.new_empty((*x.shape[:-1], n, a["head_dim"]), dtype=dtype) for n in heads]


def rotated(*names: str) -> Rule:
    """8-bit floats like the arguments named; of an absent part no elements."""
    outs = [f"{name}_out" for name in names]

    def rule(a: dict[str, Any]) -> list[Any]:
        dtype = _fp8(a, *outs, "paged_kv_cache")
        made = []
        for name in names:
            like = a[name] if a[name] is not None else a[name.replace("nope", "rope")]
            shape = like.shape if a[name] is not None else (*like.shape[:-1], 0)
            made.append(like.new_empty(shape, dtype=dtype))
        return made

    return rule


def gathered(first: str, second: str) -> Rule:
    """`gather_paged_kv_cache`: caches as two arguments, or one and the same."""

    def rule(a: dict[str, Any]) -> list[Any]:
        caches = (a[first], a[second]) if first != second else a[first]
        latent = first != second
        if not isinstance(caches, tuple):
            caches = (caches[:, 0], caches[:, 1])
        outs = ("ckv_out", "kpe_out") if latent else ("k_out", "v_out")
        dtype = a["dtype"] or next((a[o].dtype for o in outs if a.get(o) is not None), caches[0].dtype)
        n = a["batch_indices"].shape[0]
        made = []
        for cache in caches:
            heads = () if latent else (cache.shape[-2 if a["kv_layout"] == "NHD" or cache.ndim == 3 else -3],)
            made.append(cache.new_empty((n, *heads, cache.shape[-1]), dtype=dtype))
        return made

    return rule


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


def largest(a: dict[str, Any]) -> list[Any]:
    """`top_k`: values and int64 indices."""
    import torch

    x, shape = a["input"], (a["input"].shape[0], a["k"])
    return [x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)]


def selected(name: str, k: str) -> Rule:
    """int32 [rows, k]."""

    def rule(a: dict[str, Any]) -> list[Any]:
        return [_int32(a[name], (a[name].shape[0], a[k]))]

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
