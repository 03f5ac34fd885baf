"""POD attention of two batches over paged caches: one that prefills and one that decodes, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyinfer import _attention as common
from pyinfer.core.calls import MISS, Calls, Source
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import fail
from pyinfer.core.tensor import TensorView, current_stream, empty, view
from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

if TYPE_CHECKING:
    from pyinfer._batch_run import RunCall
    from pyinfer.schedulers.plan import AttentionPlan

_DTYPES = (FLOAT16, BFLOAT16)
_HEAD_DIMS = (64, 128, 256)
_DECODE_ROWS = 16  # packed rows of the decode part's tile


class _Part(BatchPrefillWithPagedKVCacheWrapper):
    """One of the two batches: checked and planned with the other, but sent to a GPU only if it is to run by itself."""

    _pending = False

    def _upload(self, plan: AttentionPlan, has_kernel: bool = False) -> None:
        self._pending = True

    def _execute(self, *args: Any, **kwargs: Any) -> Any:
        if self._pending:
            self._pending = False
            assert self._plan is not None
            super()._upload(self._plan)
        return super()._execute(*args, **kwargs)


class _Ready(NamedTuple):
    """Both plans on a GPU, cut for the kernel that runs them together."""

    causal: bool
    prefill: Any
    decode: Any
    kernel: Any
    pod: Any
    ptrs: tuple[int, int]
    indices: tuple[int, int]
    workspaces: tuple[int, int]
    rate: int


class BatchPODWithPagedKVCacheWrapper:
    """Prefill of a batch together with decode of another, each over a paged cache.

    On a GPU both run in one launch whose blocks take prefill or decode items, so that tensor cores and memory work at the same time; for that the types are
    float16 or bfloat16, the head dimension 64, 128 or 256, a decoding request has at most 16 packed rows (query tokens times query heads to a kv head),
    and there is neither a custom mask nor a positional encoding. Anything else, and the CPU, runs the two one after the other, with the same results.

    Parameters
    ----------
    float_workspace_buffer
        A flat tensor of any dtype for split-KV partial results, of which either batch uses half; plan() refuses one that is too small. None: the library
        allocates what it needs.
    kv_layout
        "NHD" or "HND", of both caches.
    """

    _op = "BatchPODWithPagedKVCacheWrapper"

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD") -> None:
        common.check_layout(self._op, kv_layout)
        self._kv_layout = kv_layout
        halves: tuple[Any, Any] = (None, None)
        if float_workspace_buffer is not None:
            half = view(float_workspace_buffer, self._op, "float_workspace_buffer").shape[0] // 2
            halves = float_workspace_buffer[:half], float_workspace_buffer[half:]
        self._prefill = _Part(halves[0], kv_layout)
        self._decode = _Part(halves[1], kv_layout)
        self._prefill._op = self._decode._op = self._op  # errors name what was called
        self._tables: tuple[Any, Any] | None = None
        self._options: dict[str, Any] = {}
        self._causal = False  # of the last run: what the next plan is made for
        self._masked = False
        self._fits = False  # one launch does the planned case
        self._ready: _Ready | None = None
        self._calls = Calls()  # run() with the plan there is
        self._buffer: Any = None
        self._memory: Any = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """False: there is no mode with fixed buffers."""
        return False

    @property
    def plan_info(self) -> tuple[Any, Any]:
        """The plans of prefill and decode (immutable), None before plan()."""
        if self._ready is not None:
            return self._ready.prefill, self._ready.decode
        return self._prefill.plan_info, self._decode.plan_info

    def plan(
        self,
        qo_indptr_p: Any,
        kv_indptr_p: Any,
        kv_indices_p: Any,
        last_page_len_p: Any,
        qo_indptr_d: Any,
        kv_indptr_d: Any,
        kv_indices_d: Any,
        last_page_len_d: Any,
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
        """Schedule both batches.

        Parameters
        ----------
        qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p
            The batch that prefills, as `BatchPrefillWithPagedKVCacheWrapper.plan` has them.
        qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d
            The batch that decodes: a request's queries, nearly always one, see all its keys.
        data_type
            The older name of q_data_type and kv_data_type.

        Other parameters and errors as `BatchPrefillWithPagedKVCacheWrapper.plan`, for both.
        """
        op = self._op
        if data_type is not None and kv_data_type is None:
            q_data_type = kv_data_type = data_type
        tables = []
        for which, table in (
            ("p", (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p)),
            ("d", (qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d)),
        ):
            qo, kv, indices, last = table
            named = {f"qo_indptr_{which}": qo, f"kv_indptr_{which}": kv, f"last_page_len_{which}": last}
            host = [x.copy() for x in common.host_metadata(op, strict=strict, **named)]
            tables.append((host[0], host[1], indices, host[2]))
        self._options = dict(
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim, page_size=page_size, pos_encoding_mode=pos_encoding_mode,
            window_left=window_left, q_data_type=q_data_type, kv_data_type=kv_data_type, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        self._calls.clear()
        self._tables = self._ready = None  # until both are planned: half of a new plan is none
        self._masked = False
        p, d = self._prefill, self._decode
        d.plan(*tables[1], **self._options)
        p.plan(*tables[0], causal=self._causal, **self._options)
        qo_d = tables[1][0]
        rows = int((qo_d[1:] - qo_d[:-1]).max(initial=0)) * (num_qo_heads // num_kv_heads)
        alike = p._dtype in _DTYPES and p._kv_dtype is p._dtype and head_dim in _HEAD_DIMS
        self._fits = alike and rows <= _DECODE_ROWS and pos_encoding_mode == "NONE"
        home = p._ref or d._ref  # None: the first run() shows the device
        if self._fits and home is not None and home.device >= 0:
            self._ready = self._arrange(home, self._causal)
        self._tables = (tables[0], tables[1])

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
        paged_kv_cache_p: Any,
        q_d: Any,
        paged_kv_cache_d: Any,
        custom_mask_p: Any = None,
        packed_custom_mask_p: Any = None,
        causal_p: bool = False,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple[Any, Any]:
        """Both attentions.

        Parameters
        ----------
        q_p, paged_kv_cache_p
            Of the batch that prefills: [qo_indptr_p[-1], num_qo_heads, head_dim], and a cache as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        q_d, paged_kv_cache_d
            Of the batch that decodes, likewise.
        custom_mask_p, packed_custom_mask_p, causal_p
            Of the batch that prefills, as in `BatchPrefillWithPagedKVCacheWrapper.plan`. What differs from the last run() is planned anew, a mask always.
        q_scale, k_scale, v_scale
            Of the batch that decodes: q_scale and k_scale multiply its sm_scale, v_scale its output.
        return_lse
            Return the base-2 log-sum-exps as well.
        use_fp16_qk_reduction
            Accepted; scores are always accumulated in float32.
        enable_pdl
            Programmatic dependent launch; None wherever it works.

        Returns
        -------
        (out_p, out_d), or with return_lse ((out_p, out_d), (lse_p, lse_d))
            Of the shapes of q_p and q_d; float32 [rows, num_qo_heads].
        """
        op = self._op
        if self._tables is None:
            fail(op, "plan()", "was not called", "run() first", "plan() before run()")
        causal, masked = bool(causal_p), custom_mask_p is not None or packed_custom_mask_p is not None
        pairs = type(paged_kv_cache_p) is tuple, type(paged_kv_cache_d) is tuple
        caches = [c if pair else (c,) for c, pair in zip((paged_kv_cache_p, paged_kv_cache_d), pairs, strict=True)]
        options = (*pairs, causal, q_scale, k_scale, v_scale, return_lse, enable_pdl)
        call = options, (q_p, *caches[0], q_d, *caches[1])
        if not masked:
            done = self._calls.run(*call)
            if done is not MISS:
                return (done[:2], done[2:]) if return_lse else done
        scales = dict(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if self._fits and not masked:
            done = self._together(
                q_p, paged_kv_cache_p, q_d, paged_kv_cache_d, causal, scales, return_lse, enable_pdl, call
            )
            if done is not None:
                self._causal = causal
                return done
        p = self._prefill
        if masked or self._masked or p.plan_info is None or p.plan_info.causal != causal:
            masks: dict[str, Any] = dict(custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p)
            qo, kv, indices, last = self._tables[0]
            p.plan(qo, kv, indices, last, causal=causal, **masks, **self._options)
        self._causal, self._masked = causal and not masked, masked
        out_p = p.run(q_p, paged_kv_cache_p, return_lse=return_lse, enable_pdl=enable_pdl)
        out_d = self._decode.run(q_d, paged_kv_cache_d, return_lse=return_lse, enable_pdl=enable_pdl, **scales)  # type: ignore[arg-type]
        return ((out_p[0], out_d[0]), (out_p[1], out_d[1])) if return_lse else (out_p, out_d)

    # ---- one launch
    def _together(
        self, q_p: Any, cache_p: Any, q_d: Any, cache_d: Any, causal: bool, scales: dict[str, Any], return_lse: bool, enable_pdl: bool | None,
        call: RunCall,
    ) -> Any:  # fmt: skip
        """Both in one launch; None for the CPU and for tensors that the kernel does not take."""
        p, d = self._prefill, self._decode
        qp = common.q_view(self._op, q_p)
        if qp.device < 0:
            return None
        qp, qd = p._check_run(q_p, None, ()), d._check_run(q_d, None, ())
        (kp, vp), (kd, vd) = p._paged_kv(qp, cache_p), d._paged_kv(qd, cache_d)
        from pyinfer.jit.pod import aligned, launch_pod, plan_part

        if not aligned(qp, kp, vp, qd, kd, vd):
            return None
        ready = self._ready
        if ready is None or ready.causal != causal:
            ready = self._ready = self._arrange(qp, causal)
            self._calls.clear()
        outs = [empty(q, tuple(q.shape)) for q in (qp, qd)]
        lses = [empty(q, tuple(q.shape[:2]), FLOAT32) if return_lse else None for q in (qp, qd)]
        parts = []
        for i, (plan, q, k, v) in enumerate(((ready.prefill, qp, kp, vp), (ready.decode, qd, kd, vd))):
            scale, factor = p._sm_scale, 1.0
            if i:
                scale *= common.scale(self._op, "q_scale", scales["q_scale"]) * common.scale(
                    self._op, "k_scale", scales["k_scale"]
                )
                factor = common.scale(self._op, "v_scale", scales["v_scale"])
            parts.append(
                plan_part(
                    plan, ready.ptrs[i], q, k, v, ready.indices[i], self._kv_layout, view(outs[i]), None if lses[i] is None else view(lses[i]),
                    ready.workspaces[i], sm_scale=scale, v_scale=factor,
                )
            )  # fmt: skip
        prefill, decode = parts
        pdl = common.use_pdl(qp.device, enable_pdl)
        stream = current_stream(qp)
        bound = launch_pod(ready.kernel, ready.pod, stream, prefill, decode, ready.rate, pdl, bind=True)
        assert bound is not None
        pointers: list[int] = []
        recipe: list[Source] = []
        given = 0
        pairs, tensors = call[0][:2], call[1]
        for i, (q, k, v, pair) in enumerate(((qp, kp, vp, pairs[0]), (qd, kd, vd, pairs[1]))):
            lse = lses[i]
            pointers += [q.ptr, k.ptr, v.ptr, view(outs[i]).ptr, 0 if lse is None else view(lse).ptr]
            recipe += [
                (given, 0),
                (given + 1, 0),
                (given + 2, 0) if pair else (given + 1, v.ptr - k.ptr),
                (len(tensors) + i, 0),
            ]
            recipe += [(len(tensors) + 2 + i, 0) if return_lse else None]
            given += 2 + pair
        bound.behind_a_copy(stream, *pointers)  # of the plan; later calls may start early
        outputs = [(tuple(q.shape), q.dtype) for q in (qp, qd)]
        if return_lse:
            outputs += [(tuple(q.shape[:2]), FLOAT32) for q in (qp, qd)]
        self._calls.remember(*call, qp, bound, tuple(outputs), tuple(recipe), len(recipe), None)
        return ((outs[0], outs[1]), (lses[0], lses[1])) if return_lse else (outs[0], outs[1])

    def _arrange(self, home: TensorView, causal: bool) -> _Ready:
        """Cut both batches for the kernel's tiles and send the plans to the GPU, in one copy."""
        from pyinfer.core.device import num_sms
        from pyinfer.core.workspace import DeviceBuffer, PlanBuffer
        from pyinfer.jit.pod import device_pod
        from pyinfer.schedulers.decode import EXTRA_SLOTS as DECODE_EXTRA
        from pyinfer.schedulers.mixed import load, rate, shares
        from pyinfer.schedulers.plan import build_plan
        from pyinfer.schedulers.prefill import EXTRA_SLOTS as PREFILL_EXTRA

        inner = (self._prefill, self._decode)
        p, d = inner[0].plan_info, inner[1].plan_info
        assert p is not None and d is not None
        config, pod, kernel = device_pod(home.device, self._prefill._dtype, p.head_dim_qk, "plan", "plain")
        tiles = ((config.prefill.tile_q, config.prefill.tile_kv), (config.decode.tile_q, config.decode.tile_kv))
        sms, group = num_sms(home.device), p.group_size
        loads = [
            shares(np.diff(plan.qo_indptr), plan.kv_len, np.full(plan.batch_size, i == 1), group, tiles[i][0], causal)[
                i
            ]
            for i, plan in enumerate((p, d))
        ]
        part = loads[0] / max(sum(loads), 1.0)
        plans = [
            build_plan(
                self._op, plan.qo_indptr.copy(), np.diff(plan.qo_indptr).astype(np.int32), plan.kv_indptr.copy(), plan.kv_len.copy(),
                None if plan.kv_indices is None or plan.offsets.kv_indices < 0 else plan.kv_indices.copy(),
                num_qo_heads=plan.num_qo_heads, num_kv_heads=plan.num_kv_heads, head_dim_qk=plan.head_dim_qk, head_dim_vo=plan.head_dim_vo,
                page_size=plan.page_size, tile_q=tile[0], tile_kv=tile[1], num_sms=max(round(sms * share), 1), ctas_per_sm=config.ctas_per_sm,
                causal=mask, window_left=plan.window_left, fixed_split_size=None, disable_split_kv=False, extra_slots=extra, capacity=None,
                max_page=plan.max_page,
            )
            for plan, tile, share, mask, extra in (
                (p, tiles[0], part, causal, PREFILL_EXTRA),
                (d, tiles[1], 1.0 - part, False, DECODE_EXTRA),
            )
        ]  # fmt: skip
        if self._buffer is None:
            self._buffer = PlanBuffer(home.device, home.framework)
            self._memory = DeviceBuffer(home.device, home.framework)
        first = plans[0].pack()
        at = self._buffer.upload(np.concatenate([first, plans[1].pack()]), current_stream(home))
        ptrs = (at, at + 4 * first.size)
        indices = []
        for wrapper, plan, ptr in zip(inner, plans, ptrs, strict=True):
            there = wrapper._indices
            indices.append(there.ptr if there is not None else ptr + 4 * plan.offsets.kv_indices)
        given = [wrapper._workspace for wrapper in inner]
        if given[0] is not None and given[1] is not None:
            for wrapper, plan in zip(inner, plans, strict=True):
                wrapper._check_workspace(plan.workspace_bytes)
            memory = (given[0].ptr + -given[0].ptr % 16, given[1].ptr + -given[1].ptr % 16)
        else:
            bytes_p = plans[0].workspace_bytes + 15 & -16
            begin = self._memory.reserve(bytes_p + plans[1].workspace_bytes)
            memory = (begin, begin + bytes_p)
        return _Ready(
            causal, plans[0], plans[1], kernel, pod, ptrs, (indices[0], indices[1]), memory, rate(load(plans[0]), load(plans[1])),
        )  # fmt: skip
