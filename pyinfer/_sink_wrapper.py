"""The batch wrapper of attention sinks, as FlashInfer names it: `BatchPrefillWithPagedKVCacheWrapper` whose run() takes them in third place."""

from __future__ import annotations

from typing import Any

from pyinfer import _attention as common
from pyinfer._batch_run import run_call
from pyinfer.core.calls import MISS
from pyinfer.core.errors import fail_type
from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Prefill, append or decode attention of a batch over a paged KV cache, with an attention sink for each query head.

    A sink is a logit that joins the denominator of the softmax (and the LSE) and brings no value. `BatchDecodeWithPagedKVCacheWrapper` and
    `BatchPrefillWithPagedKVCacheWrapper` take sinks too, as run(sinks=...).

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf, \
custom_mask_buf, mask_indptr_buf, backend
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    pos_encoding_mode, use_fp16_qk_reduction, q_data_type, kv_data_type, o_data_type, head_dim_qk, head_dim_vo, window_left
        What plan() takes where it is not told. o_data_type None: q_data_type.
    """

    _op = "BatchAttentionWithAttentionSinkWrapper"

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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: Any = "bfloat16",
        kv_data_type: Any = "bfloat16",
        o_data_type: Any = None,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf,
            custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip
        common.check_pos_encoding(self._op, pos_encoding_mode)
        common.check_window(self._op, window_left)
        self._defaults: dict[str, Any] = dict(
            pos_encoding_mode=pos_encoding_mode, use_fp16_qk_reduction=use_fp16_qk_reduction, q_data_type=q_data_type, kv_data_type=kv_data_type,
            o_data_type=o_data_type, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo, window_left=window_left,
        )  # fmt: skip

    def plan(  # type: ignore[override]  # None: the constructor's
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int | None = None,
        page_size: int = 1,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str | None = None,
        use_fp16_qk_reduction: bool | None = None,
        sm_scale: float | None = None,
        window_left: int | None = None,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = None,
        kv_data_type: Any = None,
        non_blocking: bool = True,
        **options: Any,
    ) -> None:
        """Schedule a batch, as `BatchPrefillWithPagedKVCacheWrapper.plan`, whose keywords it takes too; what is None is the constructor's.

        A kv_data_type of None is q_data_type where that is given here. sm_scale counts where run() gets none.
        """
        told = dict(
            pos_encoding_mode=pos_encoding_mode, use_fp16_qk_reduction=use_fp16_qk_reduction, q_data_type=q_data_type,
            kv_data_type=q_data_type if kv_data_type is None else kv_data_type, o_data_type=options.pop("o_data_type", None),
            head_dim_qk=head_dim_qk, head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo, window_left=window_left,
        )  # fmt: skip
        known = {k: self._defaults[k] if v is None else v for k, v in told.items()}
        super().plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, page_size=page_size,
            custom_mask=custom_mask, packed_custom_mask=packed_custom_mask, causal=causal, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale, rope_theta=rope_theta, non_blocking=non_blocking, **known, **options,
        )  # fmt: skip

    def run(  # type: ignore[override]  # positions as FlashInfer has them
        self,
        q: Any,
        paged_kv_cache: Any,
        sinks: Any = None,
        sm_scale: Any = None,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        sinks
            float32 [num_qo_heads], natural-log logits. Required: without sinks there is `BatchPrefillWithPagedKVCacheWrapper`.
        sm_scale
            Instead of the plan's.

        Other parameters and returns as `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        if sinks is None:
            fix = "Without sinks use BatchPrefillWithPagedKVCacheWrapper."
            fail_type(self._op, "sinks", "are missing", None, "float32 [num_qo_heads]", fix)
        options = (q_scale, k_scale, v_scale, return_lse, enable_pdl, window_left, sm_scale)
        call = run_call(q, paged_kv_cache, out, lse, args, sinks, options)
        done = self._calls.run(*call)
        if done is not MISS:
            return done
        qv = self._check_run(q, window_left, args)
        k, v = self._paged_kv(qv, paged_kv_cache)
        given = None if sm_scale is None else common.scale(self._op, "sm_scale", sm_scale)
        return self._run(qv, k, v, out, lse, sinks, call, sm_scale=given)

    def forward(  # type: ignore[override]
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
        sinks: Any = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Deprecated: `run`, with the plan's mask, window, soft cap and scale replaced by those given here."""
        common.deprecated(f"{self._op}.forward", "run")
        self._override(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, bool(causal), rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, sinks, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)
