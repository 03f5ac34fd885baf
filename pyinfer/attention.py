"""Batch attention that takes prefill and decode requests together, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyinfer import _attention as common
from pyinfer._batch_run import remember_run, run_call
from pyinfer._sink_wrapper import BatchAttentionWithAttentionSinkWrapper
from pyinfer.core.calls import MISS, Calls, Source
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32, DType, canonical_dtype
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, current_stream, empty, host_ints, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyinfer.schedulers.mixed import MixedPlan
    from pyinfer.variants import AttentionVariant

__all__ = ["BatchAttention", "BatchAttentionWithAttentionSinkWrapper"]

_FUSED_DTYPES = (FLOAT16, BFLOAT16)
_FUSED_HEAD_DIMS = (64, 128, 256)


class _Batch(NamedTuple):
    """What plan() was told, checked: host arrays of the wrapper's own, and numbers."""

    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    kv_len: np.ndarray
    indices: np.ndarray | TensorView
    max_page: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    causal: bool
    sm_scale: float
    soft_cap: float
    q_dtype: DType
    kv_dtype: DType


class _Ready(NamedTuple):
    """A plan on a GPU."""

    device: int
    plans: MixedPlan
    kernel: Any
    pod: Any
    prefill_ptr: int
    decode_ptr: int
    indices_ptr: int
    prefill_workspace: int
    decode_workspace: int


