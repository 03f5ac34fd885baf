"""How `pyinfer.support` asks: the operator or wrapper itself, called with tensors that have shape, dtype and device but no memory.

What the operator raises is the answer, in its own words; nothing here repeats a check. `_PLAIN` and `_WRAPPERS` say how a configuration (dtype, head
dimension, vocabulary, ...) becomes arguments.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from pyinfer.core.imagined import Imagined, Reached, imagining

ROWS = 3  # of every imagined tensor that has rows; lengths and values that are looked at fit it


class _Maker:
    """Makes the tensors of a question: imagined ones on the device asked about, and index arrays, which on the CPU are real."""

    def __init__(self, op: str, device: int) -> None:
        self.op, self.device = op, device

    def __call__(self, dtype: Any, *shape: int, arg: str = "input") -> Imagined:
        return Imagined(shape, dtype, self.device, self.op, arg)

    def ints(self, values: list[int]) -> Any:
        """int32 values; a GPU's cannot be looked at, the CPU's are."""
        if self.device >= 0:
            return Imagined((len(values),), "int32", self.device)
        import numpy as np

        return np.array(values, np.int32)

    def mask(self) -> Any:
        """A packed custom mask, large enough."""
        if self.device >= 0:
            return Imagined((1 << 20,), "uint8", self.device)
        import numpy as np

        return np.zeros(1 << 10, np.uint8)

    def rows(self) -> Any:
        return self.ints([0] * ROWS)


# ---- operators -------------------------------------------------------------------------------------------------------------------
# Each returns the tensors among an operator's arguments, by name. What else is asked about goes to the operator as it is.
def _norm(t: _Maker, *, dtype: Any = "float16", hidden: int = 4096) -> dict[str, Any]:
    return {"input": t(dtype, ROWS, hidden), "weight": t(dtype, hidden)}


def _add_norm(t: _Maker, *, dtype: Any = "float16", hidden: int = 4096) -> dict[str, Any]:
    return {**_norm(t, dtype=dtype, hidden=hidden), "residual": t(dtype, ROWS, hidden)}


def _act(t: _Maker, *, dtype: Any = "float16", hidden: int = 4096) -> dict[str, Any]:
    return {"input": t(dtype, ROWS, 2 * hidden)}


def _layernorm(t: _Maker, *, dtype: Any = "bfloat16", hidden: int = 4096) -> dict[str, Any]:
    return {"input": t(dtype, ROWS, hidden), "gemma": t("float32", hidden), "beta": t("float32", hidden)}


def _qk_norm_rope(
    t: _Maker, *, dtype: Any = "bfloat16", head_dim: int = 128, num_heads_q: int = 24, num_heads_k: int = 24, num_heads_v: int = 24
) -> dict[str, Any]:  # fmt: skip
    sixth = head_dim // 6 * 2
    tensors = {
        "qkv": t(dtype, ROWS, (num_heads_q + num_heads_k + num_heads_v) * head_dim, arg="qkv"),
        "q_weight": t(dtype, num_heads_q * head_dim, arg="q_weight"),
        "k_weight": t(dtype, num_heads_k * head_dim, arg="k_weight"),
    }
    grid = dict(ppf=ROWS, pph=1, ppw=1, head_dim=head_dim)
    heads = dict(num_heads_q=num_heads_q, num_heads_k=num_heads_k, num_heads_v=num_heads_v)
    channels = dict(num_frame_channels=head_dim - 2 * sixth, num_height_channels=sixth, num_width_channels=sixth)
    return {**tensors, **grid, **heads, **channels}


def _quantised(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`make`, with an output of 8 bits (`quantize_dtype`) and a scale."""

    def made(
        t: _Maker, *, dtype: Any = "float16", hidden: int = 4096, quantize_dtype: Any = "float8_e4m3fn"
    ) -> dict[str, Any]:
        return {"out": t(quantize_dtype, ROWS, hidden, arg="out"), "scale": 1.0, **make(t, dtype=dtype, hidden=hidden)}

    return made


def _topk(t: _Maker, *, dtype: Any = "float32", vocab: int = 32000) -> dict[str, Any]:
    return {"input": t(dtype, ROWS, vocab)}


