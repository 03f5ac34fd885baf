"""Prefill and append attention: many query tokens a request, against dense, paged or ragged keys."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._attention import host_metadata
from pyinfer._attention_options import bind_mask, mask_view, options_of
from pyinfer._batch_prefill import BatchPrefill, given_items, prefill_key
from pyinfer._batch_run import run_call
from pyinfer._single_calls import calls as single_calls
from pyinfer._single_calls import single_call
from pyinfer._support import KERNEL_FAMILIES, prefill_out_dtype
from pyinfer.core.calls import MISS
from pyinfer.core.dtypes import FLOAT8_E4M3, FLOAT32
from pyinfer.core.errors import device_name, fail
from pyinfer.core.tensor import empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.variants import AttentionVariant

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]


def single_prefill_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    scale_q: Any = None,
    scale_k: Any = None,
    scale_v: Any = None,
    o_dtype: Any = None,
    custom_mask: Any = None,
    packed_custom_mask: Any = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    variant: AttentionVariant | None = None,
    variant_args: Sequence[Any] | None = None,
) -> Any:
    """Attention of one request: out = softmax(mask(q k^T * sm_scale)) v, with grouped query heads.

    Parameters
    ----------
    q
        [qo_len, num_qo_heads, head_dim_qk]; float16 or bfloat16, on the CPU float32 as well. float8_e4m3fn: on Hopper and the CPU, k and v too.
    k
        [kv_len, num_kv_heads, head_dim_qk] (NHD) or [num_kv_heads, kv_len, head_dim_qk] (HND), of q's dtype, float8_e4m3fn or float8_e5m2, on q's device.
    v
        As k, with head_dim_vo. Any strides but a last one of 1.
    scale_q, scale_k, scale_v
        Numbers or tensors of one element (one on the GPU is read, which waits for it): scale_q and scale_k multiply sm_scale, scale_v the output. With
        queries in float8_e4m3fn also float32 tensors of one scale a head, [num_qo_heads], [num_kv_heads] and [num_kv_heads], on q's device.
    k_scale, v_scale
        Other names of scale_k and scale_v.
    o_dtype
        Of the output: float16, bfloat16 or float32; q's dtype by default. With queries in float8_e4m3fn float16 or bfloat16, which must be given.
    custom_mask
        bool [qo_len, kv_len], True where key j is seen, on q's device. It replaces `causal` and is combined with the window.
    packed_custom_mask
        The same as bits, little-endian, uint8 [ceil(qo_len * kv_len / 8)]. If both are given this one counts.
    causal
        Query i sees key j iff j <= kv_len - qo_len + i (aligned at the ends).
    window_left
        Query i further sees only j >= kv_len - qo_len + i - window_left; -1 all.
    logits_soft_cap
        Scores become cap * tanh(score * sm_scale / cap); None or 0 off.
    pos_encoding_mode
        "NONE"; "ROPE_LLAMA": query i is rotated by position kv_len - qo_len + i, key j by j, in halves over the whole head_dim_qk; "ALIBI":
        slope * (j - i) is added to the score, with the slopes of Press et al.
    use_fp16_qk_reduction
        Accepted; scores are always accumulated in float32.
    sm_scale
        1 / sqrt(head_dim_qk) by default.
    rope_scale, rope_theta
        Pair i turns by position * rope_theta^(-2 i / head_dim_qk) / rope_scale; 1 and 10,000 by default.
    backend
        "auto"; "fa2" takes the kernels that run everywhere, "fa3" those of Hopper, a ValueError where there is none. On the CPU all are the same.
    return_lse
        Also return the base-2 log-sum-exp of the scaled scores.
    variant, variant_args
        A `pyinfer.AttentionVariant`, and the values of its parameters.

    Returns
    -------
    out
        [qo_len, num_qo_heads, head_dim_vo] in q's dtype and framework. A row that sees no key: zeros.
    lse
        With return_lse: float32 [qo_len, num_qo_heads]. A row that sees no key: -inf.

    Raises
    ------
    ValueError, TypeError
        Before any launch, naming the argument.
    """
    op = "single_prefill_with_kv_cache"
    plain = custom_mask is None and packed_custom_mask is None and variant is None and not variant_args
    call = None
    if plain:
        call = single_call(
            q, k, v, (op, scale_q, scale_k, scale_v, k_scale, v_scale, o_dtype, causal, kv_layout, pos_encoding_mode, sm_scale, window_left, logits_soft_cap,
            rope_scale, rope_theta, backend, return_lse)
        )  # fmt: skip
        done = MISS if call is None else single_calls.run(*call)
        if done is not MISS:
            return done
    for arg, first, second in (("k_scale", scale_k, k_scale), ("v_scale", scale_v, v_scale)):
        if first is not None and second is not None:
            fail(op, arg, "was given twice", "both", f"scale_{arg[0]} or {arg}")
    scale_k, scale_v = (a if b is None else b for a, b in ((scale_k, k_scale), (scale_v, v_scale)))
    common.check_layout(op, kv_layout)
    common.check_options(op, backend=backend)
    encoding = common.check_pos_encoding(op, pos_encoding_mode, rope_scale, rope_theta)
    qv = common.q_view(op, q)
    kv, vv = common.dense_views(op, qv, k, v, kv_layout, pos_encoding_mode == "ROPE_LLAMA", fp8_queries=True)
    mask = mask_view(op, custom_mask, packed_custom_mask)
    bound = None
    if mask is not None:
        arg = "custom_mask" if packed_custom_mask is None else "packed_custom_mask"
        if mask.device != qv.device:
            fail(op, arg, "is on another device", device_name(mask.device), f"{device_name(qv.device)} (where q is)")
        lengths = np.array([qv.shape[0]]), np.array([kv.shape[1 if kv_layout == "HND" else 0]])
        bound = bind_mask(op, mask, packed_custom_mask is not None, *lengths)
    out_type = prefill_out_dtype(op, qv.dtype, o_dtype, "o_dtype")
    heads = None
    if qv.dtype is FLOAT8_E4M3:
        from pyinfer._fp8_queries import split_scales

        num_kv_heads = kv.shape[0 if kv_layout == "HND" else 1]
        of_scores, of_output, heads = split_scales(op, (scale_q, scale_k, scale_v), qv, num_kv_heads)
    else:
        of_scores = common.scale(op, "scale_q", scale_q) * common.scale(op, "scale_k", scale_k)
        of_output = common.scale(op, "scale_v", scale_v)
    scale = common.softmax_scale(op, sm_scale, qv.shape[2]) * of_scores
    out = empty(qv, (qv.shape[0], qv.shape[1], vv.shape[2]), out_type)
    lse = empty(qv, (qv.shape[0], qv.shape[1]), FLOAT32) if return_lse else None
    common.run_single(
        op, qv, kv, vv, kv_layout, view(out), None if lse is None else view(lse), causal=bool(causal) and bound is None,
        window_left=common.check_window(op, window_left), sm_scale=scale, logits_soft_cap=common.check_soft_cap(op, logits_soft_cap),
        v_scale=of_output, options=options_of(*encoding, bound is not None, family=KERNEL_FAMILIES[backend]), mask=bound,
        variant=variant, variant_args=variant_args, heads=heads, call=call,
    )  # fmt: skip
    return (out, lse) if return_lse else out


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


class BatchPrefillWithPagedKVCacheWrapper(BatchPrefill):
    """Prefill or append attention of a batch over a paged KV cache: plan() once per step, run() once per layer.

    Parameters
    ----------
    backend
        "auto"; "fa2" takes the kernels that run everywhere, "fa3" those of Hopper, which plan() and run() then require. On the CPU all are the same.
    float_workspace_buffer, kv_layout, use_cuda_graph, variant, jit_args, jit_kwargs
        As in `BatchDecodeWithPagedKVCacheWrapper`.
    qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
        CUDA graph mode: int32 [batch + 1], [batch + 1], [most pages ever], [batch]. The first plan fixes the most query rows.
    custom_mask_buf, mask_indptr_buf
        CUDA graph mode, for plans with a custom mask: uint8 [most bytes ever], int32 [batch + 1]. plan() packs the mask into them.
    """

    _op = "BatchPrefillWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None,
        paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
            "custom_mask_buf": custom_mask_buf,
            "mask_indptr_buf": mask_indptr_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, None, buffers)
        self._set_variant(variant, jit_args, jit_kwargs)

    def plan(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        seq_lens: Any = None,
        block_tables: Any = None,
        *,
        o_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        strict: bool = False,
    ) -> None:
        """Schedule a batch.

        Parameters
        ----------
        qo_indptr
            int32 or int64 [batch + 1]: request b's query tokens are rows qo_indptr[b] .. qo_indptr[b + 1] - 1 of q.
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
            The page table, as in `BatchDecodeWithPagedKVCacheWrapper.plan`.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size
            Shapes; num_qo_heads is a multiple of num_kv_heads, head_dim_vo is head_dim_qk by default.
        custom_mask
            bool, flat: the [qo_len, kv_len] masks of the requests one after another, True where key j is seen. It replaces `causal` and is combined with
            the window; it may lie on the host or the GPU, and a plan without one forgets that of the plan before.
        packed_custom_mask
            The same in bits, little-endian, each request from a whole byte on (`segment_packbits(..., "little")`). If both are given this one counts.
        causal, pos_encoding_mode, use_fp16_qk_reduction, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta
            As in `single_prefill_with_kv_cache`.
        q_data_type, kv_data_type, o_data_type
            Of q, of the keys and values (q's by default; float8_e4m3fn and float8_e5m2 as well) and of the output (q's by default). q in float8_e4m3fn, on
            Hopper and the CPU: keys and values too, pages are multiples of 8 tokens, and o_data_type must be float16 or bfloat16.
        non_blocking
            Accepted; copies never block.
        prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len
            Multi-item scoring, causal always: uint32 [batch] and uint16 [batch * token_pos_in_items_len]. A query at position p >= prefix sees, of the keys up
            to p, the prefix and those j with p < j + token_pos_in_items[p - prefix]: its own item. Host arrays may be of any integer type.
        max_item_len_ptr
            Accepted; these kernels do without the hint.
        fixed_split_size
            Split every tile's keys into pieces of this many pages, so that a request's result does not depend on the rest of the batch, to the bit.
        disable_split_kv
            Never split (the same guarantee).
        strict
            Refuse metadata whose reading would wait for the GPU: everything on a GPU but the page indices and masks.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted. seq_lens and block_tables belong to a backend that is not here.
        """
        op = self._op
        if seq_lens is not None or block_tables is not None:
            common.check_options(op, seq_lens=seq_lens, block_tables=block_tables)
        key = prefill_key(
            op, (q_data_type, kv_data_type, o_data_type), num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, causal, window_left,
            logits_soft_cap, sm_scale, pos_encoding_mode, rope_scale, rope_theta, fixed_split_size, disable_split_kv, self._family,
        )  # fmt: skip
        key = self._with_variant(key, sm_scale)
        qo, kv, last = host_metadata(
            op, strict=strict, qo_indptr=qo_indptr, paged_kv_indptr=paged_kv_indptr, paged_kv_last_page_len=paged_kv_last_page_len
        )  # fmt: skip
        page_indices = self._page_indices(op, paged_kv_indices, kv)
        items = given_items(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._plan_batch((qo, kv, last), page_indices, key, custom_mask, packed_custom_mask, items)

    @classmethod
    def max_workspace(
        cls,
        max_batch_size: int,
        max_num_tokens: int,
        max_num_pages: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        *,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        device: Any = None,
    ) -> int:
        """Bytes of workspace that no plan of at most so many requests, query tokens and pages needs more of; it allocates nothing.

        `device` as in `pyinfer.support`; other parameters as in plan(), whose errors it raises.
        """
        heads = num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size
        bounds, splits = (max_batch_size, max_num_tokens, max_num_pages), (fixed_split_size, disable_split_kv)
        return cls._max_bytes(bounds, heads, (q_data_type, kv_data_type), splits, device)

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q
            [qo_indptr[-1], num_qo_heads, head_dim_qk] in the planned dtype; in CUDA graph mode it may have more rows, which are left alone.
        paged_kv_cache, q_scale, k_scale, v_scale, enable_pdl, window_left, sinks
            As in `BatchDecodeWithPagedKVCacheWrapper.run`.
        out, lse
            Where to write: [rows, num_qo_heads, head_dim_vo] in o_data_type, float32 [rows, num_qo_heads].
        return_lse
            Also return the base-2 log-sum-exp.

        Returns
        -------
        out, or (out, lse)
            A row that sees no key: zeros and -inf.
        """
        options = (q_scale, k_scale, v_scale, return_lse, enable_pdl, window_left)
        call = run_call(q, paged_kv_cache, out, lse, args, sinks, options)
        done = self._calls.run(*call)
        if done is not MISS:
            return done
        qv = self._check_run(q, window_left, args)
        k, v = self._paged_kv(qv, paged_kv_cache)
        return self._run(qv, k, v, out, lse, sinks, call, args=args)

    def forward(
        self,
        q: Any,
        paged_kv_cache: Any,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Deprecated: `run`, with the plan's mask, window, soft cap and scale replaced by those given here."""
        common.deprecated(f"{self._op}.forward", "run")
        self._override(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, bool(causal), rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefill):
    """Prefill attention of a batch whose keys lie one request after another (ragged).

    Parameters
    ----------
    backend
        "auto"; "fa2" takes the kernels that run everywhere, "fa3" those of Hopper, which plan() and run() then require. On the CPU all are the same.
    float_workspace_buffer, kv_layout, use_cuda_graph, variant, jit_args, jit_kwargs
        As in `BatchDecodeWithPagedKVCacheWrapper`; kv_layout says whether k and v are [tokens, heads, dim] (NHD) or [heads, tokens, dim] (HND).
    qo_indptr_buf, kv_indptr_buf
        CUDA graph mode: int32 [batch + 1] both. The first plan fixes the most query rows.
    custom_mask_buf, mask_indptr_buf
        CUDA graph mode, for plans with a custom mask: uint8 [most bytes ever], int32 [batch + 1]. plan() packs the mask into them.
    """

    _op = "BatchPrefillWithRaggedKVCacheWrapper"
    _paged = False

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        kv_indptr_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "kv_indptr_buf": kv_indptr_buf,
            "custom_mask_buf": custom_mask_buf,
            "mask_indptr_buf": mask_indptr_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, None, buffers)
        self._set_variant(variant, jit_args, jit_kwargs)

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        *,
        o_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        strict: bool = False,
    ) -> None:
        """Schedule a batch.

        Parameters
        ----------
        qo_indptr, kv_indptr
            int32 [batch + 1] both: rows of q, and of k and v.
        fixed_split_size
            In kv tokens.

        Other parameters and errors as `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        key = prefill_key(
            self._op, (q_data_type, kv_data_type, o_data_type), num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, None, causal, window_left,
            logits_soft_cap, sm_scale, pos_encoding_mode, rope_scale, rope_theta, fixed_split_size, disable_split_kv, self._family,
        )  # fmt: skip
        key = self._with_variant(key, sm_scale)
        qo, kv = host_metadata(self._op, strict=strict, qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        items = given_items(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._plan_batch((qo, kv, None), None, key, custom_mask, packed_custom_mask, items)

    @classmethod
    def max_workspace(
        cls,
        max_batch_size: int,
        max_num_tokens: int,
        max_kv_tokens: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        device: Any = None,
    ) -> int:
        """Bytes of workspace that no plan of at most so many requests, query tokens and kv tokens needs more of; it allocates nothing.

        `device` as in `pyinfer.support`; other parameters as in plan(), whose errors it raises.
        """
        heads = num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, None
        bounds, splits = (max_batch_size, max_num_tokens, max_kv_tokens), (fixed_split_size, disable_split_kv)
        return cls._max_bytes(bounds, heads, (q_data_type, kv_data_type), splits, device)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q
            [qo_indptr[-1], num_qo_heads, head_dim_qk] in the planned dtype; in CUDA graph mode it may have more rows, which are left alone.
        k, v
            [kv_indptr[-1], num_kv_heads, dim] (NHD) or [num_kv_heads, kv_indptr[-1], dim] (HND); more tokens are allowed. Any strides but a last one of 1.

        Other parameters and returns as `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        options = (q_scale, k_scale, v_scale, return_lse, enable_pdl, window_left)
        call = run_call(q, (k, v), out, lse, args, sinks, options)
        done = self._calls.run(*call)
        if done is not MISS:
            return done
        qv = self._check_run(q, window_left, args)
        kv, vv = view(k, self._op, "k"), view(v, self._op, "v")
        self._check_kv(qv, kv, vv, "k", "v")
        return self._run(qv, kv, vv, out, lse, sinks, call, args=args)

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Deprecated: `run`, with the plan's mask, window, soft cap and scale replaced by those given here."""
        common.deprecated(f"{self._op}.forward", "run")
        self._override(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, bool(causal), rope_scale, rope_theta)
        return self.run(q, k, v, return_lse=return_lse)


def __getattr__(name: str) -> Any:
    if name == "single_prefill_with_kv_cache_with_jit_module":
        from pyinfer._jit_module import single_prefill_with_kv_cache_with_jit_module

        return single_prefill_with_kv_cache_with_jit_module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


attach(__name__)  # what torch.compile traces in the place of these functions