class BatchAttention:
    """Attention of a batch in which some requests prefill and others decode, over a paged KV cache.

    On a GPU with float16 or bfloat16 and head dimensions of 64, 128 or 256 it is one launch whose blocks take prefill or decode items: both kinds share
    every multiprocessor, so tensor cores and memory work at the same time. Elsewhere (fp8 caches, other dimensions, addresses or strides that are no
    multiples of 16 bytes, the CPU) the batch prefill runs it, with the same result.

    Parameters
    ----------
    kv_layout
        "NHD": pages [page_size, num_kv_heads, head_dim]; "HND": [num_kv_heads, page_size, head_dim].
    device
        Accepted: the batch runs where `run`'s tensors are. Workspaces are the wrapper's own.
    use_cuda_graph
        Keep every buffer and the grid fixed, so that run() may be captured (after a first run has shown the device) and later plans are seen by replays. On
        a GPU that takes the one-launch kernel. The first plan fixes shapes, dtypes, scales and, if kv_indices are on the GPU, where they lie.
    max_batch_size, max_num_tokens, max_num_pages
        For use_cuda_graph: the most requests, query tokens and pages that a batch will have.
    variant
        An `AttentionVariant` with a softmax: the batch prefill runs it, in one launch too. Not with use_cuda_graph.
    """

    _op = "BatchAttention"

    def __init__(
        self,
        kv_layout: str = "NHD",
        device: Any = "cuda",
        *,
        use_cuda_graph: bool = False,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        max_num_pages: int | None = None,
        variant: AttentionVariant | None = None,
    ) -> None:
        self._kv_layout = common.check_layout(self._op, kv_layout)
        self._variant = self._checked_variant(variant, use_cuda_graph)
        self._most: tuple[int, int, int] | None = None
        if use_cuda_graph:
            sizes = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_num_pages": max_num_pages}
            for arg, n in sizes.items():
                if not isinstance(n, int) or n < 1:
                    fail(self._op, arg, "is no size", n, "1 or more", "CUDA graph mode needs it.")
            self._most = tuple(sizes.values())  # type: ignore[assignment]
        self._first: tuple[Any, ...] | None = None  # what the first plan fixed, in CUDA graph mode
        self._first_indices = 0
        self._batch: _Batch | None = None
        self._ready: _Ready | None = None
        self._home: TensorView | None = None  # stands for device and framework of the last q
        self._inner: Any = None
        self._inner_planned = False
        self._calls = Calls()  # run() with the plan there is
        self._buffer: Any = None
        self._workspace: Any = None

    def _checked_variant(self, variant: Any, use_cuda_graph: bool) -> AttentionVariant | None:
        if variant is None:
            return None
        from pyinfer.variants import check_variant

        known = check_variant(self._op, variant)
        if not known.use_softmax:
            fix = "Use BatchPrefillWithPagedKVCacheWrapper."
            fail(self._op, "variant", "has no softmax, and so no LSE to return", "use_softmax=False", "True", fix)
        if use_cuda_graph:
            fix = "Use BatchPrefillWithPagedKVCacheWrapper, which has a CUDA graph mode for variants."
            fail(self._op, "variant", "does not go with use_cuda_graph", known.name, "None", fix)
        return known

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made for CUDA graphs."""
        return self._most is not None

    @property
    def plan_info(self) -> Any:
        """The current plan (immutable): a `MixedPlan`, or the batch prefill's; None before plan() and, until run() shows a device, after it."""
        if self._ready is not None:
            return self._ready.plans
        return self._inner.plan_info if self._inner_planned else None

    # ---- plan
    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "bfloat16",
        kv_data_type: Any = "bfloat16",
        use_profiler: bool = False,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule a batch.

        Parameters
        ----------
        qo_indptr
            int32 [batch + 1]: request b's queries are rows qo_indptr[b] .. qo_indptr[b + 1] - 1 of q. Requests with one query decode, others prefill; how
            they lie in the batch does not matter.
        kv_indptr, kv_indices
            int32 [batch + 1], [at least kv_indptr[-1]]: page table.
        kv_len_arr
            int32 [batch]: keys of each request, at most its pages times page_size. Pages beyond them are not read.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size
            Shapes.
        causal
            Query i of a request sees key j iff j <= kv_len - qo_len + i.
        sm_scale
            1 / sqrt(head_dim_qk) by default.
        logits_soft_cap
            Scores become cap * tanh(score * sm_scale / cap); None or 0 off.
        q_data_type, kv_data_type
            Of q and of the cache.
        use_profiler
            Must be False: there is no in-kernel profiler.
        strict
            Refuse metadata whose reading would wait for the GPU.

        Host arrays never synchronise. Those on a GPU cost one copy, but for kv_indices, which are used where they are, unchecked (unless some pages hold
        no key: then they are read as well).

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted.
        """
        op = self._op
        if use_profiler:
            fail(op, "use_profiler", "is not available", True, "False", "Use Nsight Systems or Nsight Compute.")
        common.check_head_counts(op, num_qo_heads, num_kv_heads)
        if page_size < 1:
            fail(op, "page_size", "is no page size", page_size, "1 or more")
        soft_cap = common.check_soft_cap(op, logits_soft_cap)
        scale = common.softmax_scale(op, sm_scale, head_dim_qk)
        q_dtype, kv_dtype = (
            canonical_dtype(q_data_type, op, "q_data_type"),
            canonical_dtype(kv_data_type, op, "kv_data_type"),
        )
        qo, kv, lens, indices, max_page = self._table(qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size, strict)
        batch = _Batch(
            qo, kv, lens, indices, max_page, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, bool(causal), scale, soft_cap, q_dtype, kv_dtype
        )  # fmt: skip
        if self._most is not None:
            self._check_fixed(batch, self._most)
        self._batch = batch
        self._calls.clear()
        self._ready, self._inner_planned = None, False
        if self._home is not None:
            self._arrange(self._home)

    def _table(
        self, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, page_size: int, strict: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | TensorView, int]:
        """The page table, checked, without pages that no key lies in, as arrays of the wrapper's own; the largest page, -1 if it lies on a device."""
        from pyinfer.schedulers.checks import lengths

        op = self._op
        arrays = common.host_metadata(
            op, strict=strict, qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_len_arr=kv_len_arr
        )
        qo, kv, lens = (x.copy() for x in arrays)
        lengths(op, "qo_indptr", qo)
        pages = lengths(op, "kv_indptr", kv)
        for arg, count in (("qo_indptr", len(qo) - 1), ("kv_len_arr", len(lens))):
            if count != len(pages):
                fail(op, arg, "is for another batch size", count, f"{len(pages)} (kv_indptr has {len(kv)} entries)")
        need = -(-lens.astype(np.int64) // page_size)
        bad = np.flatnonzero((lens < 0) | (need > pages))
        if bad.size:
            b = int(bad[0])
            got = f"{int(lens[b])} for request {b}"
            fail(
                op,
                "kv_len_arr",
                "does not fit the page table",
                got,
                f"0..{int(pages[b]) * page_size} ({int(pages[b])} pages)",
            )
        indices: np.ndarray | TensorView
        v = None if isinstance(kv_indices, np.ndarray | list | tuple) else view(kv_indices, op, "kv_indices")
        trimmed = bool((need < pages).any())
        if v is not None and v.device >= 0 and not trimmed:
            check_ndim(op, "kv_indices", v, 1)
            check_dtype(op, "kv_indices", v, (INT32,))
            check_last_dim_contiguous(op, "kv_indices", v)
            indices = v
            have = v.shape[0]
        else:
            on_host: np.ndarray = host_ints(kv_indices, op, "kv_indices", strict=strict)
            indices, have = on_host, len(on_host)
        if have < kv[-1]:
            fail(op, "kv_indices", "is too short", have, f"at least {int(kv[-1])} (kv_indptr[-1])")
        max_page = -1
        if isinstance(indices, np.ndarray):
            keep = np.arange(int(kv[-1]))
            if trimmed:
                kv = np.concatenate([[0], np.cumsum(need)]).astype(np.int32)
                first = np.repeat(kv[:-1], need)
                keep = np.repeat(np.cumsum(pages, dtype=np.int64) - pages, need) + np.arange(int(kv[-1])) - first
            indices = np.ascontiguousarray(indices[keep])
            if indices.size:
                max_page = int(indices.max())
                if int(indices.min()) < 0:
                    at = int(np.flatnonzero(indices < 0)[0])
                    fail(op, "kv_indices", "holds a negative page", f"{int(indices[at])} at entry {at}", "0 or more")
        return qo, kv, lens, indices, max_page

    def _check_fixed(self, batch: _Batch, most: tuple[int, int, int]) -> None:
        """ValueError for what a captured launch cannot follow."""
        counts = len(batch.kv_len), int(batch.qo_indptr[-1]), int(batch.kv_indptr[-1])
        names = ("max_batch_size", "max_num_tokens", "max_num_pages")
        for arg, name, have, room in zip(("kv_len_arr", "qo_indptr", "kv_indptr"), names, counts, most, strict=True):
            if have > room:
                fail(self._op, arg, f"is beyond {name}", have, f"at most {room}", "Make a wrapper with more room.")
        fix = "In CUDA graph mode the first plan fixes it; make a new wrapper."
        at = _Batch._fields.index("num_qo_heads")
        fixed = tuple(batch[at:])
        for name, had, got in zip(_Batch._fields[at:], self._first or fixed, fixed, strict=True):
            if had != got:
                fail(self._op, name, "differs from the first plan", got, had, fix)
        where = batch.indices.ptr if isinstance(batch.indices, TensorView) else 0
        if self._first is not None and where != self._first_indices:
            there = "other GPU memory" if where else "host memory"
            wanted = "the same GPU memory" if self._first_indices else "host memory"
            fail(self._op, "kv_indices", "moved since the first plan", there, wanted, fix)
        self._first, self._first_indices = fixed, where

    def _fused(self, device: int) -> bool:
        """Whether a device has the kernel for both kinds of request."""
        b = self._batch
        assert b is not None
        alike = b.kv_dtype is b.q_dtype and b.head_dim_qk == b.head_dim_vo
        fits = b.q_dtype in _FUSED_DTYPES and b.head_dim_qk in _FUSED_HEAD_DIMS
        return device >= 0 and alike and fits and self._variant is None

    def _arrange(self, home: TensorView) -> None:
        """Plan for a device, and on a GPU upload the plan and fetch the kernel: run() then only launches."""
        self._home = TensorView(None, 0, (), (), home.dtype, home.device, home.framework)
        if not self._fused(home.device):
            self._refuse_inner(home.device)
            self._plan_inner(home.device)
            return
        from pyinfer.core.device import num_sms
        from pyinfer.core.workspace import DeviceBuffer, PlanBuffer
        from pyinfer.jit.pod import device_pod
        from pyinfer.schedulers.mixed import mixed_capacity, mixed_plan

        b = self._batch
        assert b is not None
        variant = "softcap" if b.soft_cap > 0.0 else "plain"
        config, pod, kernel = device_pod(home.device, b.q_dtype, b.head_dim_qk, "plan", variant)
        host_indices = b.indices if isinstance(b.indices, np.ndarray) else None
        cut: dict[str, Any] = dict(
            num_qo_heads=b.num_qo_heads, num_kv_heads=b.num_kv_heads, page_size=b.page_size, prefill_tile=(config.prefill.tile_q, config.prefill.tile_kv),
            decode_tile=(config.decode.tile_q, config.decode.tile_kv), num_sms=num_sms(home.device), ctas_per_sm=config.ctas_per_sm,
        )  # fmt: skip
        capacity = None
        if self._most is not None:
            capacity = mixed_capacity(*self._most, **cut, keep_indices=host_indices is not None)
        plans = mixed_plan(
            b.qo_indptr, b.kv_indptr, host_indices, b.kv_len, head_dim_qk=b.head_dim_qk, head_dim_vo=b.head_dim_vo, causal=b.causal, max_page=b.max_page,
            capacity=capacity, op=self._op, **cut,
        )  # fmt: skip
        if self._buffer is None or self._buffer.memory.device != home.device:
            self._buffer = PlanBuffer(home.device, home.framework)
            self._workspace = DeviceBuffer(home.device, home.framework)
        first = plans.prefill.pack()
        ptr = self._buffer.upload(np.concatenate([first, plans.decode.pack()]), current_stream(home))  # one copy
        if host_indices is not None:
            indices_ptr = ptr + 4 * plans.prefill.offsets.kv_indices
        else:
            assert isinstance(b.indices, TensorView)
            indices_ptr = b.indices.ptr
        prefill_bytes = plans.prefill.workspace_bytes + 15 & -16
        workspace = self._workspace.reserve(prefill_bytes + plans.decode.workspace_bytes)
        self._ready = _Ready(
            home.device,
            plans,
            kernel,
            pod,
            ptr,
            ptr + 4 * first.size,
            indices_ptr,
            workspace,
            workspace + prefill_bytes,
        )

    def _refuse_inner(self, device: int) -> None:
        """ValueError if a captured launch would need what the one-launch kernel does not do. On the CPU nothing is captured."""
        b = self._batch
        assert b is not None
        if self._most is not None and device >= 0:
            got = f"q {b.q_dtype.name}, cache {b.kv_dtype.name}, head_dim {b.head_dim_qk}"
            wanted = (
                "float16 or bfloat16 for both, head_dim 64, 128 or 256, addresses and strides in multiples of 16 bytes"
            )
            fix = "Use BatchPrefillWithPagedKVCacheWrapper, which has a CUDA graph mode for everything."
            fail(self._op, "use_cuda_graph", "is beyond the one-launch kernel", got, wanted, fix)

    def _plan_inner(self, device: int) -> None:
        """Let the batch prefill do it."""
        from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        b = self._batch
        assert b is not None
        if self._inner is None or self._inner._ref.device != device:
            self._inner = BatchPrefillWithPagedKVCacheWrapper(None, self._kv_layout, variant=self._variant)
            self._inner._op = self._op  # errors name what was called
            self._inner._ref = self._home
        pages = np.diff(b.kv_indptr)
        last = (b.kv_len - np.maximum(pages - 1, 0) * b.page_size).astype(np.int32)
        indices = b.indices if isinstance(b.indices, np.ndarray) else b.indices.obj
        self._inner.plan(
            b.qo_indptr, b.kv_indptr, indices, last, b.num_qo_heads, b.num_kv_heads, b.head_dim_qk, b.page_size, b.head_dim_vo, causal=b.causal,
            sm_scale=b.sm_scale, logits_soft_cap=b.soft_cap, q_data_type=b.q_dtype.name, kv_data_type=b.kv_dtype.name,
        )  # fmt: skip
        self._inner_planned = True

    # ---- run
    def run(
        self,
        q: Any,
        kv_cache: Any,
        out: Any = None,
        lse: Any = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Any = None,
        *,
        k_scale: float | None = None,
        v_scale: float | None = None,
        enable_pdl: bool | None = None,
        variant_args: Sequence[Any] | None = None,
    ) -> tuple[Any, Any]:
        """Attention of the planned batch.

        Parameters
        ----------
        q
            [qo_indptr[-1], num_qo_heads, head_dim_qk] in the planned dtype; in CUDA graph mode it may have more rows, which are left alone.
        kv_cache
            A tuple of two caches or one tensor, as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        out, lse
            Where to write, instead of new tensors: [rows, num_qo_heads, head_dim_vo] in q's dtype; float32 [rows, num_qo_heads].
        logits_soft_cap
            0, or the plan's once more.
        profiler_buffer
            Must be None.
        k_scale, v_scale
            k_scale multiplies sm_scale, v_scale the output.
        enable_pdl
            Programmatic dependent launch; None wherever it works.
        variant_args
            Values of the variant's parameters, in their order.

        Returns
        -------
        out, lse
            A row that sees no key: zeros and -inf.
        """
        options = (logits_soft_cap, k_scale, v_scale, enable_pdl)
        call = run_call(q, kv_cache, out, lse, tuple(variant_args or ()), None, options)
        if profiler_buffer is None:
            done = self._calls.run(*call)
            if done is not MISS:
                return done
        op, b = self._op, self._batch
        if b is None:
            fail(op, "plan()", "was not called", "run() first", "plan() before run()")
        if variant_args and self._variant is None:
            fail_type(op, "variant_args", "belong to a variant", f"{len(variant_args)} values", "none")
        if profiler_buffer is not None:
            fail(op, "profiler_buffer", "is not available", type(profiler_buffer).__name__, "None")
        if logits_soft_cap and logits_soft_cap != b.soft_cap:
            fail(op, "logits_soft_cap", "differs from the plan", logits_soft_cap, f"0 or {b.soft_cap} (the plan's)")
        qv = common.q_view(op, q)
        home = self._home
        if home is None or home.device != qv.device or (self._ready is None and not self._inner_planned):
            self._calls.clear()
            self._ready, self._inner_planned = None, False
            self._arrange(qv)
        ready = self._ready
        if ready is None:
            factors = {"k_scale": k_scale, "v_scale": v_scale}
            return self._run_inner(qv, q, kv_cache, out, lse, *(variant_args or ()), **factors, enable_pdl=enable_pdl)
        if qv.dtype is not b.q_dtype:
            fail_type(
                op, "q", "differs from the planned dtype", qv.dtype.name, b.q_dtype.name, "Pass q_data_type to plan()."
            )
        check_shape(op, "q", qv, (self._rows(qv), b.num_qo_heads, b.head_dim_qk))
        k, v = self._caches(qv, kv_cache)
        shape = (qv.shape[0], b.num_qo_heads, b.head_dim_vo)
        out_view = view(empty(qv, shape)) if out is None else common.check_out(op, "out", out, qv, shape, qv.dtype)
        if lse is None:
            lse_view = view(empty(qv, shape[:2], FLOAT32))
        else:
            lse_view = common.check_out(op, "lse", lse, qv, shape[:2], FLOAT32)
            if not lse_view.is_contiguous():
                fail(op, "lse", "is not contiguous", f"strides {tuple(lse_view.strides)}", "a contiguous tensor")
        from pyinfer.jit.pod import aligned, launch_pod, plan_part

        if not aligned(qv, k, v, out_view):
            self._refuse_inner(qv.device)
            if not self._inner_planned:
                self._plan_inner(qv.device)
            return self._inner.run(
                q, kv_cache, k_scale=k_scale, v_scale=v_scale, out=out_view.obj, lse=lse_view.obj, return_lse=True, enable_pdl=enable_pdl
            )  # fmt: skip
        scales: dict[str, Any] = dict(
            sm_scale=b.sm_scale * common.scale(op, "k_scale", k_scale), logits_soft_cap=b.soft_cap, v_scale=common.scale(op, "v_scale", v_scale)
        )  # fmt: skip
        tensors = (qv, k, v, ready.indices_ptr, self._kv_layout, out_view, lse_view)
        prefill = plan_part(ready.plans.prefill, ready.prefill_ptr, *tensors, ready.prefill_workspace, **scales)
        decode = plan_part(ready.plans.decode, ready.decode_ptr, *tensors, ready.decode_workspace, **scales)
        stream, pdl = current_stream(qv), common.use_pdl(qv.device, enable_pdl)
        bound = launch_pod(ready.kernel, ready.pod, stream, prefill, decode, ready.plans.prefill_rate, pdl, bind=True)
        assert bound is not None
        pointers = (qv.ptr, k.ptr, v.ptr, out_view.ptr, lse_view.ptr)
        bound.behind_a_copy(stream, *pointers, *pointers)  # of the plan; later calls may start early
        given_out, given_lse, pair = out is not None, lse is not None, type(kv_cache) is tuple
        inputs: tuple[Source, ...] = ((0, 0), (1, 0), (2, 0) if pair else (1, v.ptr - k.ptr))
        remember_run(
            self._calls, call, qv, inputs, 2 + pair, shape, qv.dtype, bound, given_out, True, given_lse, times=2
        )
        return out_view.obj, lse_view.obj

    def _rows(self, q: TensorView) -> int:
        """How many rows q should have: the plan's or, as a captured graph's tensors stay as large as they were, more."""
        assert self._batch is not None
        rows = int(self._batch.qo_indptr[-1])
        return max(rows, q.shape[0]) if self._most is not None else rows

    def _run_inner(
        self, qv: TensorView, q: Any, cache: Any, out: Any, lse: Any, *args: Any, **options: Any
    ) -> tuple[Any, Any]:
        """`run` by the batch prefill; of tensors with more rows than the plan it gets the rows in front."""
        rows = int(self._inner.plan_info.total_rows)
        if qv.shape[0] == rows or self._most is None:
            return self._inner.run(q, cache, *args, out=out, lse=lse, return_lse=True, **options)
        if out is None:
            out = empty(qv, (*qv.shape[:2], self._inner.plan_info.head_dim_vo))
        if lse is None:
            lse = empty(qv, qv.shape[:2], FLOAT32)
        check_shape(self._op, "q", qv, (self._rows(qv), None, None))
        self._inner.run(q[:rows], cache, *args, out=out[:rows], lse=lse[:rows], return_lse=True, **options)
        return out, lse

    def _caches(self, q: TensorView, cache: Any) -> tuple[TensorView, TensorView]:
        """Checked views of the caches."""
        op, b = self._op, self._batch
        assert b is not None
        k, v = common.paged_views(op, cache, self._kv_layout, b.page_size)
        wanted: tuple[int | None, ...] = (None, b.page_size, b.num_kv_heads, b.head_dim_qk)
        if self._kv_layout == "HND":
            wanted = (None, b.num_kv_heads, b.page_size, b.head_dim_qk)
        for x, name in ((k, "kv_cache (K)"), (v, "kv_cache (V)")):
            if x.dtype is not b.kv_dtype:
                fix = "Pass kv_data_type to plan()."
                fail_type(op, name, "differs from the planned dtype", x.dtype.name, b.kv_dtype.name, fix)
            if x.device != q.device:
                fail(op, name, "is on another device", device_name(x.device), f"{device_name(q.device)} (where q is)")
            check_shape(op, name, x, wanted)
            check_last_dim_contiguous(op, name, x)
            if x.shape[0] <= b.max_page:
                got = f"0..{x.shape[0] - 1} ({name} has {x.shape[0]} pages)"
                fail(op, "kv_indices", "names a page outside the cache", b.max_page, got)
        return k, v


attach(__name__)  # what torch.compile traces in the place of these functions