def _linear(t: _Maker, *, dtype: Any = "bfloat16", depth: int = 576, columns: int = 576) -> dict[str, Any]:
    return {"input": t(dtype, ROWS, depth), "weight": t(dtype, columns, depth), "out": t(dtype, ROWS, columns)}


def _heads(t: _Maker, dtype: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {"q": t(dtype, ROWS, num_qo_heads, head_dim, arg="q"), "k": t(dtype, ROWS, num_kv_heads, head_dim, arg="k")}


def _rope(
    t: _Maker, *, dtype: Any = "float16", num_qo_heads: int = 1, num_kv_heads: int = 1, head_dim: int = 128
) -> dict[str, Any]:
    places = {"indptr": t.ints([0, ROWS]), "offsets": t.ints([0])}
    return {**_heads(t, dtype, num_qo_heads, num_kv_heads, head_dim), **places}


def _rope_pos_ids(
    t: _Maker, *, dtype: Any = "float16", num_qo_heads: int = 1, num_kv_heads: int = 1, head_dim: int = 128
) -> dict[str, Any]:
    return {**_heads(t, dtype, num_qo_heads, num_kv_heads, head_dim), "pos_ids": t.rows()}


def _rope_cached(
    t: _Maker, *, dtype: Any = "float16", num_qo_heads: int = 1, num_kv_heads: int = 1, head_dim: int = 128,
    rotary_dim: int | None = None, cache_dtype: Any = "float32",
) -> dict[str, Any]:  # fmt: skip
    return {
        "positions": t.rows(),
        "query": t(dtype, ROWS, num_qo_heads * head_dim, arg="query"),
        "key": t(dtype, ROWS, num_kv_heads * head_dim, arg="key"),
        "head_size": head_dim,
        "cos_sin_cache": t(cache_dtype, 4, head_dim if rotary_dim is None else rotary_dim, arg="cos_sin_cache"),
    }


def _table(t: _Maker) -> dict[str, Any]:
    table = {"kv_indices": t.ints([0]), "kv_indptr": t.ints([0, 1]), "kv_last_page_len": t.ints([1])}
    return {"batch_indices": t.rows(), "positions": t.rows(), **table}


def _append(
    t: _Maker, *, dtype: Any = "float16", kv_data_type: Any = None, num_kv_heads: int = 1, head_dim: int = 128,
    head_dim_vo: int | None = None, page_size: int = 16, kv_layout: str = "NHD",
) -> dict[str, Any]:  # fmt: skip
    vo = head_dim if head_dim_vo is None else head_dim_vo
    page = (num_kv_heads, page_size) if kv_layout == "HND" else (page_size, num_kv_heads)
    cache = tuple(t(kv_data_type or dtype, 1, *page, dim, arg="paged_kv_cache") for dim in (head_dim, vo))
    new = {"append_key": t(dtype, ROWS, num_kv_heads, head_dim), "append_value": t(dtype, ROWS, num_kv_heads, vo)}
    return {**new, "paged_kv_cache": cache, "kv_layout": kv_layout, **_table(t)}


def _append_mla(
    t: _Maker, *, dtype: Any = "float16", kv_data_type: Any = None, head_dim_ckv: int = 512, head_dim_kpe: int = 64, page_size: int = 16
) -> dict[str, Any]:  # fmt: skip
    cache = {f"{x}_cache": t(kv_data_type or dtype, 1, page_size, n) for x, n in (("ckv", head_dim_ckv), ("kpe", head_dim_kpe))}  # fmt: skip
    return {
        "append_ckv": t(dtype, ROWS, head_dim_ckv),
        "append_kpe": t(dtype, ROWS, head_dim_kpe),
        **cache,
        **_table(t),
    }


def _positions(t: _Maker) -> dict[str, Any]:
    return {"append_indptr": t.ints([0, ROWS]), "seq_lens": t.ints([ROWS]), "nnz": ROWS}


def _seq_lens(t: _Maker, *, page_size: int = 16) -> dict[str, Any]:
    return {"kv_indptr": t.ints([0, 1]), "kv_last_page_len": t.ints([1]), "page_size": page_size}


def _merge(t: _Maker, *, dtype: Any = "float16", num_heads: int = 1, head_dim: int = 128) -> dict[str, Any]:
    v, s = t(dtype, ROWS, num_heads, head_dim, arg="v_a"), t("float32", ROWS, num_heads)
    return {"v_a": v, "s_a": s, "v_b": v, "s_b": s}


def _merge_in_place(t: _Maker, *, dtype: Any = "float16", num_heads: int = 1, head_dim: int = 128) -> dict[str, Any]:
    one = _merge(t, dtype=dtype, num_heads=num_heads, head_dim=head_dim)
    return {"v": one["v_a"], "s": one["s_a"], "v_other": one["v_b"], "s_other": one["s_b"]}


def _merge_many(t: _Maker, *, dtype: Any = "float16", num_heads: int = 1, head_dim: int = 128, num_states: int = 2) -> dict[str, Any]:  # fmt: skip
    return {
        "v": t(dtype, ROWS, num_states, num_heads, head_dim, arg="v"),
        "s": t("float32", ROWS, num_states, num_heads),
    }


def _probs(t: _Maker, *, dtype: Any = "float32", vocab: int = 32000) -> dict[str, Any]:
    return {"probs": t(dtype, ROWS, vocab, arg="probs")}


def _logits(t: _Maker, *, dtype: Any = "float32", vocab: int = 32000) -> dict[str, Any]:
    return {"logits": t(dtype, ROWS, vocab, arg="logits")}


def _with(make: Callable[..., dict[str, Any]], **defaults: Any) -> Callable[..., dict[str, Any]]:
    """`make`, and values for arguments that have no default."""

    def made(t: _Maker, **config: Any) -> dict[str, Any]:
        return {**defaults, **make(t, **config)}

    made.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
    return made


def _chain(t: _Maker, *, dtype: Any = "float32", vocab: int = 32000, num_speculative: int = 2) -> dict[str, Any]:
    n = num_speculative
    probs = {"draft_probs": t(dtype, ROWS, n, vocab), "target_probs": t(dtype, ROWS, n + 1, vocab)}
    return {**probs, "draft_token_ids": t("int32", ROWS, n)}


def _packbits(t: _Maker, *, dtype: Any = "bool") -> dict[str, Any]:
    return {"x": t(dtype, ROWS, arg="x")}


def _segment_packbits(t: _Maker, *, dtype: Any = "bool") -> dict[str, Any]:
    return {"x": t(dtype, ROWS, arg="x"), "indptr": [0, ROWS]}


def _bsr(t: _Maker, *, dtype: Any = "bool", R: int = 1, C: int = 1) -> dict[str, Any]:
    return {"mask": t(dtype, 1, R, C, arg="mask"), "indptr": [0, 1]}


def _dense(t: _Maker, ndim: int, config: dict[str, Any]) -> dict[str, Any]:
    qk, vo = config["head_dim_qk"], config["head_dim_vo"]
    heads, kv_dtype, hnd = (
        config["num_kv_heads"],
        config["kv_data_type"] or config["q_data_type"],
        config["kv_layout"] == "HND",
    )
    q = (config["num_qo_heads"], qk)
    k, v = ((heads, ROWS, d) if hnd else (ROWS, heads, d) for d in (qk, qk if vo is None else vo))
    tensors = {"k": t(kv_dtype, *k, arg="k"), "v": t(kv_dtype, *v, arg="v"), "kv_layout": config["kv_layout"]}
    return {"q": t(config["q_data_type"], *(q if ndim == 2 else (ROWS, *q)), arg="q"), **tensors}


def _single_decode(
    t: _Maker, *, q_data_type: Any = "float16", kv_data_type: Any = None, num_qo_heads: int = 1, num_kv_heads: int = 1,
    head_dim_qk: int = 128, head_dim_vo: int | None = None, kv_layout: str = "NHD",
) -> dict[str, Any]:  # fmt: skip
    return _dense(t, 2, {k: v for k, v in locals().items() if k != "t"})


def _single_prefill(
    t: _Maker, *, q_data_type: Any = "float16", kv_data_type: Any = None, o_data_type: Any = None, num_qo_heads: int = 1, num_kv_heads: int = 1,
    head_dim_qk: int = 128, head_dim_vo: int | None = None, kv_layout: str = "NHD", custom_mask: bool = False,
) -> dict[str, Any]:  # fmt: skip
    tensors = _dense(t, 3, {k: v for k, v in locals().items() if k not in ("t", "custom_mask")})
    return {**tensors, "o_dtype": o_data_type, "packed_custom_mask": t.mask() if custom_mask else None}


_PLAIN: dict[str, Callable[..., dict[str, Any]]] = {
    **dict.fromkeys(("rmsnorm", "gemma_rmsnorm"), _norm),
    **dict.fromkeys(("fused_add_rmsnorm", "gemma_fused_add_rmsnorm"), _add_norm),
    **dict.fromkeys(("rmsnorm_dynamic_quant", "fused_rmsnorm_silu"), _norm),
    "fused_add_rmsnorm_dynamic_quant": _add_norm,
    "rmsnorm_quant": _quantised(_norm),
    "fused_add_rmsnorm_quant": _quantised(_add_norm),
    "fused_qk_rmsnorm_rope": _qk_norm_rope,
    "layernorm": _layernorm,
    **dict.fromkeys(
        (f"{act}_and_mul{kind}" for act in ("silu", "gelu", "gelu_tanh") for kind in ("", "_dynamic_quant")), _act
    ),
    **dict.fromkeys((f"{act}_and_mul_quant" for act in ("silu", "gelu", "gelu_tanh")), _quantised(_act)),
    "tinygemm_bf16": _linear,
    **dict.fromkeys(("apply_rope", "apply_rope_inplace", "apply_llama31_rope", "apply_llama31_rope_inplace"), _rope),
    **dict.fromkeys(
        (
            "apply_rope_pos_ids",
            "apply_rope_pos_ids_inplace",
            "apply_llama31_rope_pos_ids",
            "apply_llama31_rope_pos_ids_inplace",
        ),
        _rope_pos_ids,
    ),
    **dict.fromkeys(("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace"), _rope_cached),
    "append_paged_kv_cache": _append,
    "append_paged_mla_kv_cache": _append_mla,
    "get_batch_indices_positions": _positions,
    "get_seq_lens": _seq_lens,
    "merge_state": _merge,
    "merge_state_in_place": _merge_in_place,
    "merge_states": _merge_many,
    **dict.fromkeys(("softmax", "sampling_from_logits"), _logits),
    "sampling_from_probs": _probs,
    "top_k_mask_logits": _with(_logits, top_k=1),
    "top_k": _with(_topk, k=1),
    **dict.fromkeys(("top_k_sampling_from_probs", "top_k_renorm_probs", "top_k_renorm_prob"), _with(_probs, top_k=1)),
    **dict.fromkeys(("top_p_sampling_from_probs", "top_p_renorm_probs", "top_p_renorm_prob"), _with(_probs, top_p=0.9)),
    "min_p_sampling_from_probs": _with(_probs, min_p=0.1),
    "top_k_top_p_sampling_from_probs": _with(_probs, top_k=1, top_p=0.9),
    "top_k_top_p_sampling_from_logits": _with(_logits, top_k=1, top_p=0.9),
    "chain_speculative_sampling": _chain,
    "packbits": _packbits,
    "segment_packbits": _segment_packbits,
    "convert_bsr_mask_layout": _bsr,
    "single_decode_with_kv_cache": _single_decode,
    **dict.fromkeys(("single_prefill_with_kv_cache", "single_prefill_with_kv_cache_return_lse"), _single_prefill),
}


# ---- wrappers --------------------------------------------------------------------------------------------------------------------
# The arguments of plan() for one small request, of which a question replaces what it is about.
_HEADS: dict[str, Any] = {"num_qo_heads": 1, "num_kv_heads": 1}
_PAGED: dict[str, Any] = {**_HEADS, "head_dim": 128, "page_size": 16}
_PAGES: dict[str, Any] = {"indptr": [0, 1], "indices": [0], "last_page_len": [1]}
_QO_PAGES: dict[str, Any] = {
    "qo_indptr": [0, ROWS],
    "paged_kv_indptr": [0, 1],
    "paged_kv_indices": [0],
    "paged_kv_last_page_len": [1],
}
_QO_KV: dict[str, Any] = {"qo_indptr": [0, ROWS], "kv_indptr": [0, 1], "kv_indices": [0], "kv_len_arr": [1]}
_PREFILL: dict[str, Any] = {**_HEADS, "head_dim_qk": 128}
_MLA: dict[str, Any] = {"page_size": 64, "sm_scale": 1.0}

_WRAPPERS: dict[str, dict[str, Any]] = {
    "BatchDecodeWithPagedKVCacheWrapper": {**_PAGES, **_PAGED},
    "BatchPrefillWithPagedKVCacheWrapper": {**_QO_PAGES, **_PREFILL, "page_size": 16},
    "BatchAttentionWithAttentionSinkWrapper": {**_QO_PAGES, **_PREFILL, "page_size": 16},
    "BatchPrefillWithRaggedKVCacheWrapper": {"qo_indptr": [0, ROWS], "kv_indptr": [0, 1], **_PREFILL},
    "BatchAttention": {**_QO_KV, **_PREFILL, "page_size": 16},
    "MultiLevelCascadeAttentionWrapper": _PAGED,
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": {**{f"unique_kv_{k}": v for k, v in _PAGES.items()}, **_PAGED},
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": {**_QO_PAGES, **_PAGED},
    "PODWithPagedKVCacheWrapper": {**_PAGES, **_PAGED},
    "BatchPODWithPagedKVCacheWrapper": {
        **{f"{k}_{x}": v for x in "pd" for k, v in (("qo_indptr", [0, 1]), ("kv_indptr", [0, 1]), ("kv_indices", [0]), ("last_page_len", [1]))}, **_PAGED,
    },
    "BlockSparseAttentionWrapper": {"indptr": [0, 1], "indices": [0], "R": 16, "C": 16, **_HEADS, "head_dim": 128},
    "VariableBlockSparseAttentionWrapper": {**_HEADS, "head_dim": 128},
    "BatchMLAPagedAttentionWrapper": {
        **_QO_KV, **_MLA, "num_heads": 16, "head_dim_ckv": 512, "head_dim_kpe": 64, "causal": False, "q_data_type": "float16",
    },
    "BatchDecodeMlaWithPagedKVCacheWrapper": {**_PAGES, **_MLA, "num_qo_heads": 16, "head_dim_compressed_kv": 512},
}  # fmt: skip
_GRAPH_DECODE = "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"
_WRAPPERS[_GRAPH_DECODE] = _WRAPPERS["BatchDecodeWithPagedKVCacheWrapper"]
_CONSTRUCTOR: dict[str, dict[str, Any]] = {
    "MultiLevelCascadeAttentionWrapper": {"num_levels": 2},
    "BatchDecodeMlaWithPagedKVCacheWrapper": {"use_tensor_cores": True},
}
_ONE_TYPE = ("BatchAttention", "BatchMLAPagedAttentionWrapper")  # plan() wants kv_data_type: here q's by default


def _ask_wrapper(t: _Maker, cls: Any, config: dict[str, Any]) -> None:
    op = t.op
    plan_name = "plan" if hasattr(cls, "plan") else "begin_forward"
    made_with, planned_with = inspect.signature(cls).parameters, inspect.signature(getattr(cls, plan_name)).parameters
    args, own = dict(_WRAPPERS[op]), dict(_CONSTRUCTOR.get(op, {}))
    if config.get("head_dim") is not None and "head_dim_qk" in planned_with:
        config = {"head_dim_qk": config["head_dim"], "head_dim_vo": config["head_dim"], **config}
        del config["head_dim"]
    mask = config.pop("custom_mask", None)
    if op in _ONE_TYPE and config.get("kv_data_type") is None:
        config["kv_data_type"] = config.get("q_data_type", args.get("q_data_type", planned_with["q_data_type"].default))
    for name, value in config.items():
        if name in planned_with:
            args[name] = value
        elif name in made_with:
            own[name] = value
        else:
            raise TypeError(f"support({op!r}) got an unexpected keyword argument {name!r}")
    # The workspace, larger than any, says where the wrapper is at home.
    if "float_workspace_buffer" in made_with:
        own.setdefault("float_workspace_buffer", Imagined((1 << 50,), "uint8", t.device))
    if op == _GRAPH_DECODE:
        sizes = {"workspace_buffer": 1 << 50, "indptr_buffer": 2, "indices_buffer": 1, "last_page_len_buffer": 1}
        own |= {k: Imagined((n,), "int32", t.device) for k, n in sizes.items()}
    if mask:
        names = [name for name in ("packed_custom_mask", "packed_mask") if name in planned_with]
        if not names:
            from pyinfer.core.errors import fail_type

            _answer(
                lambda: fail_type(op, "custom_mask", "is no argument here", True, "a prefill or block-sparse wrapper")
            )
        args[names[0]] = t.mask()
    _complete(t, args, own)
    wrapper = _answer(lambda: cls(**own))
    if op == "BatchAttention":
        q_dtype = args.get("q_data_type", planned_with["q_data_type"].default)
        q = t(q_dtype, ROWS, args["num_qo_heads"], args["head_dim_qk"])
        from pyinfer.core.tensor import view

        wrapper._home = view(q)
        _answer(lambda: wrapper.plan(**args))
        page = [args["page_size"], args["num_kv_heads"]]
        if own.get("kv_layout", "NHD") == "HND":
            page.reverse()
        cache = tuple(t(args["kv_data_type"], 1, *page, args[d]) for d in ("head_dim_qk", "head_dim_vo"))
        _answer(lambda: wrapper.run(q, cache))
        return
    _answer(lambda: getattr(wrapper, plan_name)(**args))


def _complete(t: _Maker, args: dict[str, Any], own: dict[str, Any]) -> None:
    """What follows from the rest of a wrapper's arguments."""
    op = t.op
    if op == "MultiLevelCascadeAttentionWrapper" and isinstance(own["num_levels"], int):
        levels = {"qo_indptr_arr": [0, 1], "paged_kv_indptr_arr": [0, 1], "paged_kv_indices_arr": [0]}
        for name, value in {**levels, "paged_kv_last_page_len": [1]}.items():
            args.setdefault(name, [value] * own["num_levels"])
    elif op == "BlockSparseAttentionWrapper":
        args.setdefault("M", args["R"])
        args.setdefault("N", args["C"])
    elif op == "VariableBlockSparseAttentionWrapper":
        import numpy as np

        heads = max(args["num_kv_heads"], 0)
        args.setdefault("block_mask_map", np.ones((heads, 1, 1), bool))
        for name in ("block_row_sz", "block_col_sz"):
            args.setdefault(name, np.full((heads, 1), 16))
    elif op == "BatchAttention":
        args.setdefault("head_dim_vo", args["head_dim_qk"])


# ---- the question ----------------------------------------------------------------------------------------------------------------
class Refused(Exception):
    """The operator refuses; the argument is its exception."""


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (ValueError, TypeError) as error:
        raise Refused(error) from error


def ask(op: str, function: Any, device: int, config: dict[str, Any]) -> str:
    """The text of the exception that `function` (operator or wrapper class `op`) raises for a configuration; "" if it takes it.

    TypeError for a keyword that it does not have.
    """
    t = _Maker(op, device)
    try:
        with imagining(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if op in _WRAPPERS:
                _ask_wrapper(t, function, config)
            else:
                _ask_operator(t, function, config)
    except Refused as refused:
        return str(refused.args[0])
    except Reached:
        pass
    return ""


def _ask_operator(t: _Maker, function: Any, config: dict[str, Any]) -> None:
    make = _PLAIN.get(t.op)
    args: dict[str, Any] = {}
    if make is not None:
        known = inspect.signature(make).parameters
        if config.get("head_dim") is not None and "head_dim_qk" in known:
            dim = config.pop("head_dim")
            config = {"head_dim_qk": dim, "head_dim_vo": dim, **config}
        if "custom_mask" in config and "custom_mask" not in known and "custom_mask" not in _names(function):
            from pyinfer.core.errors import fail_type

            if config.pop("custom_mask"):
                _answer(lambda: fail_type(t.op, "custom_mask", "is no argument here", True, "a prefill operator"))
        chosen = {name: config.pop(name) for name in list(config) if name in known}
        args = _answer(lambda: make(t, **chosen))
    for name, value in config.items():
        args[name] = _answer(functools.partial(_described, t, name, value))
    inspect.signature(function).bind(**args)  # TypeError: a keyword that is missing or unknown
    _answer(lambda: function(**args))


def _described(t: _Maker, arg: str, value: Any) -> Any:
    """The tensor that (dtype, shape) describes, a tuple of those that a tuple of descriptions does; anything else as it is."""
    if not isinstance(value, tuple):
        return value
    if len(value) == 2 and isinstance(value[1], tuple) and not isinstance(value[0], tuple):
        return t(value[0], *value[1], arg=arg)
    return tuple(_described(t, arg, x) for x in value)


def _names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
