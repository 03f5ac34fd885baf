"""POD attention: the prefill of one request and the decode of a batch at the same time, in one launch."""

from __future__ import annotations

from typing import Any

from pyinfer import _attention as common
from pyinfer._batch_pod import BatchPODWithPagedKVCacheWrapper
from pyinfer._single_calls import SingleCall, comes_again, single_call
from pyinfer.core.calls import MISS, Calls, Source
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import fail
from pyinfer.core.tensor import TensorView, current_stream, empty, view
from pyinfer.torch_ops import attach

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]

_DTYPES = (FLOAT16, BFLOAT16)
_HEAD_DIMS = (64, 128, 256)


class PODWithPagedKVCacheWrapper:
    """Prefill of one request with dense keys together with batched decode over a paged cache.

    On a GPU both run in one launch whose blocks take prefill or decode items, so that tensor cores and memory work at the same time; for that the types are
    float16 or bfloat16, the head dimension 64, 128 or 256, at most 16 query heads share a kv head in decode, and the prefill has neither a custom mask nor
    a positional encoding. Anything else, and the CPU, runs the two one after the other, with the same results.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        Of the decode batch, as in `BatchDecodeWithPagedKVCacheWrapper`.
    jit_args
        Must be None.
    """

    _op = "PODWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        jit_args: Any = None,
    ) -> None:
        from pyinfer.decode import BatchDecodeWithPagedKVCacheWrapper

        if jit_args is not None:
            fail(self._op, "jit_args", "is not supported", type(jit_args).__name__, "None")
        common.check_layout(self._op, kv_layout)
        self._kv_layout = kv_layout
        self._decode = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, False, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        )  # fmt: skip
        self._decode._op = self._op  # errors name what was called
        self._plain = True
        self._fits = False
        self._calls = Calls()  # run() with the plan there is

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made for CUDA graphs."""
        return self._decode.is_cuda_graph_enabled

    @property
    def plan_info(self) -> Any:
        """The decode batch's plan (immutable), None before plan()."""
        return self._decode.plan_info

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace from the next plan() on, which refuses one that is too small."""
        self._decode.reset_workspace_buffer(float_workspace_buffer)

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule the decode batch. Parameters and errors as `BatchDecodeWithPagedKVCacheWrapper.plan`."""
        self._calls.clear()
        self._decode.plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode=pos_encoding_mode, window_left=window_left,
            q_data_type=q_data_type, kv_data_type=kv_data_type, data_type=data_type, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
            strict=strict,
        )  # fmt: skip
        self._plain = pos_encoding_mode == "NONE"
        self._pos_encoding_mode = pos_encoding_mode
        self._fits = self._plain and num_qo_heads // num_kv_heads <= 16 and head_dim in _HEAD_DIMS

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: `plan`."""
        common.deprecated(f"{self._op}.begin_forward", "plan")
        self.plan(*args, **kwargs)

    def end_forward(self) -> None:
        """Deprecated: does nothing."""
        common.deprecated(f"{self._op}.end_forward", "nothing: it does nothing")

    def run(
        self,
        q_p: Any,
        k_p: Any,
        v_p: Any,
        q_d: Any,
        paged_kv_cache_d: Any,
        custom_mask_p: Any = None,
        packed_custom_mask_p: Any = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: Any = None,
        packed_custom_mask_d: Any = None,
        causal_d: bool = False,
        kv_layout_d: str | None = None,
        pos_encoding_mode_d: str | None = None,
        sm_scale_d: float | None = None,
        window_left_d: int | None = None,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
    ) -> tuple[Any, Any]:
        """Both attentions.

        Parameters
        ----------
        q_p, k_p, v_p
            The request that prefills: [qo_len, num_qo_heads, head_dim], and keys and values as kv_layout_p says ("NHD": [kv_len, num_kv_heads, head_dim]).
        custom_mask_p, packed_custom_mask_p, causal_p, pos_encoding_mode_p, sm_scale_p, window_left_p, rope_scale_p, rope_theta_p
            As in `single_prefill_with_kv_cache`.
        q_d, paged_kv_cache_d
            The batch that decodes: [batch, num_qo_heads, head_dim], and its cache, as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        kv_layout_d, pos_encoding_mode_d, window_left_d, sm_scale_d
            None, or what constructor and plan() were told: these decide.
        causal_d
            Makes no difference: a decoding request's query is its last token.
        custom_mask_d, packed_custom_mask_d, rope_scale_d, rope_theta_d
            Must be None.
        q_scale, k_scale, v_scale
            Of the decode batch: q_scale and k_scale multiply its sm_scale, v_scale its output.
        return_lse_p, return_lse_d
            Return (out, lse) instead of out for that part; lse is base 2.
        use_fp16_qk_reduction
            As in `single_prefill_with_kv_cache`.
        enable_pdl
            Programmatic dependent launch; None wherever it works.

        Returns
        -------
        out_p, out_d
            [qo_len, num_qo_heads, head_dim] and [batch, num_qo_heads, head_dim].
        """
        op, d = self._op, self._decode
        call = None
        elsewhere = (
            custom_mask_p,
            packed_custom_mask_p,
            custom_mask_d,
            packed_custom_mask_d,
            rope_scale_d,
            rope_theta_d,
        )
        if not args and not any(x is not None for x in elsewhere):
            pair = type(paged_kv_cache_d) is tuple
            options = (
                bool(causal_p), kv_layout_p, pos_encoding_mode_p, sm_scale_p, window_left_p, rope_scale_p, rope_theta_p, return_lse_p, kv_layout_d,
                pos_encoding_mode_d, sm_scale_d, window_left_d, q_scale, k_scale, v_scale, return_lse_d, enable_pdl, pair,
            )  # fmt: skip
            call = single_call(q_p, k_p, v_p, options, (q_d, *paged_kv_cache_d) if pair else (q_d, paged_kv_cache_d))
            done: Any = MISS if call is None else self._calls.run(*call)
            if done is not MISS:
                return _by_part(done, return_lse_p, return_lse_d)
        plan = d.plan_info
        if plan is None:
            fail(op, "plan()", "was not called", "run() first", "plan() before run()")
        if args:
            fail(op, "*args", "are not supported", f"{len(args)} extra arguments", "none")
        for arg, value in (
            ("custom_mask_d", custom_mask_d),
            ("packed_custom_mask_d", packed_custom_mask_d),
            ("rope_scale_d", rope_scale_d),
            ("rope_theta_d", rope_theta_d),
        ):
            if value is not None:
                fail(
                    op, arg, "is not an argument of run()", type(value).__name__, "None", "plan() decides about decode."
                )
        for arg, got, had in (
            ("kv_layout_d", kv_layout_d, self._kv_layout),
            ("pos_encoding_mode_d", pos_encoding_mode_d, self._pos_encoding_mode),
            ("window_left_d", window_left_d, plan.window_left),
            ("sm_scale_d", sm_scale_d, d._sm_scale),
        ):
            if got is not None and got != had:
                fail(op, arg, "differs from the plan", repr(got), f"None or {had!r}", "plan() decides about decode.")
        common.check_layout(op, kv_layout_p)
        if custom_mask_p is None and packed_custom_mask_p is None and pos_encoding_mode_p == "NONE" and self._fits:
            done = self._together(
                q_p, k_p, v_p, q_d, paged_kv_cache_d, bool(causal_p), kv_layout_p, sm_scale_p, window_left_p, return_lse_p, q_scale, k_scale, v_scale,
                return_lse_d, enable_pdl, call,
            )  # fmt: skip
            if done is not None:
                return done
        from pyinfer.prefill import single_prefill_with_kv_cache

        prefill = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p, kv_layout=kv_layout_p,
            pos_encoding_mode=pos_encoding_mode_p, use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale_p, window_left=window_left_p,
            rope_scale=rope_scale_p, rope_theta=rope_theta_p, return_lse=return_lse_p,
        )  # fmt: skip
        decode = d.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d, enable_pdl=enable_pdl
        )  # fmt: skip
        return prefill, decode

    def _together(
        self, q_p: Any, k_p: Any, v_p: Any, q_d: Any, cache: Any, causal: bool, kv_layout_p: str, sm_scale_p: float | None, window_left_p: int,
        return_lse_p: bool, q_scale: Any, k_scale: Any, v_scale: Any, return_lse_d: bool, enable_pdl: bool | None,
        call: SingleCall | None,
    ) -> tuple[Any, Any] | None:  # fmt: skip
        """Both in one launch; None if the kernel does not do this case."""
        op, d = self._op, self._decode
        qp, qd = common.q_view(op, q_p), common.q_view(op, q_d)
        if qp.device < 0 or qp.device != qd.device or qp.dtype is not qd.dtype or qp.dtype not in _DTYPES:
            return None
        kp, vp = common.dense_views(op, qp, k_p, v_p, kv_layout_p)
        qd = d._check_run(q_d, None, ())
        kd, vd = d._paged_kv(qd, cache)
        plan = d.plan_info
        assert plan is not None
        dim = plan.head_dim_qk
        from pyinfer.jit.pod import aligned, device_pod, launch_pod, plan_part, single_part

        alike = (
            qp.dtype is kp.dtype is vp.dtype is kd.dtype is vd.dtype
            and dim == qp.shape[2] == vp.shape[2] == plan.head_dim_vo
        )
        if not alike or plan.tile_q != 16 or d._soft_cap > 0.0 or not aligned(qp, kp, vp, qd, kd, vd):
            return None
        from pyinfer.core.device import num_sms
        from pyinfer.core.workspace import shared_workspace
        from pyinfer.schedulers.mixed import ITEM_COST, load, rate
        from pyinfer.schedulers.prefill import single_schedule

        hnd = kv_layout_p == "HND"
        rows, num_qo_heads, _ = qp.shape
        num_kv_heads, kv_len = (kp.shape[0], kp.shape[1]) if hnd else (kp.shape[1], kp.shape[0])
        packed = rows * (num_qo_heads // num_kv_heads)
        config, pod, kernel = device_pod(qp.device, qp.dtype, dim, "single", "plain")
        tile_q = config.prefill.tile_q
        window = common.check_window(op, window_left_p)
        seen = kv_len - (min(rows, kv_len) // 2 if causal else 0)
        prefill_load = float(-(-packed // tile_q) * num_kv_heads * (seen + ITEM_COST))
        if plan.capacity is None:
            decode_load = load(plan)
        else:  # a captured launch keeps its share and its splits: they must not follow the plan, or replays and eager runs would round differently
            pages = d._buffers["paged_kv_indices_buffer"].shape[0]
            decode_load = float(num_kv_heads * (pages * plan.page_size + plan.capacity.max_batch * ITEM_COST))
        share = rate(prefill_load, decode_load)
        schedule = single_schedule(
            rows, kv_len, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_vo=dim, tile_q=tile_q, tile_kv=config.prefill.tile_kv,
            num_sms=max(num_sms(qp.device) * share >> 16, 1), ctas_per_sm=config.ctas_per_sm, causal=causal, window_left=window,
        )  # fmt: skip
        stream, workspace = current_stream(qp), 0
        if schedule.workspace_bytes:
            shared = shared_workspace(qp.device, qp.framework, "single attention", stream)
            workspace = shared.reserve(schedule.workspace_bytes, zero=True)
        (out_p, lse_p), (out_d, lse_d) = _outputs(qp, dim, return_lse_p), _outputs(qd, dim, return_lse_d)
        results = [None if x is None else view(x) for x in (out_p, lse_p, out_d, lse_d)]
        at_p, at_lse_p, at_d, at_lse_d = results
        assert at_p is not None and at_d is not None
        prefill = single_part(
            config.prefill, qp, kp, vp, kv_layout_p, at_p, at_lse_p, workspace, causal=causal, window_left=window,
            sm_scale=common.softmax_scale(op, sm_scale_p, dim), kv_chunk=schedule.kv_chunk, num_splits=schedule.num_splits,
        )  # fmt: skip
        scale = d._sm_scale * common.scale(op, "q_scale", q_scale) * common.scale(op, "k_scale", k_scale)
        decode = plan_part(
            plan, d._plan_ptr, qd, kd, vd, d._indices_ptr, self._kv_layout, at_d, at_lse_d, d._workspace_ptr,
            sm_scale=scale, v_scale=common.scale(op, "v_scale", v_scale),
        )  # fmt: skip
        kept = call is not None and comes_again(call, qp, kp, vp, qd, kd, vd, at_p, at_d)
        pdl = common.use_pdl(qp.device, enable_pdl)
        bound = launch_pod(kernel, pod, stream, prefill, decode, share, pdl, bind=kept)
        if bound is not None:
            assert call is not None
            ends = [0 if x is None else x.ptr for x in results]
            bound(stream, qp.ptr, kp.ptr, vp.ptr, *ends[:2], qd.ptr, kd.ptr, vd.ptr, *ends[2:])
            at = iter(range(len(call[1]), len(call[1]) + 4))
            of_p, of_lse_p, of_d, of_lse_d = (None if x is None else (next(at), 0) for x in results)
            values: Source = (5, 0) if type(cache) is tuple else (4, vd.ptr - kd.ptr)
            recipe = ((0, 0), (1, 0), (2, 0), of_p, of_lse_p, (3, 0), (4, 0), values, of_d, of_lse_d)
            outputs = tuple([(tuple(x.shape), x.dtype) for x in results if x is not None])
            self._calls.remember(*call, qp, bound, outputs, recipe, len(recipe), None)
        return (out_p, lse_p) if return_lse_p else out_p, (out_d, lse_d) if return_lse_d else out_d


def _by_part(results: tuple[Any, ...], return_lse_p: bool, return_lse_d: bool) -> tuple[Any, Any]:
    """Outputs and LSEs in a row, as run() returns them."""
    first = 2 if return_lse_p else 1
    p, d = results[:first], results[first:]
    return p if return_lse_p else p[0], d if return_lse_d else d[0]


def _outputs(q: TensorView, dim: int, with_lse: bool) -> tuple[Any, Any]:
    rows, heads, _ = q.shape
    return empty(q, (rows, heads, dim)), empty(q, (rows, heads), FLOAT32) if with_lse else None


attach(__name__)  # what torch.compile traces in the place of these functions
